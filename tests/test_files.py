"""What has a name is whole: after a full disk, a kill at any moment, and beside a reader."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from wmtp_modules import files as disk
from wmtp_modules.files import (
    InUseError,
    alone_in,
    disk_errors,
    new_file,
    new_folder,
    only_writer,
    recover_folder,
)


def fill(folder: Path, content: str) -> None:
    with new_folder(folder) as partial:
        (partial / "a").write_text(content)
        (partial / "sub").mkdir()
        (partial / "sub" / "b").write_text(content)


def write_half(place, error: Exception) -> None:
    """Begin to write, and run into an error."""
    with place as partial:
        (partial / "a" if partial.is_dir() else partial).write_text("two")
        raise error


def contents(folder: Path) -> set[str]:
    return {file.read_text() for file in (folder / "a", folder / "sub" / "b")}


def test_a_folder_takes_the_place_of_an_earlier_one(tmp_path):
    for content in ("one", "two"):
        fill(tmp_path / "best", content)
        assert contents(tmp_path / "best") == {content}
        assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_block_that_raises_leaves_the_earlier_one(tmp_path):
    fill(tmp_path / "best", "one")
    with pytest.raises(KeyError):
        write_half(new_folder(tmp_path / "best"), KeyError())
    assert contents(tmp_path / "best") == {"one"}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Every file and folder is synced before the rename, and the folder's name after it."""
    done = []
    monkeypatch.setattr(disk, "sync", lambda path: done.append(str(path.relative_to(tmp_path))))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda a, b: (done.append("rename"), rename(a, b))[1])
    fill(tmp_path / "best", "one")
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    partial = before[-1]
    assert partial.startswith("best.partial-")
    assert sorted(before) == [partial, f"{partial}/a", f"{partial}/sub", f"{partial}/sub/b"]
    assert after == ["."]


WRITER = """
    import os, sys, signal
    from pathlib import Path
    from wmtp_modules import files as disk
    calls, killed_at = 0, int(sys.argv[2])
    def counted(function):
        def call(*args, **kwargs):
            global calls
            calls += 1
            if calls == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    Path.rename, disk.sync = counted(Path.rename), counted(disk.sync)
    disk.shutil.rmtree = counted(disk.shutil.rmtree)
    with disk.new_folder(Path(sys.argv[1])) as partial:
        for name in ("a", "b"):
            (partial / name).write_text("two")
    print(calls)
"""


@pytest.mark.slow
def test_killed_at_any_call_a_whole_folder_is_found(tmp_path):
    """Killed before each rename, sync and removal: a reader finds one of the two, whole."""
    found, killed_at = [], 0
    while True:
        killed_at += 1
        folder = tmp_path / str(killed_at) / "best"
        with new_folder(folder) as partial:
            for name in ("a", "b"):
                (partial / name).write_text("one")
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), str(killed_at)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        recover_folder(folder)
        (content,) = {(folder / name).read_text() for name in ("a", "b")}
        found.append(content)
        with new_folder(folder) as partial:  # and the next one cleans up
            (partial / "a").write_text("three")
        assert [path.name for path in folder.parent.iterdir()] == ["best"]
        if done.returncode == 0:
            break
    assert found[0] == "one"
    assert found[-1] == "two"
    assert len(found) > 8


def test_a_reader_that_puts_the_old_one_back_does_not_stop_the_writer(tmp_path, monkeypatch):
    fill(tmp_path / "best", "one")
    rename, interrupted = Path.rename, []

    def slow_rename(source, target):
        result = rename(source, target)
        if target.name.startswith("best.old-") and not interrupted:
            interrupted.append(True)
            recover_folder(tmp_path / "best")
            assert contents(tmp_path / "best") == {"one"}
        return result

    monkeypatch.setattr(Path, "rename", slow_rename)
    fill(tmp_path / "best", "two")
    assert interrupted
    assert contents(tmp_path / "best") == {"two"}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_recovering_leaves_what_is_whole(tmp_path):
    recover_folder(tmp_path / "never_written")
    fill(tmp_path / "best", "new")
    shutil.copytree(tmp_path / "best", tmp_path / "best.old")
    (tmp_path / "best.old" / "a").write_text("old")
    recover_folder(tmp_path / "best")
    assert contents(tmp_path / "best") == {"new"}


# ------------------------------------------------------------------------------ full disk

