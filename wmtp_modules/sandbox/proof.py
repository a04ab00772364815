"""The self-test: runs programs that try what a tier claims to prevent, and checks the host."""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

from wmtp_modules.sandbox.jobs import Limits, SandboxError, StdinJob

NOT_CLAIMED = "tier rlimits makes no such claim"
WALLS = ("network", "outside_writes", "signals")  # what tier rlimits lacks
SECONDS = 0.25
MANY = 2000  # processes

NETWORK = """
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    try:
        with socket.socket(socket.AF_INET, kind) as client:
            client.settimeout(1)
            client.connect(("127.0.0.1", {port}))
            client.send(b"escaped")
    except OSError:
        pass
"""
OUTSIDE_WRITES = """
for folder in {folders!r}:
    try:
        open(folder + "/" + {name!r}, "w").close()
    except OSError:
        pass
"""
SIGNALS = """
import os
for process in ({victim}, os.getppid()):
    try:
        os.kill(process, 9)
    except OSError:
        pass
"""
MEMORY = "filled = bytearray(512 << 20)"
PROCESSES = """
import os, time
count = 0
try:
    while count < {many}:
        if os.fork() == 0:
            os.setsid()
            time.sleep(20)
            os._exit(0)
        count += 1
except OSError:
    pass
print(count)
"""
TIME = """
import signal
for number in range(1, 32):
    if number not in (9, 19):
        signal.signal(number, signal.SIG_IGN)
while True:
    pass
"""
# Integers, strings, dicts, sorting and calls, as programs of benchmarks do.
WORKLOAD = """
import time

def collatz(n):
    steps = 0
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps

def work():
    lengths = {n: collatz(n) for n in range(1, 12000)}
    words = sorted(str(n * 7919 % 10007) for n in range(60000))
    return max(lengths, key=lengths.get), len("".join(words))

began = time.perf_counter()
work()
print(time.perf_counter() - began)
"""
# Time of the workload on the nominal machine: one otherwise idle core of the AMD EPYC server of
# benchmarks/results, with CPython 3.11.
NOMINAL_SECONDS = 0.125


def prove(sandbox) -> dict[str, bool | str]:
    """Run the self-test of an open sandbox.

    Returns:
        For each claim True, or a sentence if the tier does not make it.

    Raises:
        SandboxError: if the tier does not do what it claims; names the claims.
    """
    faults = {}
    before = sandbox.processes()
    with ExitStack() as stack:
        probes, checks = _probes(stack, sandbox.tier)
        outputs = {}
        jobs = [
            (name, StdinJob(source, (("", name),), _keep(outputs), limits=limits))
            for name, (source, limits) in probes.items()
            if sandbox.tier != "rlimits" or name not in WALLS
        ]
        for name, outcome in sandbox.run(jobs):
            fault = checks[name](outcome, outputs.get(name, ""))
            if fault:
                said = outcome.detail.splitlines()[-1:] or [""]
                faults[name] = f"{fault} ({outcome.verdict} {said[0]})"
        left = sandbox.processes() - before
        if left:
            faults["survivors"] = f"{len(left)} processes outlived their programs"
    if faults:
        found = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        raise SandboxError(f"the self-test of tier {sandbox.tier} failed: {found}")
    proven = dict.fromkeys((*probes, "survivors"), True)
    return proven | (dict.fromkeys(WALLS, NOT_CLAIMED) if sandbox.tier == "rlimits" else {})


def measure_machine(sandbox, workers: int) -> float:
    """Time of a fixed workload, with all workers busy, relative to the nominal machine."""
    times = {}
    jobs = (
        (number, StdinJob(WORKLOAD, (("", str(number)),), _keep(times), limits=Limits(60)))
        for number in range(2 * workers)
    )
    for _, outcome in sandbox.run(jobs):
        if outcome.verdict != "pass":
            raise SandboxError(f"a harmless workload fails: {outcome.verdict} {outcome.detail}")
    return max(1.0, statistics.median(map(float, times.values())) / NOMINAL_SECONDS)


def _remove(name: str, folders: list[str]) -> None:
    """Remove what a failing tier let a program write."""
    for folder in folders:
        with suppress(OSError):
            os.unlink(f"{folder}/{name}")


def _keep(outputs: dict):
    """A comparison that accepts everything and stores it under the expected name."""
    return outputs.__setitem__


def _probes(stack: ExitStack, tier: str) -> tuple[dict, dict]:
    """Programs with their limits, and checks of whether they were stopped."""
    stream = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    stream.setblocking(False)
    datagram = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    port = stream.getsockname()[1]
    datagram.bind(("127.0.0.1", port))
    datagram.setblocking(False)
    shared = stack.enter_context(tempfile.TemporaryDirectory())
    os.chmod(shared, 0o777)
    folders = [shared, tempfile.gettempdir(), "/tmp", "/dev/shm", "/", str(Path.home())]
    name = f"escaped-{os.urandom(8).hex()}"
    stack.callback(_remove, name, folders)
    victim = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
    stack.callback(victim.wait)
    stack.callback(victim.kill)
    ordinary = Limits(5, 256)
    probes = {
        "network": (NETWORK.format(port=port), ordinary),
        "outside_writes": (OUTSIDE_WRITES.format(folders=folders, name=name), ordinary),
        "signals": (SIGNALS.format(victim=victim.pid), ordinary),
        "memory": (MEMORY, Limits(5, 64)),
        "processes": (PROCESSES.format(many=MANY), ordinary),
        "time": (TIME, Limits(SECONDS, 256)),
    }

    def reached() -> bool:
        for receive in (stream.accept, lambda: datagram.recv(100)):
            try:
                receive()
            except BlockingIOError:
                continue
            return True
        return False

    most = MANY - 1 if tier == "rlimits" else 0
    checks = {
        "network": lambda outcome, _: reached() and "a program reached a socket of this machine",
        "outside_writes": lambda outcome, _: (
            any(os.path.exists(f"{folder}/{name}") for folder in folders)
            and "a program wrote outside its scratch folder"
        ),
        "signals": lambda outcome, _: (
            (victim.poll() is not None or outcome.verdict != "pass")
            and "a program ended another process"
        ),
        "memory": lambda outcome, _: (
            outcome.verdict != "memory" and "a program took more memory than it was given"
        ),
        "processes": lambda outcome, output: (
            (not output.strip().isdigit() or int(output) > most)
            and f"a program started {output.strip() or 'unknown'} processes"
        ),
        "time": lambda outcome, _: outcome.verdict != "timeout" and "a program ran past its time",
    }
    return probes, checks
