"""Turns this process into a fork server inside a tier's walls. Started by ``pool.py`` as a script.

It drops root, builds the walls, and becomes the interpreter that runs ``server.py``, whose source
comes through standard input: no file of the repository is readable inside.

Below bubblewrap, namespaces are no walls but keep the accounts: where the kernel grants them, the
processes of one server are counted apart from all others, its scratch folder is a tmpfs that ends
with it, and its end takes every process inside along.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys

NOBODY = 65534
SCRATCH = "/scratch"  # inside bubblewrap
STREAMS = "/proc/self/fd"  # inside bubblewrap, which has no other /proc: server.open_streams
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
SERVER_STACK = 8 << 20  # also of a thread; a program's main stack may grow further
FLAGS = ("-P", "-s", "-S", "-B", "-")  # not -I: it would ignore PYTHONHASHSEED
UNAVAILABLE = 3  # exit status: the reason is on standard error

# Where the private tmpfs is mounted: it needs a folder that is there and that no program misses.
PLACES = ("/mnt", "/media", "/srv")

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 1 << 27, 1 << 28, 1 << 29
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_CAP_AMBIENT, PR_SET_CHILD_SUBREAPER = 1, 8, 47, 36
CAP_DAC_READ_SEARCH, CAPABILITIES_V3 = 2, 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments) -> None:
    if getattr(libc, function)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


def environment(scratch: str) -> dict[str, str]:
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": scratch,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "MALLOC_ARENA_MAX": "1",  # otherwise each thread takes 64 MB of address space
    }


def interpreter(python: str, prefix: str) -> list[str]:
    """The paths that an interpreter needs: itself, its library, the system's; time zones."""
    own = [os.path.join(prefix, name) for name in ("lib", "lib64")]
    paths = [python, *own, *LIBRARIES, "/etc/ld.so.cache"]
    return list(dict.fromkeys(path for path in paths if os.path.exists(path)))


def readable_by_nobody(paths: list[str]) -> bool:
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        needed = [(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0)) for path in paths]
        return all(os.access(path, mode, effective_ids=True) for path, mode in needed)
    finally:
        os.seteuid(0)
        os.setegid(0)


def drop_root(keep_reading: bool = False) -> None:
    """Become the user nobody, who may at most still read what the walls leave visible."""
    os.setgroups([])
    if keep_reading:
        call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    if keep_reading:
        mask = 1 << CAP_DAC_READ_SEARCH
        header = (ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0)
        call("capset", header, (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0))
        call("prctl", PR_CAP_AMBIENT, 2, CAP_DAC_READ_SEARCH, 0, 0)  # 2: raise


def shown_elsewhere(paths: list[str]) -> dict[str, str]:
    """Bind paths that nobody cannot reach to a reachable place, in a new mount namespace."""
    call("unshare", CLONE_NEWNS)
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    sources = [os.open(path, os.O_PATH) for path in paths]  # the place may hide one of them
    place = "/mnt" if os.path.isdir("/mnt") else "/tmp"
    call("mount", b"tmpfs", place.encode(), b"tmpfs", 0, b"size=1m,mode=755")
    shown = {}
    for number, (path, source) in enumerate(zip(paths, sources, strict=True)):
        shown[path] = f"{place}/{number}"
        if os.path.isdir(path):
            os.mkdir(shown[path])
        else:
            os.close(os.open(shown[path], os.O_CREAT | os.O_WRONLY, 0o600))
        target = shown[path].encode()
        call("mount", f"/proc/self/fd/{source}".encode(), target, None, MS_BIND | MS_REC, None)
        os.close(source)
    return shown


