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
    """Ids of processes that are among ``roots``, stem from them or are in their sessions.

    A session still tells where a process belongs when its parents have ended.
    """
    parents, found = {}, set(roots)
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # ended in the meantime
            _, parent, _, session, *_ = _stat(name)
            parents[int(name)] = int(parent)
            if int(session) in roots:
                found.add(int(name))
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def times(processes: Collection[int]) -> tuple[float, float, float]:
    """Seconds that processes have existed, worked, and waited for their turn on a processor.

    Of the waits the longest counts, because processes and threads run side by side. What the kernel
    does not tell is 0.
    """
    began, used, waits = [], 0.0, [0.0]
    for process in processes:
        with suppress(OSError):
            fields = [int(field) for field in _stat(str(process))[1:]]
            began.append(fields[18] / TICKS)
            ticks = sum(fields[10:14]) / TICKS  # with threads and children that ended
            exact = 0.0  # many processes may have worked for less than a tick each
            for thread in os.listdir(f"/proc/{process}/task"):
                with suppress(OSError, IndexError):
                    text = Path(f"/proc/{process}/task/{thread}/schedstat").read_text()
                    exact += int(text.split()[0]) / 1e9
                    waits.append(int(text.split()[1]) / 1e9)
            used += max(ticks, exact)
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return (now - min(began) if began else 0.0), used, max(waits)


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
