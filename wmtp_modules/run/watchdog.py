"""Ends a run in which a rank hangs, and says which rank, where, and what the others wait in.

A collective that one rank never enters holds up all of them silently. Here a thread of every rank
publishes about once a second, in the store through which the ranks found each other, when its main
thread last made progress and where it is now. A rank that made no progress for long reads what the
others publish. One that publishes nothing any more was stopped as a whole, holds Python's lock in
C, or lost its machine.

This watches hosts. On GPUs the host runs ahead of the device and meets the other hosts once a
micro-step in ``StopRequests.agreed``: there it waits for one that hangs. A host that waits for its
device looks as if it hung itself, and both are named. A device that hangs in NCCL is found by
NCCL's own watchdog, at the process group's time-out.
"""

import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from wmtp_modules.parallel.process_group import share_from_rank_zero
from wmtp_modules.run.metric_logging import note_last_words
from wmtp_modules.run.stopping import end_process, write_exit
from wmtp_modules.tune_plugin import SPOKEN_FILE, first_to_speak, note_spoken

T = TypeVar("T")

EXIT_HUNG = 1
LONGEST_PERIOD_S = 1.0  # between two looks
SPEAK_S = 3.0  # for the rank that speaks, before another one ends and the launcher kills all
STORE_TIMEOUT = timedelta(seconds=10)
LEFT = -1  # number of the report of a rank that has left the block
MOST_NAMED = 4  # ranks in a sentence
# Where a main thread waits for other ranks; a checkpoint's files are none of that.
COLLECTIVES = tuple(
    f"torch.distributed.{name}" for name in ("distributed_c10d", "fsdp", "_functional_collectives")
)
# What gloo and NCCL say of a peer that has ended, or that no longer answers.
LOST = re.compile(
    r"Connection (?:closed|reset) by peer(?: \[[^]]*\])?|Application timeout caused pair closure"
    r"|Timed out waiting \d+ms for \w+ operation|[^\n\]]*timeout[^\n]*unboundBuffer[^\n]*"
    r"|remote process exited or there was a network error|Broken pipe|No route to host"
)
CONTINUES = (
    "the run ends, and the same command with resume_from_checkpoint=true continues from what was "
    "saved"
)
OURS = ("__main__", "recipes", "wmtp_modules")
_numbers = itertools.count()  # every rank makes its watchdogs in the same order


class Place(NamedTuple):
    """Where a main thread is."""

    collective: str | None  # such as "all_reduce"; None if it does not wait for other ranks
    line: str


class Report(NamedTuple):
    """What a rank publishes."""

    number: int  # one more each time
    process: str
    what: str  # the main thread's last beat
    step: int | None
    age: float  # seconds since then
    paused: bool
    place: Place


class Hang(NamedTuple):
    """What there is to say about a hang."""

    ranks: list[int]  # that hold up the others
    collective: str | None  # in which the others wait
    sentence: str


