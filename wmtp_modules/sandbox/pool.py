"""The sandbox: opens a tier, tests what it claims, and runs jobs on a few workers."""

import fcntl
import logging
import os
import queue
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from wmtp_modules.sandbox import scratch, seccomp
from wmtp_modules.sandbox.contention import descendants
from wmtp_modules.sandbox.jobs import FunctionJob, Outcome, SandboxError, StdinJob
from wmtp_modules.sandbox.process import NOBODY, Server, ServerLost, why_no_namespaces
from wmtp_modules.sandbox.proof import measure_machine, prove
from wmtp_modules.sandbox.worker import Worker

TIERS = ("bubblewrap", "landlock", "rlimits")
FOLDER = "wmtp-sandbox-"  # holds the scratch folders of one Sandbox
MOST_TASKS = 256  # processes and threads of a program
# Threads of all programs of a user, where the kernel counts no others apart. Each program is one
# process there, so that its threads end with it; no such room for what can fork.
MOST_THREADS = 4096
MOST_RETIRED = 2  # servers of one worker that still tidy up after their last program
OWN_TASKS = 2  # of a server that has a namespace: itself, and who waits for it
COUNTS_APART = (5, 14)  # since this Linux RLIMIT_NPROC counts each user namespace by itself

log = logging.getLogger(__name__)
K = TypeVar("K")
Job = FunctionJob | StdinJob


class Sandbox:
    """Runs untrusted programs. A context manager.

    Args:
        tier: ``bubblewrap``, ``landlock``, ``rlimits`` or ``auto``: bubblewrap, else landlock. A
            named tier is used or raises an error; ``rlimits`` is used only when named.
        workers: programs that run at the same time.

    Attributes:
        tier: the tier in use.
        self_test: what was proven before the first program: True, or a sentence for a claim that
            the tier does not make.
        machine_factor: how much slower than the nominal machine this one runs Python, at least 1.

    Raises:
        SandboxError: if the tier is not available here, or its self-test fails.
    """

    def __init__(self, tier: str = "auto", workers: int = 2) -> None:
        if tier not in ("auto", *TIERS):
            raise SandboxError(f"there is no tier {tier!r}: use auto, {', '.join(TIERS)}")
        if workers < 1:
            raise SandboxError(f"workers must be at least 1, got {workers}")
        self._count = workers
        self._closed = False
        self._live: set[Worker] = set()
        self._threads: list[threading.Thread] = []
        self._inbox = queue.SimpleQueue()
        self._folder: str | None = None
        self._lock = -1  # of the folder
        self._counted = False  # whether servers count the threads of their programs
        self._apart = False  # whether the kernel counts the processes of each server by themselves
        try:
            self.tier = self._open_first(TIERS[:2] if tier == "auto" else (tier,))
            self.self_test = prove(self)
            self.machine_factor = measure_machine(self, workers)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def run(self, jobs: Iterable[tuple[K, Job]]) -> Iterator[tuple[K, Outcome]]:
        """Run jobs, as many at a time as there are workers.

        A program whose verdict others may have caused (``Worker.doubtful``), or whose fork server
        was lost, is judged again at the end, alone. That verdict stands.

        Args:
            jobs: pairs of a key and a job, consumed as workers become free.

        Yields:
            Key and outcome, in the order in which programs end.

        Raises:
            SandboxError: if the sandbox is closed, or cannot restart a lost server.
        """
        if self._closed:
            raise SandboxError("the sandbox is closed")
        outbox, waiting, again = queue.SimpleQueue(), iter(jobs), []
        running, alone = 0, False
        while True:
            while waiting is not None and running < self._count:
                item = next(waiting, None)
                if item is None:
                    waiting = None
                else:
                    self._inbox.put((*item, None, outbox))
                    running += 1
            if not running:
                if not again:
                    return
                self._inbox.put((*again.pop(0), outbox))
                running, alone = 1, True
            key, job, result, doubtful = outbox.get()
            running -= 1
            if not alone and (doubtful or isinstance(result, ServerLost)):
                again.append((key, job, result))
                continue
            # If the server is lost again, the program did it and is scored: wrecking its sandbox
            # must not be a way out. Only failures before the program starts are ours.
            if isinstance(result, ServerLost):
                verdict = "infrastructure" if result.ours else "crash"
                result = Outcome(verdict, 0.0, 0.0, f"{result}, twice")
            if isinstance(result, Exception):
                raise result
            yield key, result

    def close(self) -> None:
        """End every program and remove everything that was written."""
        self._closed = True
        for worker in list(self._live):
            worker.abandon()
        self._end_workers()

    def processes(self) -> set[int]:
        """Ids of all processes inside the sandbox now, for the self-test."""
        return descendants({pid for worker in self._live for pid in worker.pids})

    def _open_first(self, tiers: tuple[str, ...]) -> str:
        reasons = []
        for tier in tiers:
            try:
                self._open(tier)
            except SandboxError as error:
                reasons.append(f"tier {tier}: {error}")
                continue
            if reasons:
                log.warning("the sandbox runs at tier %s, because of %s", tier, reasons[0])
            return tier
        raise SandboxError(
            f"no sandbox ({'; '.join(reasons)}). Install bubblewrap 0.8 or later and libseccomp2, "
            "and allow user namespaces; docs/sandbox.md"
        )

    def _open(self, tier: str) -> None:
        walls = tier != "rlimits"
        try:
            code = seccomp.build_filter() if walls else b""
        except OSError as error:
            raise SandboxError(str(error)) from None
        remove_leftovers()
        self._apart = linux() >= COUNTS_APART
        if tier != "bubblewrap" and (reason := why_no_namespaces()):
            log.info("tier %s without namespaces: %s", tier, reason)
            self._apart = False
            self._folder, self._lock = make_folder()
        config: dict = {"filter": code.hex(), "process_id": seccomp.PROCESS_ID, "strays": not walls}
        config["on_disk"] = self._folder is not None
        self._counted = tier == "landlock" and not self._apart
        config["most_tasks"] = MOST_TASKS if self._counted else None
        started = queue.SimpleQueue()
        for number in range(self._count):
            arguments = (tier, config, started)
            thread = threading.Thread(
                target=self._work, args=arguments, daemon=True, name=f"sandbox-{number}"
            )
            self._threads.append(thread)
            thread.start()
        errors = [started.get() for _ in range(self._count)]
        if any(errors):
            self._end_workers()
            raise next(error for error in errors if error)

    def _end_workers(self) -> None:
        for _ in self._threads:
            self._inbox.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._folder is not None:
            remove_folder(self._folder, self._lock)
            self._folder = None

    def _work(self, tier: str, config: dict, started: queue.SimpleQueue) -> None:
        """A worker's thread. The kernel ends its servers with it."""
        worker, retired = None, []
        try:
            worker = self._start_worker(tier, config)
            started.put(None)
        except Exception as error:
            started.put(error)
        while (task := self._inbox.get()) is not None and not self._closed:
            key, job, before, outbox = task
            doubtful = False
            try:
                # The cause of the loss may affect it too.
                if isinstance(before, ServerLost) and worker is not None:
                    self._end_worker(worker)
                    worker = None
                worker = worker or self._start_worker(tier, config)
                if before is not None:
                    worker.prepare(self._tasks())
                result = worker.run(job)
                doubtful = worker.doubtful
            except Exception as error:
                result = ServerLost(str(error), ours=True) if type(error) is OSError else error
                if worker is not None:
                    self._end_worker(worker)
                    worker = None
            outbox.put((key, job, result, doubtful))
            if worker is not None and worker.worn:
                self._live.discard(worker)
                retired.append(worker.retire())
                worker = None
            if len(retired) > MOST_RETIRED:
                retired.pop(0).finish()
        if worker is not None:
            self._end_worker(worker)
        for server in retired:
            server.close()

    def _tasks(self) -> int:
        """RLIMIT_NPROC of a program now."""
        if self._apart:
            return MOST_TASKS + OWN_TASKS
        return count_tasks() + (MOST_THREADS if self._counted else MOST_TASKS)

    def _start_worker(self, tier: str, config: dict) -> Worker:
        programs = Server(tier, config, self._folder)
        try:
            judge = Server(tier, config | {"on_disk": False}, self._folder)
            worker = Worker(programs, judge)
        except BaseException:
            programs.close()
            raise
        worker.prepare(self._tasks())
        self._live.add(worker)
        if self._closed:
            self._end_worker(worker)
            raise SandboxError("the sandbox is closed")
        return worker

    def _end_worker(self, worker: Worker) -> None:
        self._live.discard(worker)
        worker.close()


