"""One process; two ranks that stop are in tests/distributed/test_signals.py."""

import json
import math
import os
import signal
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from wmtp_modules.parallel import process_group as distributed
from wmtp_modules.run import stopping
from wmtp_modules.run.stopping import Stopped, StopRequests, clear_exit, write_exit


@pytest.fixture(autouse=True)
def no_second_request(monkeypatch):
    """It would end the tests' process, as would a slow machine between two signals."""
    monkeypatch.setattr(stopping, "DEBOUNCE_S", 1000)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the module sees; only for requests that no thread listens for."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize("signum", stopping.SIGNALS)
def test_outside_of_training_a_signal_raises_at_once(signum):
    with StopRequests(), pytest.raises(Stopped) as stopped:
        signal.raise_signal(signum)
    assert (stopped.value.reason, stopped.value.step) == (signum.name, None)


def test_a_second_signal_does_not_disturb_the_way_out():
    with StopRequests():
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


def test_in_training_a_signal_waits_to_be_asked_for(gloo_group):
    def train() -> None:
        with stops.step_by_step():
            assert stops.agreed() is None
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)  # the first one counts
            raise Stopped(stops.agreed(), 3)

    with StopRequests() as stops, pytest.raises(Stopped) as stopped:
        train()
    assert (stopped.value.reason, stopped.value.step) == ("SIGUSR1", 3)


@pytest.mark.parametrize(("error", "wanted"), [(None, Stopped), (KeyError(), KeyError)])
def test_a_signal_after_the_last_step_is_not_lost(gloo_group, error, wanted):
    """And hides no error."""

    def train() -> None:
        with stops.step_by_step():
            signal.raise_signal(signal.SIGTERM)
            if error is not None:
                raise error

    with StopRequests() as stops, pytest.raises(wanted):
        train()


@pytest.mark.parametrize(("error", "barriers"), [(None, 1), (ValueError(), 1), (Stopped("x"), 0)])
def test_rank_zero_first_waits_for_nobody_when_it_stops(gloo_group, monkeypatch, error, barriers):
    """The others stop as well; after an error they run into the same one."""
    waits = []
    monkeypatch.setattr(distributed, "patient_barrier", lambda: waits.append(1))

    def first() -> None:
        with distributed.rank_zero_first():
            if error is not None:
                raise error

    with nullcontext() if error is None else pytest.raises(type(error)):
        first()
    assert len(waits) == barriers


def test_nothing_catches_it_as_a_failure():
    assert not issubclass(Stopped, Exception)


def test_handlers_are_put_back():
    before = [signal.getsignal(one) for one in stopping.SIGNALS]
    with StopRequests():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(one) for one in stopping.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_forked_child_is_ended_by_signals_as_ever(monkeypatch):
    """Pools end their processes with SIGTERM; that is no request to the run, let alone two."""
    monkeypatch.setattr(stopping, "DEBOUNCE_S", -1)  # any second signal would end this process
    with StopRequests() as stops:
        for _ in range(2):
            read, write = os.pipe()
            if (child := os.fork()) == 0:
                os.write(write, b"!")
                time.sleep(60)
                os._exit(0)
            os.read(read, 1)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.2)
        assert stops._heard is None


@pytest.mark.parametrize("hours", [0, -1, math.nan])
def test_max_hours_that_are_no_time(hours):
    with pytest.raises(ValueError, match=f"max_hours {hours} is over before it begins: give more"):
        StopRequests(hours)


def test_max_hours_leaves_time_for_a_step_and_a_save(gloo_group, clock):
    stops = StopRequests(1)  # ends at 4600
    with stops.step_by_step():  # a run before this one
        assert stops.agreed() is None
    clock.now = 4000  # what was set up until now was no step
    with stops.step_by_step():
        for clock.now in (4010, 4040, 4060):  # the longest step takes 30 s
            assert stops.agreed() is None
        stops.note_save(200)
        stops.note_save(100)
        clock.now = 4069
        assert stops.agreed() is None
        clock.now = 4369
        assert stops.agreed() == "max_hours"  # with the 300 s of the last step


def test_max_hours_to_the_second(gloo_group, clock):
    stops = StopRequests(1)
    with stops.step_by_step():
        for clock.now in (4300, 4400):
            assert stops.agreed() is None
        stops.note_save(99)
        clock.now = 4401
        assert stops.agreed() is None
        clock.now = 4401.5
        assert stops.agreed() == "max_hours"


def test_no_max_hours(gloo_group, clock):
    stops = StopRequests()
    with stops.step_by_step():
        for clock.now in (1e6, 1e9):
            assert stops.agreed() is None


def test_exit_file(tmp_path):
    write_exit(tmp_path / "run", "SIGTERM", 12, ranks=[3])
    file = tmp_path / "run" / "exit.json"
    assert json.loads(file.read_text()) == {"reason": "SIGTERM", "step": 12, "ranks": [3]}
    assert list(file.parent.iterdir()) == [file]
    for _ in range(2):
        clear_exit(tmp_path / "run")
        assert not file.exists()


def test_exit_file_is_whole_or_not_there(tmp_path, monkeypatch):
    write_exit(tmp_path, "SIGINT", 1)

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_exit(tmp_path, "SIGTERM", 2)
    assert json.loads((tmp_path / "exit.json").read_text()) == {"reason": "SIGINT", "step": 1}


def test_full_disk_does_not_keep_a_run_from_stopping(tmp_path, capsys):
    (tmp_path / "file").touch()
    StopRequests(output_dir=tmp_path / "file")._tell(Stopped("SIGTERM", 4))
    said = capsys.readouterr().err
    assert "Stopped by SIGTERM after step 4, which is saved: the same command with resume" in said
    assert "exit.json could not be written (" in said


def test_what_goes_on_is_said(tmp_path, capsys):
    """An evaluation has no resume_from_checkpoint: typed as told, it would be refused."""
    StopRequests(output_dir=tmp_path, again="the same command")._tell(Stopped("SIGINT"))
    assert "training: the same command continues from there\n" in capsys.readouterr().err
