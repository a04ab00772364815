"""Folders and files that appear under their names whole or not at all; JSON and hashes of files.

Who writes holds a lock, so that two processes never mix what they write.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from wmtp_modules.config.secrets import hidden

log = logging.getLogger(__name__)


class InUseError(OSError):
    """Another process writes in the same place."""


# Lock files that this process holds: descriptor, and the thread that asked for it.
_held: dict[str, tuple[int, int]] = {}
# Where nothing can be locked. The first four: no locks there; the others: nobody may write there.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
UNLOCKABLE = (*NO_LOCKS, errno.EROFS, errno.EACCES, errno.EPERM)
POLL_S = 0.05


def _forget_in_child() -> None:
    """A forked child, such as a loader's worker, must not keep what its dead parent had locked."""
    for fd, _ in _held.values():
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def alone_in(
    folder: str | Path, *, wait: bool, beat: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Be the only one that writes in a folder, which is made if it is missing.

    ``fcntl.flock`` on ``folder/.lock``: the kernel frees it when this process ends, however it
    ends, so a file that is left means nothing. A thread that is alone in a folder may say so
    again. On NFS it holds between machines; where a file system has no locks a warning says so.

    Args:
        folder: to write in.
        wait: for another process, which a line names, or refuse at once.
        beat: called again and again while it waits.

    Raises:
        InUseError: if another process is at work there and ``wait`` is False; names it.
    """
    folder = Path(folder).absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # the deepest first
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder / ".lock", folder, wait=wait, beat=beat):
            yield
    finally:
        with suppress(OSError):  # one has got files
            for path in made:
                path.rmdir()


def only_writer(path: str | Path) -> AbstractContextManager[bool]:
    """Be the only one that makes a file or folder anew; waits for others, as ``alone_in`` does.

    The lock is a file beside it, whose folder is made. Gives False if the file system has no locks.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return _locked(path.with_name(f".{path.name}.lock"), path)


@contextmanager
def _locked(
    file: Path, what: Path, *, wait: bool = True, beat: Callable[[], object] = lambda: None
) -> Iterator[bool]:
    key, thread, fd, told = os.path.realpath(file), threading.get_ident(), None, None
    if _held.get(key, (None, None))[1] == thread:
        yield True
        return
    try:
        while (fd := _try_lock(file)) is None:
            other = _holder(file)
            if not wait:
                raise InUseError(
                    f"{what} is in use by {other}: wait until it has ended, or take another folder"
                )
            if other != told:
                log.warning("Waiting for %s, which is writing %s", other, what)
                told = other
            beat()
            time.sleep(POLL_S)
    except OSError as error:
        if error.errno not in UNLOCKABLE:
            raise
        if error.errno in NO_LOCKS:
            log.warning("%s lies where files cannot be locked: let one process write it", what)
    if fd is None:
        yield False
        return
    _held[key] = fd, thread
    try:
        with suppress(OSError):  # a full disk: only the name of this process is missing
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(_own_name()).encode(), 0)
        yield True
    finally:
        if _held.pop(key, None):  # not in a child that was forked meanwhile
            with suppress(OSError):
                file.unlink()  # before it is free: who waits sees that it has to make another
            os.close(fd)


def _try_lock(file: Path) -> int | None:
    """The descriptor of a lock file that is ours, None if it is another's."""
    while True:
        try:
            fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's
            fd = os.open(file, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(file)):
                return fd
        except FileNotFoundError:  # its holder has just removed it
            pass
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError:
            os.close(fd)
            raise
        os.close(fd)


def _own_name() -> dict:
    command = hidden(shlex.join(sys.argv))
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    own = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    return own | {"command": command if len(command) <= 200 else f"{command[:200]}..."}


def _holder(file: Path) -> str:
    for _ in range(10):
        with suppress(OSError, ValueError, KeyError, TypeError):  # it has not written it yet
            own = json.loads(file.read_text("utf-8"))
            return f"pid {own['pid']} on {own['host']} since {own['since']} ({own['command']})"
        time.sleep(0.01)
    return "another process"


@contextmanager
def new_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """Fill a folder beside ``folder`` that takes its name, and its place, when all is on the disk.

    Until then what is under the name stays as it is, also if the block raises or the process is
    killed; a half-filled folder is removed. One writer waits for the other.

    Args:
        folder: its name.
        replace: whether it may take the place of files; else it must be what is there already.

    Raises:
        OSError: if the disk is full or fails; names the folder.
        ValueError: if another process has made something else there and ``replace`` is False.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with only_writer(folder) as is_locked:
            recover_folder(folder)
            if is_locked:
                _remove_leftovers(folder)
            partial, olds = _beside(folder, "partial"), []
            partial.mkdir()
            try:
                yield partial
                for path in (*partial.rglob("*"), partial):
                    sync(path)
                if not replace and folder.exists() and any(folder.iterdir()):
                    if _hashes(partial) != _hashes(folder):
                        raise ValueError(
                            f"another process has meanwhile made something else in {folder}, which "
                            "stays: give another folder"
                        )
                    return
                while partial.exists():
                    if folder.exists():
                        olds.append(_beside(folder, "old"))
                        folder.rename(olds[-1])
                    try:
                        partial.rename(folder)
                    except OSError as error:  # a reader has just put the old one back
                        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                            raise
                sync(folder.parent)
            finally:
                for path in (partial, *olds) if folder.exists() else (partial,):
                    shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise _unwritten(folder, error) from error


def recover_folder(folder: str | Path) -> None:
    """Put back what ``new_folder`` had moved aside when it was killed before the new one came.

    Safe while another process writes the folder.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        return
    olds = [path for path in _leftovers(folder) if "old" in path.name.removeprefix(folder.name)]
    for old in sorted(olds, key=lambda path: path.lstat().st_ctime_ns)[-1:]:
        with suppress(OSError):  # another rank, or the writer, was faster
            old.rename(folder)


