"""One sentence at what a user can mend, said by one rank."""

import os
import re
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from wmtp_modules.catalog import recipes
from wmtp_modules.config.check import ConfigError
from wmtp_modules.files import alone_in
from wmtp_modules.run import start
from wmtp_modules.run.start import exit_with_message, launched_as


@pytest.fixture
def waited(monkeypatch):
    """Seconds that were waited, for nothing here waits."""
    waited = []
    clock = SimpleNamespace(sleep=waited.append, monotonic=time.monotonic)
    monkeypatch.setattr(start, "time", clock)  # not of other threads
    start._store.cache_clear()
    yield waited
    start._store.cache_clear()


@pytest.fixture
def launcher(monkeypatch):
    """The store of a torchrun with two workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    return store


def leave(error, rank, monkeypatch):
    """What the process says at its end, or its exit code."""
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as left, exit_with_message(ValueError):
        raise error
    return left.value.code


def test_rank_0_speaks_at_once_and_tells_the_others(launcher, waited, monkeypatch):
    error = ConfigError("seed: missing")
    assert leave(error, 0, monkeypatch) == "ConfigError: seed: missing"
    assert launcher.check([start.FAILED])
    assert waited == []


def test_another_rank_is_silent_where_rank_0_speaks(launcher, waited, monkeypatch):
    """However much later rank 0 fails; and it waits, as torchrun kills all when one has ended."""

    def fail_late(seconds):
        waited.append(seconds)
        if len(waited) == 100:
            launcher.set(start.FAILED, "1")

    monkeypatch.setattr(start.time, "sleep", fail_late)
    assert leave(ValueError("no GPU here"), 1, monkeypatch) == 1
    assert len(waited) >= 101  # a store tells a little later what it was told
    assert waited[-1] == start.PATIENCE


def test_the_first_rank_of_another_host_says_it_there(launcher, waited, monkeypatch):
    """Rank 0's sentence is on another screen, and this launcher would show a traceback."""
    launcher.set(start.FAILED, "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert leave(ConfigError("seed: missing"), 1, monkeypatch) == "ConfigError: seed: missing"
    assert waited == []


def test_another_rank_speaks_where_rank_0_goes_on(launcher, waited, monkeypatch):
    launcher.set(start.JOINING, "1")
    said = leave(ValueError("no GPU here"), 1, monkeypatch)
    assert said == "rank 1: ValueError: no GPU here"
    assert waited == []


def test_without_torchrun_a_rank_speaks_unless_it_is_ended(waited, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    said = leave(ValueError("no GPU here"), 3, monkeypatch)
    assert (said, waited) == ("rank 3: ValueError: no GPU here", [start.PATIENCE])


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError), exit_with_message(ValueError, OSError):
        raise KeyError("a bug")


# ------------------------------------------------------------------ two runs of one folder


def test_a_second_run_of_one_folder_names_the_first(tmp_path, children, capfd):
    """At once and before it touches anything; after kill -9 the same command just starts."""
    cfg = OmegaConf.create({"output_dir": str(tmp_path / "run"), "device": "cpu"})

    def hold():  # as rank 0 does, but without torch, which does not survive a fork
        with alone_in(tmp_path / "run", wait=False):
            (tmp_path / "ready").touch()
            time.sleep(60)

    first = children.begin(hold)
    end = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    told = rf"run is in use by pid {first} on {re.escape(socket.gethostname())} since .*: wait"
    with pytest.raises(SystemExit, match=told), start.process_group(cfg):
        pass
    assert not dist.is_initialized()
    with start.process_group(OmegaConf.merge(cfg, {"replay": "bad_step"})):  # writes nothing
        pass
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    os.kill(first, signal.SIGKILL)
    assert children.ends(first) == [-signal.SIGKILL]
    with start.process_group(cfg):
        pass


def test_only_rank_0_takes_the_folder(tmp_path, monkeypatch, children, capfd):
    cfg = OmegaConf.create({"output_dir": str(tmp_path / "run"), "device": "nowhere"})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(start, "_rank_zero_speaks", lambda: False)
    with alone_in(tmp_path / "run", wait=False):  # by rank 0 of the same run
        rank_1 = children.begin(lambda: start.process_group(cfg).__enter__())
        assert children.ends(rank_1) == [1]
    told = "rank 1: ValueError: device 'nowhere' is not cuda or cpu"  # what comes next
    assert told in capfd.readouterr().err


@pytest.mark.parametrize(
    ("script", "world", "local", "said"),
    [
        ("recipes/x.py", None, None, "tune run --nproc_per_node 1 recipes/x.py"),
        ("{here}/recipes/my x.py", 8, 8, "tune run --nproc_per_node 8 'recipes/my x.py'"),
        ("/elsewhere/x.py", 16, 8, "tune run --nnodes 2 --nproc_per_node 8 /elsewhere/x.py"),
        (str(recipes()["eval_mtp"]), None, None, "tune run --nproc_per_node 1 eval_mtp"),
    ],
)
def test_how_a_run_was_started(monkeypatch, tmp_path, script, world, local, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [script.format(here=tmp_path), "--config", "c.yaml"])
    for name, value in (("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", local)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, str(value))
    assert launched_as() == said
