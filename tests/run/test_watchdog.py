"""What a hang is and how it is told; real ones are in tests/distributed/test_hangs.py."""

import json
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from wmtp_modules.run import watchdog as module
from wmtp_modules.run.watchdog import Place, Report, Watchdog, find_hang, find_place

IN_STEP = Place("all_reduce", "agreed (stopping.py:1)")
IN_PYTHON = Place(None, "next_batch (data.py:2)")
TIMEOUT = 100.0


def report(age=101.0, place=IN_STEP, paused=False, number=7):
    return Report(number, "process 1 on host", "step 4", 3, age, paused, place)


def hang(reports, silences=None, own_rank=0):
    silences = {rank: 0.0 for rank in reports} | (silences or {})
    return find_hang(reports, silences, own_rank, TIMEOUT)


def test_no_hang_before_the_time_out():
    assert hang({0: report(age=99), 1: report(place=IN_PYTHON)}) is None


@pytest.mark.parametrize("own_rank", [0, 1])
def test_rank_that_hangs_in_python(own_rank):
    found = hang({0: report(), 1: report(place=IN_PYTHON)}, own_rank=own_rank)
    assert (found.ranks, found.collective) == ([1], "all_reduce")
    assert found.sentence == (
        "Rank 1 (process 1 on host) hangs: it came to step 4 101 seconds ago and is in next_batch "
        "(data.py:2); rank 0 waits in all_reduce, called by agreed (stopping.py:1); the run ends, "
        "and the same command with resume_from_checkpoint=true continues from what was saved"
    )


def test_rank_that_is_not_heard_of():
    found = hang({0: report(), 1: report(age=0.5, place=IN_PYTHON)}, {1: 26})
    assert found.ranks == [1]
    assert found.sentence.startswith(
        "Rank 1 (process 1 on host) hangs: nothing was heard of it for at least 26 seconds, after "
        "it had come to step 4 and was in next_batch (data.py:2); rank 0 waits in all_reduce"
    )


def test_rank_that_was_never_heard_of():
    assert hang({0: report(), 1: None}, {1: 20}) is None
    found = hang({0: report(), 1: None}, {1: 26})
    assert found.ranks == [1]
    assert found.sentence.startswith("Rank 1 hangs: nothing was ever heard of it; rank 0 waits")


@pytest.mark.parametrize(
    "other", [report(age=3), report(paused=True), report(age=900, paused=True)]
)
def test_a_rank_that_works_is_waited_for(other):
    assert hang({0: report(age=300), 1: other}) is None


def test_a_rank_that_works_does_not_excuse_one_that_hangs():
    found = hang({0: report(), 1: report(age=3), 2: report(place=IN_PYTHON)})
    assert found.ranks == [2]


def test_who_is_paused_waits_but_hears():
    paused = report(age=900, paused=True)
    assert hang({0: paused, 1: report(place=IN_PYTHON)}) is None
    assert hang({0: paused, 1: paused}, {1: 26}).ranks == [1]


def test_who_hears_nothing_of_the_host_with_the_store():
    silences = {0: 0.0, 1: 0.0}
    found = find_hang({1: report()}, silences, 1, TIMEOUT, cut_off_s=90)
    assert found.sentence.startswith(
        "Rank 1 (process 1 on host) hears nothing of the host of rank 0; rank 1 waits in all_reduce"
    )
    assert find_hang({1: report(age=99)}, silences, 1, TIMEOUT, cut_off_s=90) is None
    assert find_hang({1: report()}, silences, 1, TIMEOUT, cut_off_s=20) is None  # busy, not gone
    waits = {1: report(age=900, paused=True)}  # as for an export, of which it hears nothing either
    assert find_hang(waits, silences, 1, TIMEOUT, cut_off_s=99) is None
    assert find_hang(waits, silences, 1, TIMEOUT, cut_off_s=101) is not None


def test_a_store_that_does_not_answer_holds_up_nobody(gloo_group, tmp_path):
    """As one whose host is cut off; a question to it never ends."""
    watchdog, answers = Watchdog(0.4, tmp_path), threading.Event()
    started = time.monotonic()
    assert watchdog._ask(answers.wait) is None
    assert watchdog._ask(lambda: 1) is None  # the first question still waits
    assert time.monotonic() - started < 10
    answers.set()
    watchdog._asking.join()
    assert watchdog._ask(lambda: 1) == 1


GLOO = "[pair.cc:553] Connection closed by peer [10.0.0.2]:40000. This is typically caused by"


@pytest.mark.parametrize("speaks", [True, False])
def test_a_rank_that_loses_another_says_so(gloo_group, tmp_path, monkeypatch, capsys, speaks):
    monkeypatch.setattr(module, "end_process", sys.exit)
    said = tmp_path / "said"
    said.write_text("" if speaks else "spoken\n")
    monkeypatch.setenv("WMTP_SPOKEN_FILE", str(said))
    with pytest.raises(SystemExit) as exit, module.explain_lost_rank(tmp_path):
        raise RuntimeError(GLOO)
    assert exit.value.code == 1
    told = capsys.readouterr().err
    if not speaks:
        assert told == ""
        return
    assert "lost another rank, or its host (Connection closed by peer [10.0.0.2]), in " in told
    assert "resume_from_checkpoint=true continues from what was saved" in told
    assert told.count("\n") == 2
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == "lost"
    (tmp_path / "exit.json").write_text("hung")  # what the lost rank knew before it ended
    said.write_text("")
    with pytest.raises(SystemExit), module.explain_lost_rank(tmp_path):
        raise RuntimeError(GLOO)
    assert (tmp_path / "exit.json").read_text() == "hung"


