"""The fork server: runs inside the walls of a tier, and each program is a fork of it.

Every program inherits the memory of this process, so nothing that a program must not know passes
through it: sources, inputs and outputs travel as descriptors. Uses only the standard library.
"""

import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import json
import math
import mmap
import os
import resource
import select
import shutil
import signal
import site
import socket
import stat
import struct
import sys
import time
from typing import Any

import judge
import program
import scratch
import substitutes

# Imported in advance, so that a fork has them at no cost. Not random and threading: what they do in
# every fork takes as long as the fork.
READY = "bisect calendar cmath collections copy dataclasses datetime decimal enum fractions heapq"
READY += " itertools operator re string typing"
FILE_BYTES = 64 << 20
OPEN_FILES = 64
STACK_BYTES = 64 << 20
STREAMS = "/proc/self/fd"
LOOK = 0.02, 0.05  # seconds between two checks of the scratch folder; most programs end before
PDEATHSIG, SECCOMP, SECCOMP_FILTER = 1, 22, 2  # prctl

libc = ctypes.CDLL(None, use_errno=True)


def serve(control: int, config: dict) -> program.Script | None:
    """Fork for every request until the other side is gone.

    Args:
        control: descriptor of the socket to the trusted parent.
        config: ``filter`` (seccomp, hexadecimal; empty for none), ``process_id`` (what stands in it
            for a program's), ``strays`` (whether programs can leave processes behind), ``on_disk``
            (whether the scratch folder is: emptying it can take seconds), ``most_tasks`` (threads
            of a program, which are counted here because RLIMIT_NPROC counts all of the user's; or
            None), ``streams`` (whether to provide what /dev/stdin and its like are).

    Returns only in a fork that is to become a script, which its caller runs.
    """
    config["filter"] = bytes.fromhex(config["filter"])
    config["size"] = address_space()
    for name in READY.split():
        importlib.import_module(name)
    for add in (site.setquit, site.setcopyright, site.sethelper):
        add()
    substitutes.install()
    for name in set(os.environ) - {"PATH", "HOME", "LANG", "PYTHONHASHSEED"}:
        del os.environ[name]
    sys.argv = ["program.py"]
    sys.set_int_max_str_digits(0)  # which older programs do not know; time limits hold
    gc.collect()
    gc.freeze()  # a garbage collection in a fork would copy every page
    link = socket.socket(fileno=control)
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    scratch.empty(folder)
    given, streams = open_streams() if config["streams"] else (-1, [])
    socket.send_fds(link, [b'{"ready": true}'], streams)
    for stream in streams:
        os.close(stream)
    while True:
        data, descriptors, _, _ = socket.recv_fds(link, 1 << 16, 8)
        if not data:
            return
        request = json.loads(data)
        if "kill" in request:
            continue  # the program ended before the request arrived
        if given >= 0:
            copy_input(descriptors[0] if request["role"] == "script" else None, given)
        started = time.monotonic()
        parent = os.getpid()
        try:
            child = os.fork()
        except OSError as error:
            for descriptor in descriptors:
                os.close(descriptor)
            link.send(json.dumps({"failed": f"cannot fork: {error.strerror}"}).encode())
            continue
        if child == 0:
            link.detach()  # closed below; must not close a later descriptor of the same number
            return become_program(request, descriptors, config, parent)
        for descriptor in descriptors:
            os.close(descriptor)
        killed, excess = watch(child, link, config)
        if config["strays"] and parent != 1:
            end_at_once(child)  # while it is not reaped, and its group cannot be another
        _, status, usage = os.wait4(child, 0)
        seconds = time.monotonic() - started
        cpu = usage.ru_utime + usage.ru_stime + (end_strays() if config["strays"] else 0.0)
        output = open_output(request["output_file"])
        # After a failure no further case of this program comes that would have to wait.
        worn = config["on_disk"] and status != 0 and scratch.overfull(".", scratch.FEW_FILES)
        if not worn:
            scratch.empty(folder)
        reply = {"status": status, "killed": killed, "excess": excess, "seconds": seconds}
        reply |= {"cpu": cpu, "peak_kb": usage.ru_maxrss, "output": len(output), "worn": worn}
        # Only a program that raised its limit, which leaves room for stacks, uses more than that.
        reply["overused"] = usage.ru_maxrss << 10 > memory(request, config)
        socket.send_fds(link, [json.dumps(reply).encode()], output)
        for descriptor in output:
            os.close(descriptor)
        if worn:  # another server takes over while this one tidies up
            scratch.empty(folder)
            return


def open_streams() -> tuple[int, list[int]]:
    """Make what a program's standard streams are by name, where there is no /proc.

    Standard input is a file that a program can only read. The other two are named pipes that it
    can only write to; the parent has the other ends.

    Returns a descriptor that writes to the file, and those for the parent.
    """
    given = os.open(f"{STREAMS}/0", os.O_RDWR | os.O_CREAT, 0o444)
    ends = []
    for number in (1, 2):
        path = f"{STREAMS}/{number}"
        os.mkfifo(path, 0o600)
        ends.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        os.chmod(path, 0o200)
    os.chmod(STREAMS, 0o555)
    return given, ends


def copy_input(source: int | None, target: int) -> None:
    """Replace the content of a file by that of another, or by nothing."""
    os.ftruncate(target, 0)
    os.lseek(target, 0, os.SEEK_SET)
    if source is not None:
        done, size = 0, os.fstat(source).st_size
        while done < size:
            done += os.sendfile(target, source, done, size - done)