def count_tasks() -> int:
    """Processes and threads of the user that runs programs, which RLIMIT_NPROC limits."""
    user = NOBODY if os.getuid() == 0 else os.getuid()
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue  # ended in the meantime
    return count


def linux() -> tuple[int, ...]:
    """The version of the kernel."""
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


def remove_leftovers() -> None:
    """Remove this user's folders of sandboxes that were killed; a running one holds its lock."""
    place = tempfile.gettempdir()
    for name in os.listdir(place):
        path = os.path.join(place, name)
        lock = lock_folder(path) if name.startswith(FOLDER) else None
        if lock is not None:
            try:
                remove_folder(path, lock)
            except OSError as error:  # the next start tries again; this one does not need it gone
                log.warning("%s of an earlier sandbox cannot be removed: %s", path, error.strerror)
                os.close(lock)


def make_folder() -> tuple[str, int]:
    """A new folder for scratch folders and its lock.

    An open descriptor holds the lock, so it is released however the process ends.
    """
    while True:
        path = tempfile.mkdtemp(prefix=FOLDER)
        os.chmod(path, 0o711)  # the user nobody must reach the folders in it
        lock = lock_folder(path)
        if lock is not None:
            return path, lock
        # Another process took it for a dead one's before it was locked.


def lock_folder(path: str) -> int | None:
    """Lock a folder of this user; None if it is gone, another user's, or in use."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.samestat(os.stat(path), os.fstat(folder))
        if same and os.fstat(folder).st_uid == os.geteuid():
            return folder
    except OSError:
        pass
    os.close(folder)
    return None


def remove_folder(path: str, lock: int) -> None:
    scratch.empty(lock)
    os.rmdir(path)
    os.close(lock)
