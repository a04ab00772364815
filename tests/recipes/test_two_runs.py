"""A second run with the ``output_dir`` of a living one, from the command line and with ranks."""

import re
import signal
import time

import pytest

RECIPE = "recipes/rho1_wmtp_distributed.py"

pytestmark = pytest.mark.nightly  # in process: tests/run/test_start.py


def test_a_second_run_ends_and_the_first_goes_on(forks, tiny_quickstarts, tmp_path):
    folder = tmp_path / "run"
    config = tiny_quickstarts.config("base", max_steps=100_000, save_every_n_steps=100_000)
    command = [RECIPE, "--config", config, f"output_dir={folder}", "resume_from_checkpoint=true"]
    first = forks.start(command, ranks=2)
    end = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < end, first.stderr
        time.sleep(0.05)
    before = (folder / "config.yaml").stat().st_mtime_ns
    second = forks.run(command, ranks=2)
    assert second.returncode == 1
    told = f"InUseError: {folder} is in use by pid {first.pids[0]} on "
    assert second.stderr.count(told) == 1, second.stderr
    assert re.search(r"\(\S*rho1_wmtp_distributed.py --config .*\): wait until", second.stderr)
    assert first.poll() == [None, None]
    assert (folder / "config.yaml").stat().st_mtime_ns == before
    assert not (folder / "exit.json").exists()
    for rank in range(2):
        first.send_signal(signal.SIGKILL, rank)
    first.wait_for_end()
    third = forks.run([*command, "max_steps=2"], ranks=2)  # though the lock's file is there
    assert third.returncode == 0, third.stderr
    assert not (folder / ".lock").exists()
