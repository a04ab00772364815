"""Two ranks that are asked to stop: all save the same step, none stays."""

import os
import signal
import time

import pytest

from wmtp_modules.run.stopping import DEBOUNCE_S

pytestmark = pytest.mark.slow

LONG = [1000, 1000]  # seconds, of each rank


@pytest.mark.parametrize(
    ("signum", "ranks"), [(signal.SIGTERM, [0, 1]), (signal.SIGINT, [1]), (signal.SIGUSR1, [0])]
)
def test_all_ranks_save_the_same_step_and_exit_with_75(job, signum, ranks):
    job.start(save_s=[0, 1.5])
    job.wait_until("rank")
    for _ in range(2):  # a launcher passes on what its workers may have got already
        for rank in ranks:
            job.started.send_signal(signum, rank)
        time.sleep(0.2)
    job.started.wait(100, rank=0)
    assert (job.folder / "saved1").exists()  # the faster rank waited for the other
    assert job.wait_for_end() == [75, 75]
    assert job.exit == {"reason": signum.name, "step": job.saved[0]}
    assert job.saved[0] == job.saved[1]
    sentence = f"Stopped by {signum.name} after step {job.saved[0]}, which is saved: the same"
    assert job.said.count(sentence) == 1
    assert "Traceback" not in job.said
    assert all((job.folder / f"atexit{rank}").exists() for rank in range(2))  # loggers close there


def test_second_signal_ends_at_once_also_in_a_collective(job):
    job.start(stuck=1)
    job.wait_until("stuck", ranks=(1,))
    time.sleep(1)  # rank 0 waits for it in all_reduce
    for _ in range(2):
        for rank in range(2):
            job.started.send_signal(signal.SIGTERM, rank)
        time.sleep(DEBOUNCE_S + 0.5)
    assert job.wait_for_end() == [128 + signal.SIGTERM] * 2


@pytest.mark.parametrize(
    "options", [{"setup_s": LONG}, {"setup_s": [0, 1000], "setup_barrier": True}], ids=str
)
def test_outside_of_training_a_signal_ends_at_once(job, options):
    """Also a rank in a barrier, which fails as the other leaves."""
    job.start(**options)
    job.wait_until("setup")
    time.sleep(1)
    for rank in range(2):
        job.started.send_signal(signal.SIGUSR1, rank)
    assert job.wait_for_end() == [75, 75]
    assert job.exit == {"reason": "SIGUSR1", "step": None}
    assert job.said.count("Stopped by SIGUSR1 outside of training: the same command") == 1
    assert "Traceback" not in job.said


def test_outside_of_training_a_rank_that_waits_in_c_is_left_alone(job):
    job.start(setup_s=[0, 1000], setup_barrier=True)
    job.wait_until("setup")
    time.sleep(1)  # rank 0 is in the barrier
    job.started.send_signal(signal.SIGTERM)
    assert job.started.wait(100, rank=0) == [75]
    assert job.exit == {"reason": "SIGTERM", "step": None}


def test_max_hours(job):
    job.start(max_hours=3 / 3600)
    assert job.wait_for_end() == [75, 75]
    assert job.exit == {"reason": "max_hours", "step": job.saved[0]}
    assert job.saved[0] == job.saved[1]


def test_max_hours_outside_of_training(job):
    job.start(setup_s=LONG, max_hours=2 / 3600)
    assert job.started.wait(100, rank=0) == [75]
    assert job.exit == {"reason": "max_hours", "step": None}


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGUSR1,
        # torchrun's own, which forked ranks get above.
        pytest.param(signal.SIGINT, marks=pytest.mark.nightly),
        pytest.param(signal.SIGTERM, marks=pytest.mark.nightly),
    ],
)
def test_signal_to_tune_run(job, signum):
    """torchrun by itself dies of SIGUSR1 and leaves its workers behind."""
    job.start_tune()
    job.wait_until("rank")
    job.tune.send_signal(signum)
    assert job.wait_for_end() == [1]
    assert job.exit == {"reason": signum.name, "step": job.saved[0]}
    assert job.saved[0] == job.saved[1]
    said = (job.folder / "said").read_text()
    assert said.splitlines()[-1].startswith(f"Stopped by {signum.name} after step {job.saved[0]}")
    assert "Traceback" not in said


@pytest.mark.nightly  # what it relies on, die_with_parent, has a test below
def test_tune_run_that_is_killed(job):
    """It passes nothing on."""
    job.start_tune(real_group=True)
    job.wait_until("rank")
    job.tune.kill()
    assert job.wait_for_end() == [-signal.SIGKILL]
    assert job.exit == {"reason": "SIGTERM", "step": job.saved[0]}
    assert job.saved[0] == job.saved[1]


def test_signal_to_one_worker_of_a_launcher(job):
    """Which ends the other workers as soon as one has ended."""
    job.start(launched=True, save_s=[0, 3])
    os.kill(job.wait_until("rank")[0], signal.SIGTERM)
    assert job.wait_for_end() == [75, 75]
    assert job.exit == {"reason": "SIGTERM", "step": job.saved[0]}
    assert job.saved[0] == job.saved[1]


def test_signal_to_one_process(job):
    job.start(ranks=None, real_group=True)
    job.wait_until("rank", ranks=(0,))
    job.started.send_signal(signal.SIGINT)
    assert job.wait_for_end() == [75]
    assert job.exit["reason"] == "SIGINT"


def test_worker_that_is_killed(job):
    job.start()
    os.kill(job.wait_until("rank")[1], signal.SIGKILL)
    assert job.wait_for_end() == [1, -signal.SIGKILL]
    assert not (job.folder / "out").exists()  # nobody asked to stop


def test_what_a_process_starts_ends_with_it(forks, tmp_path):
    """As the quickstart of the evaluation starts the training of its model."""
    (tmp_path / "parent.py").write_text(
        "import subprocess; from wmtp_modules.parallel.process_group import die_with_parent; "
        "subprocess.run(['sleep', '1000'], preexec_fn=die_with_parent)"
    )
    started = forks.start(["parent.py"], cwd=tmp_path)
    end = time.monotonic() + 60
    while len(started.alive()) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    assert started.wait_for_end() == [-signal.SIGKILL]


LATE = """
import atexit, os, pathlib, signal, time
from wmtp_modules.run import stopping

def last_words():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    pathlib.Path("flushed").touch()

atexit.register(last_words)
with stopping.StopRequests() as stops, stopping.exit_code(stops):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    finally:
        time.sleep(stopping.DEBOUNCE_S + 0.5)
"""


def test_what_runs_at_exit_is_not_cut_short(forks, tmp_path):
    """torchrun sends SIGTERM to the ranks that are slower than another one."""
    (tmp_path / "late.py").write_text(LATE)
    started = forks.start(["late.py"], cwd=tmp_path)
    assert started.wait_for_end() == [75]
    assert (tmp_path / "flushed").exists()