FULL = OSError(errno.ENOSPC, "No space left on device")


class FullFile:
    """A file on a disk that takes some bytes and no more."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise FULL
        return len(data)

    def flush(self) -> None: ...


@pytest.mark.parametrize("room", [0, 700, 5000])
def test_what_torch_makes_of_a_full_disk_is_told_as_one(room):
    with pytest.raises(OSError, match="No space left on device") as caught, disk_errors():
        torch.save({"a": torch.randn(4000)}, FullFile(room))
    assert caught.value.errno == errno.ENOSPC


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="CUDA"), disk_errors():
        raise RuntimeError("CUDA error")


def test_a_full_disk_is_one_sentence_and_costs_nothing(tmp_path):
    fill(tmp_path / "best", "one")
    told = r"best could not be written \(No space left on device\); what was there before is unto"
    with pytest.raises(OSError, match=told) as caught:
        write_half(new_folder(tmp_path / "best"), FULL)
    assert caught.value.errno == errno.ENOSPC
    assert contents(tmp_path / "best") == {"one"}
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(OSError, match=r"state.json could not be written \(No space left"):
        write_half(new_file(tmp_path / "state.json"), FULL)
    assert json.loads((tmp_path / "state.json").read_text()) == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "state.json"]


SMALL_FILES = """
    import resource, signal, sys, torch
    from pathlib import Path
    from safetensors.torch import save_file
    from wmtp_modules.files import disk_errors
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    state = {"a": torch.zeros(100_000)}
    for save, target in ((torch.save, open(sys.argv[1], "wb")), (save_file, sys.argv[1])):
        try:
            with disk_errors():
                save(state, target)
        except OSError as error:
            print(error.errno)
"""


@pytest.mark.slow
def test_real_writes_that_fail_give_their_number(tmp_path):
    """A limit on the size of files stands for the full disk."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SMALL_FILES), str(tmp_path / "x")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == [str(errno.EFBIG)] * 2, done.stdout + done.stderr


# ------------------------------------------------------------------------------ two writers


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def write_four(folder: Path, content: str) -> None:
    with new_folder(folder) as partial:
        for name in "abcd":
            (partial / name).write_text(content)
            time.sleep(0.001)


def write_slowly(path: Path, content: str) -> None:
    with new_file(path) as unfinished, unfinished.open("w") as file:
        for _ in range(4):
            file.write(content)
            file.flush()
            time.sleep(0.001)


def test_two_writers_of_a_folder_never_mix_it(tmp_path, children):
    for trial in range(10):
        folder = tmp_path / str(trial) / "best"
        folder.parent.mkdir()
        assert children.ends(
            *(children.begin(write_four, folder, content) for content in ("one", "two"))
        ) == [0, 0]
        assert sorted(path.name for path in folder.iterdir()) == list("abcd")
        assert len({path.read_text() for path in folder.iterdir()}) == 1, trial
        assert os.listdir(folder.parent) == ["best"]


def test_two_writers_of_a_file_never_mix_it(tmp_path, children):
    for trial in range(10):
        path = tmp_path / str(trial) / "state.json"
        path.parent.mkdir()
        assert children.ends(
            *(children.begin(write_slowly, path, content) for content in "12")
        ) == [0, 0]
        assert path.read_text() in ("1111", "2222"), trial
        assert os.listdir(path.parent) == ["state.json"]


def test_threads_of_one_process_are_two_writers(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(write_four, tmp_path / "best", str(i)) for i in range(12)]
        assert [job.result() for job in jobs] == [None] * 12
    assert len({path.read_text() for path in (tmp_path / "best").iterdir()}) == 1
    assert os.listdir(tmp_path) == ["best"]


def write_and_hang(children, folder: Path) -> None:
    with new_folder(folder) as partial:
        (partial / "half").touch()
        worker = children.begin(time.sleep, 60)  # of its own, which outlives it
        (folder.parent / "ready").symlink_to(str(worker))
        time.sleep(60)


