"""A rank that hangs: the run says which and where, and no process stays."""

import os
import re
import signal

import pytest

pytestmark = pytest.mark.slow

TIMEOUT_S = 5


def test_rank_that_hangs_in_python(job):
    job.start(launched=True, stuck=1, timeout_s=TIMEOUT_S)
    (pid,) = job.wait_until("stuck", ranks=(1,))
    assert job.wait_for_end()[0] == 1
    expected = (
        rf"Rank 1 \(process {pid} on .*\) hangs: it came to step 4 \d+ seconds ago and is in "
        r"wait \(loop.py:\d+\); rank 0 waits in all_reduce, called by train \(loop.py:\d+\); the "
        "run ends, and the same command with resume_from_checkpoint=true continues from what was"
    )
    assert len(re.findall(expected, job.said)) == 1
    assert job.exit["message"] in job.said
    assert (job.exit["reason"], job.exit["step"]) == ("hung", 3)
    assert (job.exit["ranks"], job.exit["collective"]) == ([1], "all_reduce")


def test_rank_that_is_stopped_as_a_whole(job):
    """A launcher kills it some time after the others have ended."""
    job.start(launched=True, timeout_s=TIMEOUT_S)
    pid = job.wait_until("rank")[1]
    os.kill(pid, signal.SIGSTOP)
    assert job.wait_for_end() == [1, -signal.SIGKILL]
    expected = (
        rf"Rank 1 \(process {pid} on .*\) hangs: nothing was heard of it for at least \d+ seconds, "
        r"after it had come to .+ and was in .+ \(.*; rank 0 waits in all_reduce, called by \w+ "
    )
    assert len(re.findall(expected, job.said)) == 1
    assert (job.exit["reason"], job.exit["ranks"]) == ("hung", [1])
