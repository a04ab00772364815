"""Progress bars for a terminal, and whole lines, now and then, for a log."""

import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

TERMINAL_S, LOG_S = 0.5, 20  # seconds between two looks of a bar
LOG_FORMAT = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines:
    """A stream for tqdm that writes a line where a terminal's bar would be redrawn."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        line = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\r\n]", "", text).rstrip()
        if line and line != self._last:  # a bar that closes shows its last look once more
            self._stream.write(f"{line}\n")
            self._last = line

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(
    iterable: Iterable | None = None, *, desc: str, shown: bool = True, **kwargs: Any
) -> tqdm:
    """A bar on stderr; where that is no terminal, a line about every 20 seconds and at the end.

    ``shown`` is False on the ranks that stay silent, ``kwargs`` are tqdm's, such as ``total``.
    ``set_postfix_str(..., refresh=False)`` leaves the next look to its time.
    """
    style: dict[str, Any] = {"mininterval": TERMINAL_S}
    if shown and not sys.stderr.isatty():
        # miniters: tqdm would else guess from the first steps after how many to look at the clock.
        style = {"mininterval": LOG_S, "maxinterval": LOG_S, "miniters": 1}
        style |= {"file": _Lines(sys.stderr), "bar_format": LOG_FORMAT}
    return tqdm(iterable, desc=desc, disable=not shown, **kwargs, **style)


def quiet_datasets() -> None:
    """No bars of ``datasets`` and the hub, which draw them into a log as well."""
    import datasets  # a bar of ours needs neither
    import huggingface_hub.utils

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
