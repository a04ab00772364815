"""What others do to a program: how long it waited for a processor, and what the kernel ended.

Read from the host's /proc by the trusted parent. The kernel does the counting, so a program cannot
claim to have been kept waiting.
"""

import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def descendants(roots: Collection[int]) -> set[int]:
    """Ids of processes that are among ``roots`` or stem from them, as seen outside."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # ended in the meantime
            parents[int(name)] = int(_stat(name)[1])
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def times(processes: Collection[int]) -> tuple[float, float, float]:
    """Seconds that processes have existed, worked, and waited for their turn on a processor.

    The waits of different processes are added, because program and judge take turns; of threads,
    which run side by side, the longest wait counts. What the kernel does not tell is 0.
    """
    began, used, waited = [], 0.0, 0.0
    for process in processes:
        with suppress(OSError):
            fields = [int(field) for field in _stat(str(process))[1:]]
            began.append(fields[18] / TICKS)
            used += sum(fields[10:14]) / TICKS  # with that of ended children
            waits = [0.0]
            for thread in os.listdir(f"/proc/{process}/task"):
                with suppress(OSError, IndexError):
                    text = Path(f"/proc/{process}/task/{thread}/schedstat").read_text()
                    waits.append(int(text.split()[1]) / 1e9)
            waited += max(waits)
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return (now - min(began) if began else 0.0), used, waited


def out_of_memory_kills() -> int:
    """How many processes the kernel has ended on this machine because memory ran out."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _stat(process: str) -> list[str]:
    """The fields of /proc/PID/stat after the command, which may hold spaces: state first."""
    return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()