def test_a_living_writer_is_waited_for_and_a_killed_ones_half_is_removed(tmp_path, capfd, children):
    folder = tmp_path / "best"
    fill(folder, "one")
    first = children.begin(write_and_hang, children, folder)
    wait_for((tmp_path / "ready").is_symlink)
    second = children.begin(fill, folder, "two")
    told = ""
    while f"Waiting for pid {first} on {socket.gethostname()}" not in told:
        told += capfd.readouterr().err
        assert os.waitpid(second, os.WNOHANG) == (0, 0)
    assert list(tmp_path.glob("best.partial*/half"))
    assert contents(folder) == {"one"}
    os.kill(first, signal.SIGKILL)
    assert children.ends(first, second) == [-signal.SIGKILL, 0]
    assert contents(folder) == {"two"}
    assert sorted(os.listdir(tmp_path)) == ["best", "ready"]
    os.kill(int(os.readlink(tmp_path / "ready")), signal.SIGKILL)


def test_leftovers_of_earlier_versions_go_and_other_names_stay(tmp_path):
    for name in ("best.partial", "best.old", "best.partial-7-0123abcd", "best.partial_mine"):
        (tmp_path / name).mkdir()
    for name in ("s.json.tmp", "s.json.tmp-7-0123abcd", "s.json.bak"):
        (tmp_path / name).touch()
    fill(tmp_path / "best", "one")
    with new_file(tmp_path / "s.json") as unfinished:
        unfinished.touch()
    assert sorted(os.listdir(tmp_path)) == ["best", "best.partial_mine", "s.json", "s.json.bak"]


def test_who_is_alone_in_a_folder_is_named(tmp_path, children):
    """By another process, and by itself it may be asked for again."""
    with alone_in(tmp_path / "run" / "x", wait=False), alone_in(tmp_path / "run" / "x", wait=False):
        pass
    assert not (tmp_path / "run").exists()

    def hold() -> None:
        with alone_in(tmp_path / "run", wait=False):
            (tmp_path / "run" / "worker").symlink_to(str(children.begin(time.sleep, 60)))
            time.sleep(60)

    holder = children.begin(hold)
    wait_for((tmp_path / "run" / "worker").is_symlink)
    told = rf"run is in use by pid {holder} on {re.escape(socket.gethostname())} since 2"
    with pytest.raises(InUseError, match=told), alone_in(tmp_path / "run", wait=False):
        pass
    os.kill(holder, signal.SIGKILL)
    assert children.ends(holder) == [-signal.SIGKILL]
    with alone_in(tmp_path / "run", wait=False):  # though its worker lives
        pass
    assert os.listdir(tmp_path / "run") == ["worker"]
    os.kill(int(os.readlink(tmp_path / "run" / "worker")), signal.SIGKILL)


def test_the_lock_file_keeps_no_password(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tune", "uri=https://me:open-sesame@host/db"])
    with alone_in(tmp_path, wait=False):
        told = (tmp_path / ".lock").read_text()
    assert "uri=https://***@host/db" in told
    assert "sesame" not in told


def test_where_nothing_can_be_locked_it_is_said(tmp_path, monkeypatch, caplog):
    def no_locks(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", no_locks)
    (tmp_path / "best.partial-7-0123abcd").mkdir()  # it may be of a living process
    fill(tmp_path / "best", "one")
    assert contents(tmp_path / "best") == {"one"}
    assert "files cannot be locked" in caplog.text
    assert (tmp_path / "best.partial-7-0123abcd").exists()


def test_a_folder_may_lie_where_nothing_is_yet(tmp_path):
    """Such as a config's assets_dir, or the benchmarks'."""
    with only_writer(tmp_path / "a" / "b" / "new") as is_locked:
        assert is_locked
        assert [one.name for one in (tmp_path / "a" / "b").iterdir()] == [".new.lock"]


def test_what_another_process_made_of_the_same_is_left(tmp_path):
    for _ in range(2):
        with new_folder(tmp_path / "hf", replace=False) as partial:
            (partial / "a").write_text("one")
    told = "made something else in .*hf, which stays: give another folder"
    with pytest.raises(ValueError, match=told), new_folder(tmp_path / "hf", replace=False) as half:
        (half / "a").write_text("two")
    assert (tmp_path / "hf" / "a").read_text() == "one"
    assert os.listdir(tmp_path) == ["hf"]


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        fill(tmp_path / "best", "one")
        with new_file(tmp_path / "state.json") as unfinished:
            unfinished.write_text("{}")
    finally:
        os.umask(before)
    modes = [tmp_path / "best", tmp_path / "best" / "a", tmp_path / "state.json"]
    assert [oct(path.stat().st_mode)[-3:] for path in modes] == ["750", "640", "640"]
