"""The system calls that a program may make, as a filter that libseccomp compiles once.

Other calls fail with ENOSYS, as on an old kernel, which C libraries can handle. A program is one
process with threads: it cannot start another process, signal any process but itself, open sockets
other than its own pairs, or change the mode, owner or time of a file, which Landlock alone would
allow.
"""

import ctypes
import errno
import json
import os
import struct
from itertools import chain
from pathlib import Path

PROCESS_ID = 0x5AFE1D5E  # stands in the filter for the program's own process id until it is known

ALLOW = 0x7FFF0000
ERRNO = 0x00050000
NOT_EQUAL, EQUAL, MASKED_EQUAL = 1, 4, 7  # enum scmp_compare
OPTIMIZE = 8  # enum scmp_filter_attr: 2 makes a tree of what else is a list of 200 comparisons

CLONE_THREAD = 0x00010000
AF_UNIX, SOCK_STREAM, SOCKET_TYPE = 1, 1, 0xF
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FION* FIOCLEX
PRCTLS = (15, 16)  # PR_SET_NAME, PR_GET_NAME
SOCKET_OPTIONS = (3, 4, 38, 39)  # type, error, protocol, domain; not a pidfd of the peer
# Duplicates, flags, locks, sizes; not F_SETOWN or F_SETSIG, which send signals to any process.
FCNTLS = (*range(0, 8), 12, 13, 14, 36, 37, 38, 1030, 1032, 1034)

# Names by what becomes of a call: "pretended" ones do nothing, "refused" ones fail with an error.
CALLS = json.loads(Path(__file__).with_suffix(".json").read_text())


class _Comparison(ctypes.Structure):
    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    ]


def build_filter() -> bytes:
    """The filter in the kernel's format, with ``PROCESS_ID`` in place of the program's.

    Raises:
        OSError: if libseccomp is not installed or refuses a rule.
    """
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError:
        raise OSError("libseccomp.so.2 is missing: install libseccomp2 (or libseccomp)") from None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_rule_add_array.argtypes = (
        *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint),
        ctypes.POINTER(_Comparison),
    )
    library.seccomp_attr_set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32)
    library.seccomp_export_bpf.argtypes = (ctypes.c_void_p, ctypes.c_int)
    library.seccomp_release.argtypes = (ctypes.c_void_p,)
    context = library.seccomp_init(ERRNO | errno.ENOSYS)
    if not context:
        raise OSError("libseccomp does not support this machine")

    def rule(action: int, name: str, *comparisons: tuple) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            return  # this architecture, or this libseccomp, has no such call: ENOSYS
        array = (_Comparison * len(comparisons))(*[_Comparison(*c) for c in comparisons])
        failed = library.seccomp_rule_add_array(context, action, number, len(array), array)
        if failed:
            raise OSError(f"libseccomp refuses a rule for {name}: {os.strerror(-failed)}")

    try:
        library.seccomp_attr_set(context, OPTIMIZE, 2)  # libseccomp before 2.5 goes without
        for name in chain(*CALLS["allowed"].values()):
            rule(ALLOW, name)
        for name in CALLS["pretended"]:
            rule(ERRNO, name)  # "error 0": shutil.copy works, and nothing changes
        for code, names in CALLS["refused"].items():
            for name in names:
                rule(ERRNO | getattr(errno, code), name)
        rule(ALLOW, "clone", (0, MASKED_EQUAL, CLONE_THREAD, CLONE_THREAD))
        rule(ERRNO | errno.EAGAIN, "clone", (0, MASKED_EQUAL, CLONE_THREAD, 0))
        for name in ("kill", "tgkill"):
            rule(ALLOW, name, (0, EQUAL, PROCESS_ID))
            rule(ERRNO | errno.EPERM, name, (0, NOT_EQUAL, PROCESS_ID))
        rule(ALLOW, "setpriority", (0, EQUAL, 0), (1, EQUAL, 0))  # a process's own
        for name in ("prlimit64", "sched_getparam", "sched_getscheduler"):
            rule(ALLOW, name, (0, EQUAL, 0))
            rule(ERRNO | errno.EPERM, name, (0, NOT_EQUAL, 0))
        # Not a pair of datagram sockets: either can send to any named socket of the machine.
        kind = (1, MASKED_EQUAL, SOCKET_TYPE, SOCK_STREAM)
        rule(ALLOW, "socketpair", (0, EQUAL, AF_UNIX), kind)
        for call, position, values in (
            ("ioctl", 1, IOCTLS),
            ("prctl", 0, PRCTLS),
            ("fcntl", 1, FCNTLS),
            ("fcntl64", 1, FCNTLS),
            ("getsockopt", 2, SOCKET_OPTIONS),
        ):
            for value in values:
                rule(ALLOW, call, (position, EQUAL, value))
        # A folder that its owner cannot read could not be measured while the program runs.
        rule(ALLOW, "umask", (0, MASKED_EQUAL, 0o700, 0))
        for call, position in (("mkdir", 1), ("mkdirat", 2)):
            rule(ALLOW, call, (position, MASKED_EQUAL, 0o700, 0o700))
            for mode in range(0, 0o700, 0o100):
                rule(ERRNO | errno.EPERM, call, (position, MASKED_EQUAL, 0o700, mode))
        return _export(library, context)
    finally:
        library.seccomp_release(context)


def _export(library, context) -> bytes:
    file = os.memfd_create("filter")
    try:
        failed = library.seccomp_export_bpf(context, file)
        if failed:
            raise OSError(f"libseccomp cannot export the filter: {os.strerror(-failed)}")
        program = os.pread(file, 1 << 20, 0)
    finally:
        os.close(file)
    if struct.pack("=I", PROCESS_ID) not in program:
        raise OSError("libseccomp lost the rule for signals")
    return program
