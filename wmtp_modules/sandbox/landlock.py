"""Landlock: limits irrevocably what this process and its children may open."""

import ctypes
import os
import stat

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # equal on every architecture
VERSION_FLAG = 1
PATH_BENEATH = 1
NO_NEW_PRIVS = 38
OLDEST = 2  # Linux 5.19: the first version that allows moving a folder out of another one

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = (1 << bit for bit in range(4))
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
READ = EXECUTE | READ_FILE | READ_DIR
# Create, move and remove files, folders and symbolic links; no device, socket or named pipe.
WRITE = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | sum(1 << bit for bit in (4, 5, 7, 8, 12, 13))
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
FILE_RIGHTS = {2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}  # by version; later: 16 bits
TCP = 0b11  # bind and connect, since version 4
OTHERS = 0b11  # abstract unix sockets and signals to processes outside, since version 6


class _Ruleset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("files", "network", "scoped")]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(*arguments) -> int:
    result = _libc.syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def version() -> int:
    """The version of the kernel's Landlock; 0 if there is none."""
    try:
        return _call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION_FLAG))
    except OSError:
        return 0


def restrict(readable: list[str], writable: list[str]) -> None:
    """Restrict this process to reading some files and folders and writing to others.

    Readable paths may also be executed; writable ones may be read, and may be devices.

    Raises:
        OSError: if the kernel refuses.
    """
    number = version()
    handled = FILE_RIGHTS.get(number, (1 << 16) - 1)
    attributes = _Ruleset(handled, TCP if number >= 4 else 0, OTHERS if number >= 6 else 0)
    size = 24 if number >= 6 else 16 if number >= 4 else 8
    ruleset = _call(
        CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0)
    )
    for paths, rights in ((readable, READ), (writable, WRITE)):
        for path in paths:
            parent = os.open(path, os.O_PATH)
            of_this = -1 if stat.S_ISDIR(os.fstat(parent).st_mode) else OF_FILES
            rule = _PathBeneath(rights & handled & of_this, parent)
            _call(ADD_RULE, ruleset, PATH_BENEATH, ctypes.byref(rule), ctypes.c_uint32(0))
            os.close(parent)
    if _libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _call(RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)