def test_other_errors_keep_their_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), module.explain_lost_rank(tmp_path):
        raise RuntimeError("shapes do not fit")


def test_all_wait_for_each_other():
    other = report(place=Place("all_gather", "forward (model.py:3)"))
    found = hang({0: report(), 1: other, 2: report()})
    assert found.ranks == []
    assert found.sentence.startswith(
        "No rank makes progress; ranks 0, 2 wait in all_reduce, called by agreed (stopping.py:1); "
        "rank 1 waits in all_gather, called by forward (model.py:3); the run ends"
    )


def test_many_ranks_are_not_all_named():
    reports = {rank: report(place=IN_PYTHON if rank > 9 else IN_STEP) for rank in range(20)}
    found = hang(reports)
    assert found.ranks == list(range(10, 20))
    assert "rank 13 " in found.sentence
    assert "rank 14 " not in found.sentence
    assert "; 6 more; ranks 0, 1, 2, 3, 6 more wait in all_reduce" in found.sentence


# ------------------------------------------------------------------------ places


def place_in(function, *args) -> Place:
    """Where a thread is that waits in a function."""
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    time.sleep(0.2)
    return find_place(sys._current_frames()[thread.ident])


def test_place_in_python():
    done = threading.Event()
    place = place_in(done.wait, 5)
    done.set()
    assert place.collective is None
    assert place.line.startswith("wait (threading.py:")


# ---------------------------------------------------------------------- one rank


@pytest.fixture
def ends(gloo_group, monkeypatch) -> list:
    """What a watchdog would have ended this process with."""
    ends = []
    monkeypatch.setattr(Watchdog, "_end", lambda _, *hang_and_step: ends.append(hang_and_step))
    return ends


def test_main_thread_that_comes_no_further(ends, tmp_path):
    with Watchdog(0.4, tmp_path) as watchdog:
        watchdog.beat("step 5", 4)
        time.sleep(1.5)
    found, step = ends[0]
    assert (found.ranks, found.collective, step) == ([0], None, 4)
    assert "hangs: it came to step 5 0 seconds ago and is in " in found.sentence


def test_it_watches_each_block_and_nothing_between(ends, tmp_path):
    """With numbers that never come again: the other ranks take those for silence."""
    watchdog = Watchdog(0.4, tmp_path)
    with watchdog:
        time.sleep(0.1)
    first = next(watchdog._reports)
    time.sleep(1)
    assert ends == []
    with watchdog:
        time.sleep(1.5)
    assert ends[0][0].ranks == [0]
    assert next(watchdog._reports) > first + 1


@pytest.mark.parametrize("another_wrote", [False, True])
def test_what_the_first_rank_wrote_stays(gloo_group, tmp_path, monkeypatch, capsys, another_wrote):
    """It has the store, and heard of all; what an earlier run left is no reason to be silent."""
    file = tmp_path / "exit.json"
    file.write_text("an earlier run's")
    watchdog = Watchdog(1, tmp_path)
    if another_wrote:
        file.unlink()
        file.write_text("another rank's of this run")
    monkeypatch.setattr(module.os, "_exit", sys.exit)
    monkeypatch.setattr(watchdog, "_is_first", lambda: True)
    with pytest.raises(SystemExit):
        watchdog._end(module.Hang([1], None, "Rank 1 hangs"), 3)
    assert "Rank 1 hangs" in capsys.readouterr().err
    if another_wrote:
        assert file.read_text() == "another rank's of this run"
    else:
        assert json.loads(file.read_text())["reason"] == "hung"


def test_main_thread_that_comes_further(ends, tmp_path):
    with Watchdog(2, tmp_path) as watchdog:
        for _ in watchdog.beating(range(30), "validation"):
            time.sleep(0.1)
    assert ends == []


def test_main_thread_that_is_paused(ends, tmp_path):
    with Watchdog(1, tmp_path) as watchdog:
        with watchdog.paused():
            with watchdog.paused():  # as a save within what is paused
                pass
            time.sleep(2.5)
        time.sleep(0.3)  # the time-out begins anew
    assert ends == []


def test_job_that_was_stopped_as_a_whole_goes_on(ends, tmp_path, monkeypatch):
    """The clock goes on while a scheduler suspends a job; nobody hangs because of that."""
    with Watchdog(100, tmp_path) as watchdog:
        time.sleep(0.2)
        ahead = 1000

        def later(now=time.monotonic):
            return now() + ahead

        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=later))
        time.sleep(1.5)
        assert watchdog._beat[2] > 1000 + time.monotonic() - 10
    assert ends == []


def test_store_that_is_gone(ends, tmp_path, monkeypatch):
    """With its launcher; a rank then still tells of itself."""

    def gone(*_):
        raise dist.DistNetworkError("connection reset by peer")

    monkeypatch.setattr(Watchdog, "_publish", gone)
    with Watchdog(0.4, tmp_path):
        time.sleep(1.5)
    assert ends[0][0].ranks == [0]


def test_a_rank_that_has_left_is_none_that_hangs(ends, tmp_path):
    with Watchdog(100, tmp_path) as watchdog:
        time.sleep(0.2)
    left = watchdog._read(0)
    assert (left.number, left.paused) == (module.LEFT, True)
    watchdog._heard = {0: (module.LEFT, time.monotonic() - 1000)}
    assert watchdog._silences({0: left})[0] < 10


@pytest.mark.parametrize("timeout_s", [0, -1.5])
def test_time_out_that_is_no_time(gloo_group, tmp_path, timeout_s):
    with pytest.raises(ValueError, match=f"time-out of {timeout_s} seconds is over at once"):
        Watchdog(timeout_s, tmp_path)