def _beside(path: Path, kind: str) -> Path:
    """A name of this process's own on the same file system, for what is not complete or replaced.

    One that another process cannot take, on whatever machine.
    """
    return path.with_name(f"{path.name}.{kind}-{os.getpid()}-{os.urandom(4).hex()}")


def _leftovers(path: Path) -> list[Path]:
    """What processes have left beside a file or folder, of earlier versions as well."""
    pattern = re.compile(re.escape(path.name) + r"\.(partial|old|tmp)(-\d+-[0-9a-f]{8})?")
    with suppress(FileNotFoundError):
        return [one for one in path.parent.iterdir() if pattern.fullmatch(one.name)]
    return []


def _remove_leftovers(path: Path) -> None:
    """Only for who holds the lock: then nobody else is at work on them."""
    for one in _leftovers(path):
        if one.is_dir():
            shutil.rmtree(one, ignore_errors=True)
        else:
            with suppress(OSError):
                one.unlink()


def _hashes(folder: Path) -> dict[Path, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): file_hash(path) for path in files}


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise what torch and safetensors make of a full disk as the OSError that it was.

    torch raises RuntimeError ("unexpected pos") while it handles the OSError of the file below:
    give it an open file, as of a path it keeps no reason. safetensors' error ends in the number.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number:
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file beside ``path`` that takes its name when on the disk; OSError names it.

    One writer waits for the other.
    """
    try:
        with only_writer(path) as is_locked:
            if is_locked:
                _remove_leftovers(path)
            unfinished = _beside(path, "tmp")
            try:
                with disk_errors():
                    yield unfinished
                sync(unfinished)
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
            sync(path.parent)
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"{path} could not be written ({error.strerror or error}); what was there before is "
        "untouched: make room and start the same command again",
    )


def file_hash(path: Path) -> str:
    """sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """The object in a JSON file, which may begin with a byte order mark.

    Raises:
        ValueError: if the file holds anything else, gives a key two values, or is damaged.
    """
    try:
        content = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_without_contradiction)
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        found = stand_in(path)
        if found:
            raise ValueError(f"{path} is {found}") from error
        raise ValueError(f"{path} is not valid JSON, copy it again: {json_fault(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def _without_contradiction(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    for key, value in pairs:
        if value is not content[key] and value != content[key]:  # NaN is unequal to itself
            raise ValueError(f"the key {key!r} stands there twice, with different values")
    return content


def json_fault(error: Exception) -> str:
    """What ``json.loads`` ran into, without Python's names for it."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)


def stand_in(path: Path) -> str | None:
    """What lies at a path in place of the file that belongs there, with the way out, or None.

    Completes "{path} is ...": a folder, a link to nothing, a pointer (``pointer_in``), or the page
    that a server sends in place of a file.
    """
    if path.is_symlink() and not path.exists():
        target = os.readlink(path)
        way_out = "git annex get" if ".git/annex/" in target else None
        return f"a link to {target}, which is not there: " + (
            f"run `{way_out} {path.name}` in its folder" if way_out else "copy the file itself"
        )
    if path.is_dir():
        return "a folder: give the file that belongs there"
    with path.open("rb") as file:
        head = file.read(1024)
    if _PAGE.match(head):
        return "a web page or a server's answer, not the file itself: download it again"
    return pointer_in(head)


def pointer_in(head: bytes) -> str | None:
    """What a file is, by its first bytes, if it only names content that git keeps elsewhere."""
    if re.match(rb"version https://(git-lfs|hawser)\.github\.com/spec/|# xet version", head):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
    if re.match(rb"(\.\./)*(\.git)?/annex/objects/", head):
        return "a git-annex pointer, not the file itself: run `git annex get` in its folder"
    return None


# The second line: what huggingface.co answers, in plain text, where there is no file or no access.
_PAGE = re.compile(
    rb"(\xef\xbb\xbf)?\s*<(!doctype html|html)\b"
    rb"|(Entry|Repository) not found|Invalid username or password|Access to \w+ \S+ is restricted",
    re.IGNORECASE,
)


def sync_command(run_dir: Path) -> str:
    """What sends the rest of a run's folder to MLflow and its store."""
    return f"python -m wmtp_modules.sync {shlex.quote(str(run_dir))}"
