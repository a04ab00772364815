"""What the benchmarks share: the hardware line and the peak of anonymous memory."""

import platform
import threading
from datetime import date
from pathlib import Path

import torch


def hardware() -> str:
    """One line that goes on top of every result."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return (
        f"{date.today()}  {model}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def anonymous_bytes() -> int:
    """RssAnon of this process; mapped file pages, which VmRSS counts too, are not memory spent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this needs Linux 4.5 or later")


class PeakAnonymousMemory:
    """Peak of RssAnon above its start, sampled every millisecond. Read ``bytes`` afterwards."""

    def __enter__(self) -> "PeakAnonymousMemory":
        self._start = self._peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self._peak = max(self._peak, anonymous_bytes())

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self._peak, anonymous_bytes()) - self._start
