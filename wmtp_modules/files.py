"""Folders and files that appear under their names whole or not at all; JSON and hashes of files."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder beside ``folder`` that takes its name, and its place, when all is on the disk.

    Until then what is under the name stays as it is, also if the block raises or the process is
    killed; a half-filled folder is removed.

    Raises:
        OSError: if the disk is full or fails; names the folder.
    """
    folder = folder.absolute()
    recover_folder(folder)
    partial, old = _beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        shutil.rmtree(old, ignore_errors=True)
        while partial.exists():
            if folder.exists():
                folder.rename(old)
            try:
                partial.rename(folder)
            except OSError as error:  # a reader has just put the old one back
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise _unwritten(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def recover_folder(folder: str | Path) -> None:
    """Put back what ``new_folder`` had moved aside when it was killed before the new one came.

    Safe while another process writes the folder.
    """
    folder = Path(folder).absolute()
    _, old = _beside(folder)
    if old.is_dir() and not folder.exists():
        with suppress(OSError):  # another rank, or the writer, was faster
            old.rename(folder)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where a new folder is filled, and where the old one waits while they change places."""
    return folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")


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
    """Write a file beside ``path`` that takes its name when on the disk; OSError names it."""
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with disk_errors():
            yield unfinished
        sync(unfinished)
        unfinished.replace(path)
        sync(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
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
