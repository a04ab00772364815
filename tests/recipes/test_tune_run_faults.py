"""A training run that is stopped and goes on, as its user meets it: two forked ranks."""

import json
import signal
import time

import pytest
import torch

RECIPE = "recipes/rho1_wmtp_distributed.py"

pytestmark = pytest.mark.slow


def command(tiny_quickstarts, folder, *more):
    config = tiny_quickstarts.config("base", max_steps=16, save_every_n_steps=100)
    return [RECIPE, "--config", config, f"output_dir={folder}", *more]


def wait_for_step(started, folder, step):
    metrics, end = folder / "metrics.jsonl", time.monotonic() + 150
    while time.monotonic() < end:
        assert started.poll() == [None, None], started.stderr
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come: {started.stderr}")


def weights_of(folder):
    return torch.load(folder / "last" / "consolidated.pth", weights_only=True)


@pytest.mark.nightly  # test_rho1_wmtp_distributed.py stops and resumes in one process
def test_a_stopped_run_ends_with_75_and_goes_on(tiny_quickstarts, forks, tmp_path):
    """Nothing had been saved on schedule: what it goes on from is the save at the stop.

    The other signals, a rank that hangs and max_hours are in tests/distributed.
    """
    whole = forks.run(command(tiny_quickstarts, tmp_path / "whole"), ranks=2)
    assert whole.returncode == 0, whole.stderr[-4000:]
    folder = tmp_path / "run"
    first = forks.start(command(tiny_quickstarts, folder), ranks=2)
    wait_for_step(first, folder, 3)
    first.send_signal(signal.SIGTERM)
    assert first.wait_for_end() == [75, 75]
    said = json.loads((folder / "exit.json").read_text())
    assert said["reason"] == "SIGTERM"
    assert 3 <= said["step"] < 16
    assert f"Stopped by SIGTERM after step {said['step']}, which is saved" in first.stderr
    page = (folder / "run.html").read_text()
    assert "Stopped by SIGTERM" in page
    assert [path.name for path in (folder / "training_state").iterdir()] == [
        f"step_{said['step']:06d}"
    ]
    again = forks.run(command(tiny_quickstarts, folder), ranks=2)
    assert again.returncode == 1
    assert "holds a run that was interrupted after step" in again.stderr
    resume = command(tiny_quickstarts, folder, "resume_from_checkpoint=true")
    second = forks.run(resume, ranks=2)
    assert second.returncode == 0, second.stderr[-4000:]
    assert f"step_{said['step']:06d} after step {said['step']}." in second.stdout + second.stderr
    assert not (folder / "exit.json").exists()
    want = weights_of(tmp_path / "whole")
    assert all(torch.equal(value, want[key]) for key, value in weights_of(folder).items())
