"""What has a name is whole: after a full disk, a kill at any moment, and beside a reader."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from wmtp_modules import files as disk
from wmtp_modules.files import disk_errors, new_file, new_folder, recover_folder


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
    inside = ["best.partial/a", "best.partial/sub", "best.partial/sub/b"]
    assert sorted(before) == ["best.partial", *inside]
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
        if target.name == "best.old" and not interrupted:
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
