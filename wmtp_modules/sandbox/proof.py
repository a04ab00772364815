"""The self-test: runs programs that try what a tier claims to prevent, and checks the host."""

import os
import re
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

# What it runs inside, by name: sections of a file, with places for str.format.
SECTIONS = re.split(r"^=== (.*)\n", Path(__file__).with_suffix(".txt").read_text(), flags=re.M)[1:]
PROGRAMS = dict(zip(SECTIONS[::2], SECTIONS[1::2], strict=True))
# Time of the workload on the nominal machine: one otherwise idle core of the AMD EPYC server of
# benchmarks/results, with CPython 3.11.
NOMINAL_SECONDS = 0.125


def prove(sandbox) -> dict[str, bool | str]:
    """Run the self-test of an open sandbox: for each claim True, or why the tier makes none.

    Raises:
        SandboxError: if the tier does not do what it claims; names the claims.
    """
    faults = {}
    before = sandbox.processes()
    with ExitStack() as stack:
        probes, checks = _probes(stack, sandbox.tier)
        outputs = {}
        jobs = [
            # A comparison that accepts everything and stores it under the expected name.
            (name, StdinJob(source, (("", name),), outputs.__setitem__, limits=limits))
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
        (n, StdinJob(PROGRAMS["workload"], (("", str(n)),), times.__setitem__, limits=Limits(60)))
        for n in range(2 * workers)
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
        "network": (PROGRAMS["network"].format(port=port), ordinary),
        "outside_writes": (PROGRAMS["outside_writes"].format(folders=folders, name=name), ordinary),
        "signals": (PROGRAMS["signals"].format(victim=victim.pid), ordinary),
        "memory": (PROGRAMS["memory"], Limits(5, 64)),
        "processes": (PROGRAMS["processes"].format(many=MANY), ordinary),
        "time": (PROGRAMS["time"], Limits(SECONDS, 256)),
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
