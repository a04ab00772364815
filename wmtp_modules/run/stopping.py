"""Stopping when asked to: a signal or ``max_hours``, on all ranks after the same micro-step.

A run that a scheduler, a time limit or Ctrl-C ends early saves, says so in ``exit.json`` and on
stderr, and every rank exits with 75, which schedulers read as "try again". torchrun turns that
into 1.

A scheduler's grace must cover the rest of a micro-step (or of a validation), one save, and
2 seconds. ``tune run`` waits 300 s for its workers before it kills them, torchrun 30:
``wmtp_modules/tune_plugin.py``. A run that is killed before it has saved resumes from the state
before.
"""

import atexit
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from wmtp_modules.files import new_file
from wmtp_modules.tune_plugin import note_spoken

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Where ranks know different reasons, the last of these is the one of all.
REASONS = (None, "max_hours", *(one.name for one in SIGNALS))
# Slurm and Kubernetes signal all processes of a job and torchrun passes its own signal on, so one
# request may arrive twice; what comes later than this is a second request.
DEBOUNCE_S = 2.0
# Outside of training nothing waits to be saved. A signal raises Stopped there, but not before the
# main thread leaves the C code it may be in, such as a barrier; after this long it is left alone.
PATIENCE_S = 10.0
LAST_WAIT_S = 60.0  # for the ranks that are still saving
AGREEMENT_TIMEOUT = timedelta(days=2)  # the watchdog speaks much earlier


class Stopped(BaseException):
    """A run ends for one of ``REASONS`` after a ``step`` that is saved (None outside of training).

    Not an ``Exception``: nothing may take it for a failure.
    """

    def __init__(self, reason: str, step: int | None = None) -> None:
        super().__init__(reason, step)
        self.reason, self.step = reason, step


class _Phase(Enum):
    RESUMABLE = "nothing to save: leave at once"
    STEPS = "leave where all ranks agree to"
    LEAVING = "this rank has saved"