class Watchdog:
    """Watches the main thread of this rank inside of ``with``, which all ranks enter, repeatedly.

    Args:
        timeout_s: seconds without a ``beat`` after which the run ends.

    Raises:
        ValueError: if ``timeout_s`` is not above 0.
    """

    def __init__(self, timeout_s: float, output_dir: str | os.PathLike) -> None:
        if not timeout_s > 0:
            raise ValueError(f"a time-out of {timeout_s} seconds is over at once: give more")
        self._timeout_s, self._output_dir = timeout_s, output_dir
        self._exit_before = _exit_of(output_dir)
        self._period_s = min(LONGEST_PERIOD_S, timeout_s / 20)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        # A connection of its own, as the main thread may wait in the other one.
        store: Any = distributed_c10d._get_default_store()
        store = store.clone()
        store.set_timeout(STORE_TIMEOUT)
        self._store = dist.PrefixStore(f"watchdog/{next(_numbers)}", store)
        self._process = f"process {os.getpid()} on {socket.gethostname()}"
        self._paused = False
        self.beat("the start")
        self._heard: dict[int, tuple[int | None, float]] = {}  # each rank's number, and since when
        self._reports = itertools.count()
        self._asking: threading.Thread | None = None  # the store
        self._connected = time.monotonic()  # when it answered last

    def __enter__(self) -> "Watchdog":
        self.beat("the start")
        self._connected = time.monotonic()
        self._main_thread = threading.get_ident()
        self._leaves = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaves.set()
        self._thread.join()

    def beat(self, what: str, step: int | None = None) -> None:
        """Tell that the main thread has come to something, such as "step 12"; costs nothing.

        ``step`` is the last whole optimizer step, for ``exit.json``.
        """
        self._beat = (what, step, time.monotonic())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block that may take as long as it likes, such as an export by one rank.

        The other ranks wait for this one. It is still noticed if its process is stopped.
        """
        outer, self._paused = self._paused, True
        try:
            yield
        finally:
            self._beat_again()
            self._paused = outer

    def on_rank_zero(self, function: Callable[[], T]) -> T:
        """What a function returns on rank 0, on all ranks; it may take long. A collective."""
        with self.paused():
            return share_from_rank_zero(function() if self._rank == 0 else None)

    def beating(self, items: Iterable[T], what: str, step: int | None = None) -> Iterator[T]:
        """The same items, with a ``beat`` before each one."""
        for item in items:
            self.beat(what, step)
            yield item

    def _beat_again(self) -> None:
        what, step, _ = self._beat
        self.beat(what, step)

    # ------------------------------------------------------------- in the thread

    def _watch(self) -> None:
        for number in self._reports:
            own = self._report(number)
            reports: dict[int, Report | None] = {self._rank: own}
            others = set(range(self._world)) - {self._rank} if own.age > self._timeout_s / 2 else ()

            def exchange(own: Report = own, others: Iterable[int] = others) -> dict:
                self._publish(own)
                return {rank: self._read(rank) for rank in others}  # no progress: how are they?

            found = self._ask(exchange)
            reports |= found or {}
            silences = self._silences(reports)
            now = time.monotonic()
            self._connected = self._connected if found is None else now
            cut_off_s = now - self._connected
            if hang := find_hang(reports, silences, self._rank, self._timeout_s, cut_off_s):
                self._end(hang, own.step)
            started = time.monotonic()
            if self._leaves.wait(self._period_s):
                break
            if time.monotonic() - started > self._period_s + self._timeout_s / 4:
                self._beat_again()  # this process was stopped, perhaps the whole job
        self._ask(lambda: self._publish(own._replace(number=LEFT, paused=True)))

    def _ask(self, work: Callable[[], T]) -> T | None:
        """What comes of it in the store; None if that is gone, or silent as its host is lost.

        A question to a host that is cut off has no time-out, so a thread of its own waits for it.
        """
        if self._asking is not None and self._asking.is_alive():
            return None
        answers: list[T] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(work())

        self._asking = threading.Thread(target=ask, name="watchdog's store", daemon=True)
        self._asking.start()
        self._asking.join(min(STORE_TIMEOUT.total_seconds(), self._timeout_s / 4))
        return answers[0] if answers else None

    def _report(self, number: int) -> Report:
        what, step, since = self._beat
        place = find_place(sys._current_frames()[self._main_thread])
        age = time.monotonic() - since
        return Report(number, self._process, what, step, age, self._paused, place)

    def _publish(self, report: Report) -> None:
        self._store.set(str(self._rank), json.dumps(report))

    def _read(self, rank: int) -> Report | None:
        if not self._store.check([str(rank)]):
            return None
        report = Report(*json.loads(self._store.get(str(rank))))
        return report._replace(place=Place(*report.place))

    def _silences(self, reports: dict[int, Report | None]) -> dict[int, float]:
        """Seconds for which each rank's report has been the same one, by this rank's clock."""
        now = time.monotonic()
        for rank, report in reports.items():
            number = None if report is None else report.number
            if number == LEFT or rank not in self._heard or self._heard[rank][0] != number:
                self._heard[rank] = (number, now)
        return {rank: now - self._heard[rank][1] for rank in reports}

    def _end(self, hang: Hang, step: int | None) -> None:
        """End the process. The first rank of a host that comes here speaks for it."""
        is_first = self._is_first()
        more = {"ranks": hang.ranks, "collective": hang.collective, "message": hang.sentence}
        try:
            if is_first:
                sys.stderr.write(f"\n{hang.sentence}\n")
                sys.stderr.flush()
                note_spoken()
                # Who came first heard more: the store is on rank 0, which may be gone by now.
                if _exit_of(self._output_dir) in (None, self._exit_before):
                    write_exit(self._output_dir, "hung", step, **more)
            else:
                time.sleep(SPEAK_S)
        finally:  # also where the disk is full
            os._exit(EXIT_HUNG)

    def _is_first(self) -> bool:
        if os.environ.get(SPOKEN_FILE):  # of the launcher; each host has its own
            with suppress(OSError):
                return first_to_speak()
        return self._ask(lambda: self._store.add("said", 1)) in (1, None)


def _exit_of(output_dir: str | os.PathLike) -> tuple[int, int] | None:
    """Which ``exit.json`` there is, None if there is none."""
    try:
        stat = (Path(output_dir) / "exit.json").stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


@contextmanager
def explain_lost_rank(output_dir: str | os.PathLike) -> Iterator[None]:
    """End the process with a sentence where a collective fails as another rank is gone.

    The first rank of each host that notices speaks. The interpreter is not left as usual: it would
    wait for threads that wait for the lost one.
    """
    try:
        yield
    except RuntimeError as error:  # of gloo and of NCCL; a subclass in torch.distributed
        lost = LOST.search(str(error))
        if lost is None:
            raise
        place = find_place(_innermost(error))
        told = (
            f"Rank {dist.get_rank()} (process {os.getpid()} on {socket.gethostname()}) lost "
            f"another rank, or its host ({lost[0].strip()}), in "
            f"{place.collective or 'a collective'}, called by {place.line}; {CONTINUES}"
        )
        if not os.environ.get(SPOKEN_FILE) or first_to_speak():
            sys.stderr.write(f"\n{told}\n")
            note_last_words(told)
            if not (Path(output_dir) / "exit.json").exists():  # the lost one may have said more
                with suppress(OSError):  # what matters is on the screen
                    write_exit(output_dir, "lost", None, message=told)
        end_process(EXIT_HUNG)


def _innermost(error: BaseException) -> FrameType:
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame


def find_hang(
    reports: dict[int, Report | None],
    silences: dict[int, float],
    own_rank: int,
    timeout_s: float,
    cut_off_s: float = 0.0,
) -> Hang | None:
    """Whether this rank's patience is over, and who is to blame; None as long as there is hope.

    A report is None of a rank that has never published; ``silences`` are the seconds since each of
    them was heard of, ``cut_off_s`` those for which the store has not answered.
    """
    own = reports[own_rank]
    assert own is not None
    if own.age <= timeout_s or 0 < cut_off_s <= timeout_s / 4:
        return None  # a busy store answers late: without it nobody knows who waits for whom
    hangs: dict[int, str] = {}
    waits: dict[Place, list[int]] = {}
    moves = False
    for rank, report in sorted(reports.items()):
        if silences[rank] > timeout_s / 4:
            if report is None:
                hangs[rank] = f"rank {rank} hangs: nothing was ever heard of it"
            else:
                hangs[rank] = (
                    f"rank {rank} ({report.process}) hangs: nothing was heard of it for at least "
                    f"{silences[rank]:.0f} seconds, after it had come to {report.what} and was in "
                    f"{report.place.line}"
                )
        elif report is None or report.paused or report.age < timeout_s / 2:
            moves = True
        elif report.place.collective is not None:
            waits.setdefault(report.place, []).append(rank)
        elif not own.paused:  # who is paused itself leaves that to the others
            hangs[rank] = (
                f"rank {rank} ({report.process}) hangs: it came to {report.what} "
                f"{report.age:.0f} seconds ago and is in {report.place.line}"
            )
    if moves and not hangs and cut_off_s <= timeout_s:
        return None  # the others will come
    parts = _first_few(list(hangs.values()))
    if cut_off_s > 0:
        parts.insert(0, f"rank {own_rank} ({own.process}) hears nothing of the host of rank 0")
    parts = parts or ["no rank makes progress"]
    waiting = []
    for place, ranks in waits.items():
        who = f"ranks {', '.join(_first_few([*map(str, ranks)]))} wait"
        who = who if len(ranks) > 1 else f"rank {ranks[0]} waits"
        waiting.append(f"{who} in {place.collective}, called by {place.line}")
    parts += _first_few(waiting)
    sentence = "; ".join([*parts, CONTINUES])
    collective = next((place.collective for place in waits), None)
    return Hang(list(hangs), collective, sentence[0].upper() + sentence[1:])


def _first_few(told: list[str]) -> list[str]:
    rest = len(told) - MOST_NAMED
    return [*told[:MOST_NAMED], f"{rest} more"] if rest > 0 else told


def find_place(frame: FrameType) -> Place:
    """Where a thread is, from its innermost frame."""
    collective, innermost = None, _line(frame)
    while frame.f_back is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if collective is None and module.startswith(COLLECTIVES) and not name.startswith("_"):
            collective = name
        if module.partition(".")[0] != "torch":
            break
        frame = frame.f_back
    while frame.f_globals.get("__name__", "").partition(".")[0] not in OURS:
        if frame.f_back is None:
            return Place(collective, innermost)
        frame = frame.f_back
    line = _line(frame)
    if collective is None and line != innermost:
        line = f"{innermost}, called by {line}"
    return Place(collective, line)


def _line(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"