def watch(child: int, link: socket.socket, config: dict) -> tuple[bool, str | None]:
    """Wait for a program to end, or end it.

    Returns whether the parent asked for its end, and what it had too much of: ``overfull`` (the
    scratch folder), ``process_limit`` or None.
    """
    ended = os.pidfd_open(child)
    poller = select.poll()
    poller.register(ended, select.POLLIN)
    poller.register(link, select.POLLIN)
    killed, excess = False, None
    pause = LOOK[0]
    while True:
        ready = [descriptor for descriptor, _ in poller.poll(pause * 1000)]
        if ended in ready:
            os.close(ended)
            return killed, excess
        if ready and not link.recv(1 << 16):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os._exit(0)  # the parent is gone
        began = time.monotonic()
        if scratch.overfull("."):
            excess = excess or "overfull"
        elif config["most_tasks"] and threads(child) > config["most_tasks"]:
            excess = excess or "process_limit"
        # Often, because all that a program makes until it is stopped must be removed again.
        pause = min(max(LOOK[0], 10 * (time.monotonic() - began)), LOOK[1])
        killed = killed or bool(ready)
        if killed or excess:
            os.kill(child, signal.SIGKILL)
            if config["strays"]:
                end_at_once(child)


def open_output(name: str | None) -> list[int]:
    """The file that a program had to write, if it is a regular file."""
    if name is None:
        return []
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return []  # not written, or a link
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return [descriptor]
    os.close(descriptor)
    return []


def threads(process: int) -> int:
    """How many threads a process has. Landlock lets links be counted, but nothing be read."""
    try:
        return os.stat(f"/proc/{process}/task").st_nlink - 2
    except OSError:
        return 0  # ended in the meantime


def end_at_once(group: int) -> None:
    """End a group, or all else in a namespace: nothing forks faster than the kernel does that."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1 if os.getpid() == 1 else -group, signal.SIGKILL)


def end_strays() -> float:
    """End what a program left behind; orphans become children of this process (subreaper).

    Returns the seconds of processor time that they took.
    """
    cpu = 0.0
    with contextlib.suppress(ChildProcessError):  # there is none, or none any more
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        while True:
            if os.getpid() == 1:
                end_at_once(0)
            else:
                with open(f"/proc/self/task/{os.getpid()}/children") as file:
                    for child in file.read().split():
                        os.kill(int(child), signal.SIGKILL)
            usage = os.wait4(-1, 0)[2]
            cpu += usage.ru_utime + usage.ru_stime
    return cpu


def become_program(
    request: dict, descriptors: list[int], config: dict, server: int
) -> program.Script | None:
    """Turn a fork into a program: set up descriptors, limits and filter, then run its source.

    Returns only if it is a script, for the caller to run.
    """
    libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server:
        os._exit(1)
    os.setpgid(0, 0)
    copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64) for descriptor in descriptors]
    for target, copy_ in enumerate(copies):
        os.dup2(copy_, target)  # 0-2 standard streams, 3 source, 4 link, 5 the judge's result
    os.closerange(len(copies), 1 << 16)
    with open(3, "rb") as file:
        source = file.read()
    script = program.Script(source) if request["role"] == "script" else None  # writes it
    if request["input_file"]:
        with open(request["input_file"], "wb") as file, open(0, "rb", closefd=False) as given:
            shutil.copyfileobj(given, file)
            given.seek(0)
    limit(request, config)
    if config["filter"]:
        install_filter(config["filter"], config["process_id"])
    if request["role"] == "judge":
        judge.judge(source, 4, 5)
    # As Python opens them in the locale C.UTF-8.
    text = functools.partial(open, encoding="utf-8", closefd=False)
    streams: list[Any] = [
        text(0, errors="surrogateescape"),
        text(1, "w", errors="surrogateescape"),
        text(2, "w", buffering=1, errors="backslashreplace"),
    ]
    sys.stdin, sys.stdout, sys.stderr = streams
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams
    for name, stream in zip(("<stdin>", "<stdout>", "<stderr>"), streams, strict=True):
        stream.buffer.raw.name = name
    if script is None:
        program.serve_functions(source, 4)
    return script


def memory(request: dict, config: dict) -> int:
    """Bytes that a program may use, with what the interpreter takes."""
    return config["size"] + (request["memory_mb"] << 20)


def limit(request: dict, config: dict) -> None:
    """Set the kernel's limits for this process, which it cannot raise again."""
    size = memory(request, config)
    # Processor time of all threads; the parent's wall-clock limit comes first.
    seconds = math.ceil(request["seconds"]) * 4 + 5
    for name, soft in (
        (resource.RLIMIT_AS, size + substitutes.STACKS),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, request["tasks"]),
    ):
        hard = resource.getrlimit(name)[1]
        soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
        resource.setrlimit(name, (min(soft, size) if name == resource.RLIMIT_AS else soft, soft))
    # The hard limit stays: programs may raise this one, and the address space bounds it.
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, hard))


def install_filter(code: bytes, process_id: int) -> None:
    """Install the seccomp filter, with this process's id in place of the placeholder."""
    code = code.replace(struct.pack("=I", process_id), struct.pack("=I", os.getpid()))
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
    if libc.prctl(SECCOMP, SECCOMP_FILTER, header, 0, 0):
        os._exit(1)


def address_space() -> int:
    """Bytes of this process's address space, found without /proc by searching for the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    low, high = 0, 1 << 46
    while high - low > 1 << 20:
        middle = (low + high) // 2
        resource.setrlimit(resource.RLIMIT_AS, (middle, hard))
        try:
            mmap.mmap(-1, mmap.PAGESIZE).close()
            high = middle
        except (OSError, MemoryError):
            low = middle
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return high
