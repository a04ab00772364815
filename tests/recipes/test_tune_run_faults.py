"""Faults of a run as its user meets them: real `tune run` processes of two ranks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from wmtp_modules.quickstarts.stdlib import prepare_stdlib

ROOT = Path(__file__).parents[2]
TUNE = Path(sys.executable).with_name("tune")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "assets"
    prepare_stdlib(str(folder), vocab_size=1024, corrupted_share=0.4, seed=0)
    return folder


def command(assets, folder, **overrides):
    given = {
        "output_dir": folder,
        "assets_dir": assets,
        "max_steps": 40,
        "run_val_every_n_steps": 20,
        "save_every_n_steps": 100,
        "log_every_n_steps": 1,
        **overrides,
    }
    return [
        *(TUNE, "run", "--nproc_per_node", "2", "recipes/rho1_wmtp_distributed.py"),
        *("--config", "configs/quickstart/base.yaml"),
        *(f"{key}={value}" for key, value in given.items()),
    ]


@pytest.fixture
def start(tmp_path):
    """start(arguments) -> the launcher, in a session of its own; what is left is killed."""
    started = []

    def go(arguments):
        log = (tmp_path / f"log_{len(started)}.txt").open("w+")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            list(map(str, arguments)),
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        process.log = log
        started.append(process)
        return process

    yield go
    for process in started:
        for pid in family(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        process.log.close()


def family(pid):
    """A living process and all that it started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    found = [pid] if pid in parents else []
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def wait_for_step(process, folder, step):
    metrics = folder / "metrics.jsonl"
    for _ in range(3000):
        assert process.poll() is None, text_of(process)
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} did not come: {text_of(process)}")


def text_of(process):
    return Path(process.log.name).read_text()


def ended(process, timeout=300):
    """Exit code, and that nothing stays."""
    workers = family(process.pid)[1:]
    code = process.wait(timeout)
    for _ in range(300):
        if not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
            return code
        time.sleep(0.1)
    raise AssertionError(f"left behind: {workers}")


def weights_of(folder):
    return torch.load(folder / "last" / "consolidated.pth", weights_only=True)


@pytest.fixture(scope="module")
def whole(assets, tmp_path_factory):
    """The run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = list(map(str, command(assets, folder)))
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_a_stopped_run_ends_with_75_and_goes_on(assets, whole, start, tmp_path):
    """Nothing had been saved on schedule: what it goes on from is the save at the stop.

    The other signals are in tests/distributed/test_signals.py.
    """
    folder = tmp_path / "run"
    first = start(command(assets, folder))
    wait_for_step(first, folder, 3)
    first.send_signal(signal.SIGTERM)
    assert ended(first) != 0
    said = json.loads((folder / "exit.json").read_text())
    assert said["reason"] == "SIGTERM"
    assert 3 <= said["step"] < 40
    text = text_of(first)
    assert f"Stopped by SIGTERM after step {said['step']}, which is saved" in text
    assert [path.name for path in (folder / "training_state").iterdir()] == [
        f"step_{said['step']:06d}"
    ]
    again = start(command(assets, folder))
    assert ended(again) == 1
    assert "holds a run that was interrupted after step" in text_of(again)
    second = start(command(assets, folder, resume_from_checkpoint="true"))
    assert ended(second) == 0, text_of(second)
    assert f"step_{said['step']:06d} after step {said['step']}." in text_of(second)
    assert not (folder / "exit.json").exists()
    want = weights_of(whole)
    assert all(torch.equal(value, want[key]) for key, value in weights_of(folder).items())


def test_max_hours_stops_in_time(assets, start, tmp_path):
    folder = tmp_path / "run"
    process = start(command(assets, folder, max_steps=100000, max_hours=0.02))
    assert ended(process) != 0  # and not after the five minutes of ``ended``
    assert json.loads((folder / "exit.json").read_text())["reason"] == "max_hours"


def test_a_hung_rank_is_named(assets, start, tmp_path):
    folder = tmp_path / "run"
    process = start(command(assets, folder, max_steps=100000, collective_timeout_s=10))
    wait_for_step(process, folder, 3)
    workers = [
        pid
        for pid in family(process.pid)[1:]
        if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    os.kill(workers[0], signal.SIGSTOP)
    assert ended(process) != 0
    assert re.search(
        r"Rank 1 \(process \d+ on .*\) hangs: .*; rank 0 waits in \w+", text_of(process)
    )
    assert json.loads((folder / "exit.json").read_text())["reason"] == "hung"


def test_five_kills_cost_nothing(tmp_path):
    """Fifty are in benchmarks/results/kill_resume.txt, by the same script."""
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/kill_resume.py", "--kills", "5", "--steps", "60"),
            *("--output_dir", str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "final parameters equal to the bit: True; all logged figures equal: True" in done.stdout
    assert re.search(r"^0 of \d+ bytes of completed states lost", done.stdout, re.MULTILINE)
