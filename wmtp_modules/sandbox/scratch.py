"""Measures and empties the folder that a program may write to.

The program is hostile: links are never followed, a folder may be unreadable, and a path may be
longer than the kernel accepts. Also runs inside the sandbox, so it uses only the standard library.
"""

import contextlib
import errno
import os

MOST_BYTES = 128 << 20
MOST_FILES = 2_000
FEW_FILES = 100
MOST_DEPTH = 500  # folders in folders: looking into them takes the square of it


def empty(folder: int) -> None:
    """Empty an open folder; no program that could change it is alive.

    The folders inside a subfolder are moved to the outermost folder before it is removed, so no
    path has more than two names, however deep they are nested.
    """
    moved = 0
    while names := os.listdir(folder):
        for name in names:
            if _unlink(name, folder):
                continue
            os.chmod(name, 0o700, dir_fd=folder)  # a real folder, or unlink would have removed it
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            try:
                for entry in os.listdir(inner):
                    if not _unlink(entry, inner):
                        os.chmod(entry, 0o700, dir_fd=inner)
                        moved += 1
                        os.rename(
                            entry, f".moved-{os.getpid()}-{moved}-{os.urandom(4).hex()}",
                            src_dir_fd=inner, dst_dir_fd=folder,
                        )  # fmt: skip
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=folder)


def _unlink(name: str, folder: int) -> bool:
    """Remove a file or link; False if it is a folder."""
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        return False
    return True


def overfull(folder: str, most_files: int = MOST_FILES) -> bool:
    """Whether a folder holds more than a program may write, even while the program changes it."""
    space = os.statvfs(folder)
    if space.f_blocks * space.f_frsize <= MOST_BYTES:  # its own sized tmpfs does the counting
        return space.f_files - space.f_ffree > most_files or space.f_bavail == 0
    size = files = 0
    pending = [(folder, 0)]
    while pending:
        path, depth = pending.pop()
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    files += 1
                    with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if files > most_files or size > MOST_BYTES or depth > MOST_DEPTH:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        pending.append((entry.path, depth + 1))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):  # these: removed meanwhile
                return True  # too deep to look into, or unreadable
    return False