def enter_bubblewrap(config: dict) -> None:
    """An isolated machine: no network, no other process, no file except an interpreter."""
    python = config["python"]
    paths = interpreter(python, config["prefix"])
    links = {path: os.readlink(path) for path in paths if os.path.islink(path)}
    real = [path for path in paths if path not in links]
    sources = {path: path for path in real}
    if os.getuid() == 0:
        if not readable_by_nobody(real):
            sources = shown_elsewhere(real)
        drop_root()
    bwrap = [config["bwrap"], "--die-with-parent", "--new-session", "--clearenv"]
    bwrap += ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    bwrap += ["--unshare-cgroup-try", "--disable-userns", "--uid", str(NOBODY), "--gid"]
    bwrap += [str(NOBODY)]
    for path, target in links.items():
        bwrap += ["--symlink", target, path]
    for path in sorted(real):  # a folder before its contents
        bwrap += ["--ro-bind", sources[path], path]
    for path in DEVICES:
        bwrap += ["--dev-bind", path, path]
    bwrap += ["--size", str(config["scratch_bytes"]), "--tmpfs", SCRATCH]
    bwrap += ["--tmpfs", STREAMS, "--symlink", STREAMS, "/dev/fd"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        bwrap += ["--symlink", f"{STREAMS}/{number}", f"/dev/{name}"]
    bwrap += ["--remount-ro", "/"]
    bwrap += ["--chdir", SCRATCH]
    for name, value in environment(SCRATCH).items():
        bwrap += ["--setenv", name, value]
    os.execv(bwrap[0], [*bwrap, "--", python, *FLAGS])


def enter_landlock(config: dict) -> None:
    """This machine without access to its files; seccomp, per program, closes the rest."""
    import landlock

    number = landlock.version()
    if number < landlock.OLDEST:
        raise OSError(
            f"the kernel offers Landlock version {number}; {landlock.OLDEST} or later is needed "
            "(Linux 5.19, with landlock among its security modules)"
        )
    paths = interpreter(config["python"], config["prefix"])
    become_server(config, paths, lambda: landlock.restrict(paths, [config["scratch"], *DEVICES]))


def enter_rlimits(config: dict) -> None:
    """No walls, only the limits of each program."""
    become_server(config, interpreter(config["python"], config["prefix"]), lambda: None)


def try_namespaces(config: dict) -> None:
    """Only find out whether ``enter_namespaces`` works here; OSError if not."""
    place = enter_namespaces(config, interpreter(config["python"], config["prefix"]))
    if os.getuid() == 0:
        drop_root()
    os.mkdir(f"{place}/works")


def enter_namespaces(config: dict, paths: list[str]) -> str:
    """Continue as the first process of new user, mount, process and IPC namespaces.

    The user namespace maps every user to itself, so permissions are as they were. This process
    stays outside and waits; either one ends with the other.

    Returns the path of the scratch folder: a tmpfs with room for its limits and a little more, so
    that a program meets the end of it if ``server.watch`` is late.

    Raises:
        OSError: if the kernel does not grant one of them.
    """
    under = [os.path.realpath(path) + "/" for path in paths]
    free = [p for p in PLACES if os.path.isdir(p) and not any(u.startswith(p + "/") for u in under)]
    if not free:
        raise OSError(f"none of {', '.join(PLACES)} is a folder without the interpreter")
    user, group = (NOBODY, NOBODY) if os.getuid() == 0 else (os.getuid(), os.getgid())
    map_users(call_after=lambda: call(
        "unshare", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC
    ))  # fmt: skip
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    options = f"size={config['scratch_bytes']},nr_inodes={config['scratch_inodes']},mode=700"
    options += f",uid={user},gid={group}"
    flags = MS_NOSUID | MS_NODEV
    call("mount", b"tmpfs", free[0].encode(), b"tmpfs", flags, options.encode())
    server = os.fork()
    if server:
        os.close(0)
        os.closerange(3, 1 << 16)  # or nobody would see that the server closes its socket
        if os.getuid() == 0:
            drop_root()
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]) & 0xFF)
    with contextlib.suppress(OSError):  # refused where parts of /proc are hidden: the old one stays
        call("mount", b"proc", b"/proc", b"proc", flags, None)
    return free[0]


def map_users(call_after) -> None:
    """Call ``call_after``, which enters a user namespace, and map its users and groups.

    A child that stays outside writes the maps: only it may map more than one user.
    """
    inside, root = os.getpid(), os.getuid() == 0
    maps = {
        "uid_map": f"{os.getuid()} {os.getuid()} 1",
        "gid_map": f"{os.getgid()} {os.getgid()} 1",
    }
    if root:
        for name in maps:
            with open(f"/proc/self/{name}") as file:
                rows = [line.split() for line in file]
            maps[name] = "\n".join(f"{first} {first} {count}" for first, _, count in rows)
    else:
        maps = {"setgroups": "deny"} | maps
    entered, enter = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(enter)
        try:
            if os.read(entered, 1):
                for name, text in maps.items():
                    with open(f"/proc/{inside}/{name}", "w") as file:
                        file.write(text)
                os._exit(0)
        finally:
            os._exit(1)
    os.close(entered)
    try:
        call_after()
        os.write(enter, b"x")
    finally:
        os.close(enter)
        _, status = os.waitpid(child, 0)
    if status:
        raise OSError("a user namespace cannot be mapped")


def become_server(config: dict, paths: list[str], build_walls) -> None:
    apart = config["scratch"] is None
    if apart:
        config["scratch"] = enter_namespaces(config, paths)
    if os.getuid() == 0:
        drop_root(keep_reading=not readable_by_nobody(paths))
    os.chdir(config["scratch"])
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # From inside a namespace the parent cannot be seen; if it is gone, so is the server's socket.
    if not apart and os.getppid() != config["parent"]:
        sys.exit(UNAVAILABLE)  # died before it could be watched
    build_walls()
    python = config["python"]
    os.execve(python, [python, *FLAGS], environment(config["scratch"]))


def main() -> None:
    config = json.loads(sys.argv[1])
    os.chdir("/")
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # short of memory, the kernel kills programs first
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = SERVER_STACK if hard == resource.RLIM_INFINITY else min(SERVER_STACK, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, hard))
    enter = {
        "bubblewrap": enter_bubblewrap,
        "landlock": enter_landlock,
        "rlimits": enter_rlimits,
        "namespaces": try_namespaces,
    }[config["tier"]]
    try:
        enter(config)
    except OSError as error:
        print(error.strerror or error, file=sys.stderr)
        sys.exit(UNAVAILABLE)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    main()