class StopRequests:
    """Signals and the clock of this process. ``with`` installs it, in the main thread.

    A thread of its own sees every signal, also while the main thread is in a collective: Python
    runs signal handlers only between two of the main thread's instructions.

    Args:
        max_hours: hours from now after which the run must have ended; None for no limit.
        output_dir: where ``exit.json`` goes; None for nowhere.
        again: what continues the run, for the sentence at its end.

    Raises:
        ValueError: if ``max_hours`` is not above 0.
    """

    def __init__(
        self,
        max_hours: float | None = None,
        output_dir: str | os.PathLike | None = None,
        again: str = "the same command with resume_from_checkpoint=true",
    ) -> None:
        if max_hours is not None and not max_hours > 0:
            raise ValueError(f"max_hours {max_hours} is over before it begins: give more, or null")
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._output_dir, self._again = output_dir, again
        self._signal: str | None = None  # the first one's name, set by the main thread
        self._heard: tuple[str, float] | None = None  # the same and when, by the listening thread
        self._phase, self._phase_since = _Phase.RESUMABLE, time.monotonic()
        self._asked_at: float | None = None
        self._longest_step = self._longest_save = 0.0
        self._group: Any = None

    def __enter__(self) -> "StopRequests":
        global _installed
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._old_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._old_handlers = {one: signal.signal(one, self._handle) for one in SIGNALS}
        self._listener = threading.Thread(target=self._listen, name="stop requests", daemon=True)
        self._listener.start()
        _installed = self
        return self

    def __exit__(self, *_: object) -> None:
        global _installed
        _installed = None
        self._uninstall()
        os.write(self._write_fd, b"\0")
        self._listener.join()
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _uninstall(self) -> None:
        signal.set_wakeup_fd(self._old_fd)
        for one, handler in self._old_handlers.items():
            signal.signal(one, handler)

    @contextmanager
    def step_by_step(self) -> Iterator[None]:
        """Training: in this block a signal waits for ``agreed``. All ranks enter it.

        Raises:
            Stopped: at the end of the block, if a signal came after the last ``agreed``.
        """
        if not self._group:
            self._group = cast(Any, dist.new_group(backend="gloo", timeout=AGREEMENT_TIMEOUT))
        # No rank takes up a signal here while another still leaves at once because of it.
        dist.barrier(group=self._group)
        self._enter_phase(_Phase.STEPS)
        self._asked_at = None
        try:
            yield
        finally:
            self._enter_phase(_Phase.RESUMABLE)
        if self._signal:
            raise Stopped(self._signal)

    def agreed(self) -> str | None:
        """One of ``REASONS`` to stop now, the same on every rank, or None; once a micro-step.

        Any rank's signal counts, and rank 0's clock. A collective on the host, over a gloo group:
        on GPUs, whose hosts run ahead of them, it is where hosts wait for each other.
        """
        now = time.monotonic()
        if self._asked_at is not None:
            # Validation and saving between two calls count: they may come again.
            self._longest_step = max(self._longest_step, now - self._asked_at)
        self._asked_at = now
        reason = self._signal
        if reason is None and dist.get_rank() == 0 and self._deadline is not None:
            is_last_chance = now + self._longest_step + self._longest_save > self._deadline
            reason = "max_hours" if is_last_chance else None
        code = torch.tensor(REASONS.index(reason))
        dist.all_reduce(code, dist.ReduceOp.MAX, group=self._group)
        return REASONS[code]

    def note_save(self, seconds: float) -> None:
        """Tell how long a save took: ``max_hours`` leaves time for one more."""
        self._longest_save = max(self._longest_save, seconds)

    def _enter_phase(self, phase: _Phase) -> None:
        self._phase, self._phase_since = phase, time.monotonic()

    # --------------------------------------------------------------- signals

    def _handle(self, signum: int, frame: object) -> None:
        """In the main thread."""
        if self._signal is None:
            self._signal = signal.Signals(signum).name
            if self._phase is _Phase.RESUMABLE:
                raise Stopped(self._signal)

    def _listen(self) -> None:
        """In a thread: what must happen whatever the main thread is in."""
        while True:
            numbers = b""
            if select.select([self._read_fd], [], [], 1.0)[0]:
                numbers = os.read(self._read_fd, 64)
            if 0 in numbers:
                return
            now = time.monotonic()
            for signum in set(numbers).intersection(SIGNALS):
                if self._heard is None:
                    self._heard = (signal.Signals(signum).name, now)
                elif now - self._heard[1] > DEBOUNCE_S:
                    os._exit(EXIT_STOPPED if self._phase is _Phase.LEAVING else 128 + signum)
            if self._phase is _Phase.RESUMABLE:
                self._leave_alone(now)

    def _leave_alone(self, now: float) -> None:
        """Leave without the main thread, which does not hear or knows nothing of the time."""
        if self._heard is not None:
            reason, since = self._heard
            is_over = now - max(since, self._phase_since) > PATIENCE_S
        else:
            reason = "max_hours"
            is_over = _rank() == 0 and self._deadline is not None and now > self._deadline
        if is_over:
            self._tell(Stopped(reason))
            os._exit(EXIT_STOPPED)

    # ---------------------------------------------------------------- leaving

    def leave(self, stopped: Stopped) -> None:
        """End this process with 75, once all ranks have saved. Does not return.

        torchrun kills the other workers as soon as one has ended.
        """
        self._enter_phase(_Phase.LEAVING)
        self._tell(stopped)
        if stopped.step is not None:
            with suppress(RuntimeError):  # a rank that is gone or hangs holds up nobody
                last: Any = dist.barrier(group=self._group, async_op=True)
                last.wait(timedelta(seconds=LAST_WAIT_S))
        end_process(EXIT_STOPPED)

    def write_down(self, stopped: Stopped) -> OSError | None:
        """``exit.json`` of the command, by rank 0; returns why it could not be written."""
        if self._output_dir is not None:
            try:
                write_exit(self._output_dir, stopped.reason, stopped.step)
            except OSError as error:  # the disk is full: what matters is on it
                return error
        return None

    def _tell(self, stopped: Stopped) -> None:
        """In ``exit.json`` and one sentence, by rank 0."""
        if _rank() != 0:
            return
        when = "outside of training"
        if stopped.step is not None:
            when = f"after step {stopped.step}, which is saved"
        told = f"Stopped by {stopped.reason} {when}: {self._again} continues from there"
        if error := self.write_down(stopped):
            told += f"; exit.json could not be written ({error})"
        sys.stderr.write(f"\n{told}\n")
        sys.stderr.flush()
        note_spoken()


def end_process(code: int) -> None:
    """End at last: what is registered to run at exit runs, but no thread or network holds it up."""
    for one in SIGNALS:  # torchrun sends another one as soon as the fastest rank has ended
        signal.signal(one, signal.SIG_IGN)
    timer = threading.Timer(PATIENCE_S, os._exit, (code,))
    timer.daemon = True
    timer.start()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_installed: StopRequests | None = None


def _forget_in_child() -> None:
    """A forked child, such as one of a pool that tokenises, is ended by signals as usual.

    It would report its own signals in the parent's pipe.
    """
    if _installed is not None:
        _installed._uninstall()


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def exit_code(stops: StopRequests) -> Iterator[None]:
    """End the process as ``StopRequests.leave`` does if the block raises ``Stopped``."""
    try:
        yield
    except Stopped as stopped:
        stops.leave(stopped)


def _rank() -> int:
    """Also before there is a process group."""
    return int(os.environ.get("RANK", 0))


# -------------------------------------------------------------------- exit.json


def write_exit(
    output_dir: str | os.PathLike, reason: str, step: int | None, **more: object
) -> None:
    """Write ``exit.json``, whole or not at all. Rank 0 calls it.

    ``step`` is the last optimizer step that is saved; None if it is not known here.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / "exit.json") as unfinished:
        unfinished.write_text(json.dumps({"reason": reason, "step": step, **more}, indent=1))


def clear_exit(output_dir: str | os.PathLike) -> None:
    """Remove the ``exit.json`` of an earlier start: the run continues."""
    (Path(output_dir) / "exit.json").unlink(missing_ok=True)
