"""Starts recipes and ranks by fork: importing torch and a recipe takes longer than most runs do.

As a program this file is the server: it imports what recipes import and waits. Each start is one
connection. A keeper, forked from the server, is the parent of that start's processes, in a session
of its own, as a launcher is of its ranks; it kills the whole session when the time is over or the
connection closes, so that nothing outlives the test or pytest.

A forked process has its own command line, environment, folder, output files and random seeds, runs
a file as ``__main__``, and ends as any interpreter does. What it does not have is the interpreter's
start: a test of that starts a real process. ``/proc/PID/environ`` is the server's. Pictures are
not drawn: a run of a few steps takes no longer than its picture would.
"""

import contextlib
import errno
import gc
import importlib
import importlib.util
import json
import os
import pickle
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELOADED = (
    *("torch", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torchtune"),
    *("datasets", "matplotlib.figure", "matplotlib.backends.backend_agg", "sentencepiece"),
    *("mlflow", "mlflow.store.tracking.sqlalchemy_store", "mlflow.server", "sklearn.metrics"),
)
TIMEOUT_S = 180.0  # of one start, on a machine that does other things meanwhile
KILLED_AFTER_S = 30.0  # torchrun's patience with ranks that it has asked to end
# What another launcher has told pytest is not for the ranks that pytest starts.
NOT_INHERITED = ("PET_", "TORCHELASTIC", "PYTEST_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


class TimedOut(AssertionError):
    """A start took longer than its test allows; it has been killed."""


# -------------------------------------------------------------------------------- client


class Started:
    """Processes of one start. ``returncodes`` are as of ``subprocess``: -9 is a kill.

    Attributes:
        pids: process ids by rank.
        log_out: file with what they all wrote to stdout.
        log_err: the same of stderr.
        cpu_s: processor seconds of those that have ended.
    """

    def __init__(self, connection: socket.socket, out: Path, err: Path, is_ranks: bool) -> None:
        self._connection, self._lines = connection, b""
        self.log_out, self.log_err = out, err
        self._is_ranks, self.cpu_s = is_ranks, 0.0
        self._codes: dict[int, int] = {}
        hello = self._next(120)
        assert hello, f"the fork server did not answer; {err}"
        self._keeper, self.pids = hello["keeper"], hello["pids"]

    def _next(self, timeout: float) -> dict | None:
        """The keeper's next line; None if none comes in time."""
        end = time.monotonic() + timeout
        while b"\n" not in self._lines:
            left = max(0.0, end - time.monotonic())
            if not select.select([self._connection], [], [], left)[0]:
                return None
            found = self._connection.recv(65536)
            if not found:
                raise AssertionError(f"the keeper is gone; stderr: {self.stderr[-2000:]}")
            self._lines += found
        line, _, self._lines = self._lines.partition(b"\n")
        return json.loads(line)

    def _listen(self, timeout: float) -> bool:
        message = self._next(timeout)
        if message is None:
            return False
        if message.get("timed_out"):
            self.close()
            raise TimedOut(f"killed after {message['timed_out']} s; stderr: {self.stderr[-2000:]}")
        self._codes[message["rank"]] = message["code"]
        self.cpu_s += message["cpu_s"]
        return True

    def poll(self) -> list[int | None]:
        """Exit codes by rank, None of what runs."""
        while len(self._codes) < len(self.pids) and self._listen(0):
            pass
        return [self._codes.get(rank) for rank in range(len(self.pids))]

    def wait(self, timeout: float = 2 * TIMEOUT_S, rank: int | None = None) -> list[int]:
        """Wait for all, or for one rank: exit codes. The start's own timeout ends it earlier."""
        end, awaited = time.monotonic() + timeout, range(len(self.pids)) if rank is None else [rank]
        while any(self.poll()[one] is None for one in awaited):
            if time.monotonic() > end:
                self.close()
                raise TimedOut(f"runs after {timeout} s; stderr: {self.stderr[-2000:]}")
            self._listen(min(0.2, max(0.0, end - time.monotonic())))
        return [self._codes[one] for one in awaited]

    @property
    def returncode(self) -> int:
        """As of ``tune run``, after all have ended: of several ranks torchrun only tells 0 or 1."""
        codes = self.wait()
        return int(any(codes)) if self._is_ranks else codes[0]

    def send_signal(self, signum: int, rank: int = 0) -> None:
        if self.poll()[rank] is None:
            os.kill(self.pids[rank], signum)

    def kill_launcher(self) -> None:
        """What is left when a launcher is killed with -9: it tells its ranks nothing."""
        os.kill(self._keeper, signal.SIGKILL)

    def alive(self) -> list[int]:
        """All living processes of this start but the keeper, zombies left out."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session, *_ = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            if state != "Z" and int(session) == self._keeper and stat.parent.name != session:
                found.append(int(stat.parent.name))
        return [pid for pid in found if pid != self._keeper]

    def wait_for_end(self, timeout: float = TIMEOUT_S) -> list[int]:
        """Exit codes, after nothing of this start lives any more."""
        codes, end = self.wait(timeout), time.monotonic() + timeout
        while left := self.alive():
            assert time.monotonic() < end, f"left behind: {left}"
            time.sleep(0.02)
        return codes

    @property
    def stdout(self) -> str:
        return self.log_out.read_text()

    @property
    def stderr(self) -> str:
        return self.log_err.read_text()

    @property
    def writes(self) -> list[str]:
        """Files that were written, in order, of a start with ``full_disk``."""
        return Path(f"{self.log_out}.writes").read_text().splitlines()

    def close(self) -> None:
        """Kill what is left."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
            self._connection.settimeout(30)
            while self._connection.recv(65536):  # until the keeper is gone
                pass
        self._connection.close()
        with contextlib.suppress(OSError):  # where it was killed before
            os.killpg(self._keeper, signal.SIGKILL)


class ForkServer:
    """The server's process, which starts with the first use.

    Args:
        folder: for output files and for what ``datasets`` caches.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._n_starts = folder, 0
        self._process: subprocess.Popen | None = None
        self._started: list[Started] = []

    def _connect(self) -> socket.socket:
        if self._process is None:
            self._place = Path(tempfile.mkdtemp(prefix="wmtp"))  # a socket's path has to be short
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(self._place / "s")],
                cwd=ROOT,
                env=self._environment({}),
                stdin=subprocess.PIPE,  # it ends when this closes
                start_new_session=True,
            )
        connection = socket.socket(socket.AF_UNIX)
        end = time.monotonic() + 300
        while connection.connect_ex(str(self._place / "s")):
            assert self._process.poll() is None, "the fork server has ended: see its error above"
            assert time.monotonic() < end, "the fork server did not start in time"
            time.sleep(0.05)
        return connection

    def _environment(self, changes: Mapping[str, str]) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
        kept |= {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(self._folder / "datasets")}
        return kept | {name: str(value) for name, value in changes.items()}

    def _start(self, what: dict, *, ranks, cwd, env, timeout, launched, killed_after) -> Started:
        connection = self._connect()
        self._n_starts += 1
        out, err = (self._folder / f"{self._n_starts}.{name}" for name in ("stdout", "stderr"))
        for path in (out, err):
            path.touch()
        request = what | {
            "ranks": ranks,
            "cwd": str(cwd),
            "env": self._environment(env),
            "timeout": timeout,
            "launched": launched,
            "killed_after": killed_after,
            "stdout": str(out),
            "stderr": str(err),
        }
        connection.sendall(json.dumps(request).encode() + b"\n")
        started = Started(connection, out, err, ranks is not None)
        self._started.append(started)
        return started

    def start(
        self,
        argv: Sequence[object],
        *,
        ranks: int | None = None,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT_S,
        launched: bool = True,
        killed_after: float = KILLED_AFTER_S,
        full_disk: tuple[Path, str | int] | None = None,
    ) -> Started:
        """Start what ``python`` would with these arguments, or ``tune run`` with a recipe's.

        Args:
            argv: a file and its arguments, or ``-m``, a module and its arguments.
            ranks: how many ranks join each other; None for one process without RANK.
            cwd: its folder, first on ``sys.path``.
            env: changes to this process's environment.
            timeout: seconds after which all is killed, and ``wait`` raises.
            launched: whether there is a launcher, which ends the ranks as soon as one has failed
                and with which the ranks end; else each rank is on its own.
            killed_after: seconds between SIGTERM and SIGKILL to those ranks.
            full_disk: a folder, and when its disk is full: from the n-th write on, or from the
                first to a file with this in its path. See ``fill_disk`` and ``Started.writes``.
        """
        what = {"argv": [str(arg) for arg in argv]}
        if full_disk is not None:
            what["full_disk"] = [str(full_disk[0]), full_disk[1]]
        return self._start(
            what,
            ranks=ranks,
            cwd=cwd,
            env=env or {},
            timeout=timeout,
            launched=launched,
            killed_after=killed_after,
        )

    def run(self, argv: Sequence[object], **options) -> Started:
        """``start`` and wait for the end."""
        started = self.start(argv, **options)
        started.wait()
        return started

    def call(self, function: Callable, *args, ranks: int = 2, timeout: float = TIMEOUT_S) -> None:
        """``function(rank, *args)`` in ranks, as ``torch.multiprocessing.spawn`` would.

        Args:
            function: at the top of a file, which the ranks import under another name; its
                arguments are pickled.
        """
        file = self._folder / f"arguments_{self._n_starts}.pickle"
        file.write_bytes(pickle.dumps(args))
        code = function.__code__
        started = self._start(
            {"call": [code.co_filename, function.__name__, str(file)], "argv": [code.co_filename]},
            ranks=ranks,
            cwd=ROOT,
            env={},
            timeout=timeout,
            launched=True,
            killed_after=5.0,
        )
        codes = started.wait()
        assert not any(codes), f"exit codes {codes}:\n{started.stderr[-4000:]}"

    def close_started(self) -> None:
        """Kill what a test has left."""
        for started in self._started:
            started.close()
        self._started.clear()

    def close(self) -> None:
        self.close_started()
        if self._process is not None:
            self._process.stdin.close()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            shutil.rmtree(self._place, ignore_errors=True)


# -------------------------------------------------------------------------------- server


def save_nothing(figure: object, target: object, **options: object) -> None:
    """In place of ``Figure.savefig``, to a path or a file."""
    if hasattr(target, "write"):
        target.write(b"not drawn")
    else:
        Path(target).write_bytes(b"not drawn")


def preload() -> None:
    """Import what recipes import. They themselves are read again at every start."""
    for name in PRELOADED:
        importlib.import_module(name)
    for path in sorted(ROOT.glob("recipes/*_*.py")):
        spec = importlib.util.spec_from_file_location(f"preloaded_{path.stem}", path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    from matplotlib.figure import Figure

    Figure.savefig = save_nothing
    gc.collect()
    gc.freeze()  # collections in children leave these pages shared


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def serve(path: str) -> dict:
    """Fork a keeper for each connection. Returns in the processes that are asked for only."""
    preload()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [], 1.0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # keepers that have ended
                pass
        if sys.stdin in ready:  # pytest has ended, and may have been killed
            shutil.rmtree(os.path.dirname(path), ignore_errors=True)
            os._exit(0)
        if listener in ready:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return keep(connection)
            connection.close()


def keep(connection: socket.socket) -> dict:
    """Fork what is asked for and tell how it ends. Returns in those processes only."""
    os.setsid()
    data = b""
    while not data.endswith(b"\n"):
        found = connection.recv(65536)
        if not found:  # closed before it asked for anything
            os._exit(0)
        data += found
    request = json.loads(data)
    n_ranks, place = request["ranks"], {}
    if n_ranks is not None:
        place = {"WORLD_SIZE": n_ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
        if request["launched"]:
            place |= {"TORCHELASTIC_RUN_ID": "fork server", "LOCAL_WORLD_SIZE": n_ranks}
    pids: dict[int, int] = {}
    for rank in range(n_ranks or 1):
        pid = os.fork()
        if pid == 0:
            connection.close()
            own = {} if n_ranks is None else {"RANK": rank, "LOCAL_RANK": rank}
            request["env"] |= {name: str(value) for name, value in (place | own).items()}
            return request
        pids[pid] = rank
    try:
        watch(connection, request, pids)
    finally:
        os.killpg(0, signal.SIGKILL)


def watch(connection: socket.socket, request: dict, pids: dict[int, int]) -> None:
    """Tell of every end until the connection closes or the time is over."""

    def tell(**message: object) -> None:
        connection.sendall(json.dumps(message).encode() + b"\n")

    tell(keeper=os.getpid(), pids=list(pids))
    end, killing_at = time.monotonic() + request["timeout"], float("inf")
    running = dict(pids)
    while True:
        for pid, rank in list(running.items()):
            done, status, used = os.wait4(pid, os.WNOHANG)
            if not done:
                continue
            del running[pid]
            code = os.waitstatus_to_exitcode(status)
            tell(rank=rank, code=code, cpu_s=used.ru_utime + used.ru_stime)
            if code and request["launched"] and killing_at == float("inf"):
                killing_at = time.monotonic() + request["killed_after"]
                for other in running:
                    os.kill(other, signal.SIGTERM)
        if time.monotonic() > killing_at:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        if running and time.monotonic() > end:
            tell(timed_out=request["timeout"])
            return
        if select.select([connection], [], [], 0.02 if running else None)[0]:
            return  # closed


def become(request: dict) -> Callable[[], object]:
    """Take on the command line, environment, folder, files and chance of a new process."""
    for stream, name in enumerate((os.devnull, request["stdout"], request["stderr"])):
        file = os.open(name, os.O_WRONLY | os.O_APPEND if stream else os.O_RDONLY)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    random.seed()
    import datasets
    import numpy as np

    np.random.seed()
    datasets.config.HF_DATASETS_CACHE = Path(request["env"]["HF_DATASETS_CACHE"])
    if "full_disk" in request:
        fill_disk(*request["full_disk"], Path(f"{request['stdout']}.writes"))
    argv = request["argv"]
    if "call" in request:
        return lambda: call(*request["call"])
    if argv[0] == "-m":
        spec = importlib.util.find_spec(argv[1])
        sys.argv = [spec.origin, *argv[2:]]
        return lambda: run_main(spec.origin, spec)
    sys.argv = [os.path.abspath(argv[0]), *argv[1:]]
    return lambda: run_main(sys.argv[0], None)


def fill_disk(folder: str, when: str | int, log: Path) -> None:
    """Let writes to files of a folder fail as on a full disk: at ``os.write`` and ``os.fsync``.

    All that has to outlive a crash goes through one of the two, and a disk may tell as late as
    at fsync that it is full.

    Args:
        folder: whose files.
        when: number of the first write that fails, or what the path of its file contains.
        log: gets the path of every write; a number too large to come makes a list of them.
    """
    seen: list[str] = []
    is_full = False

    def limited(function: Callable) -> Callable:
        def write(fd: int, *args: object) -> object:
            nonlocal is_full
            path = os.readlink(f"/proc/self/fd/{fd}") if isinstance(fd, int) else ""
            if not path.startswith(folder):
                return function(fd, *args)
            seen.append(path)
            with log.open("a") as file:
                file.write(path + "\n")
            is_full |= len(seen) >= when if isinstance(when, int) else when in path
            if is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(fd, *args)

        return write

    os.write, os.fsync = limited(os.write), limited(os.fsync)


def run_main(path: str, spec: object) -> None:
    main = types.ModuleType("__main__")
    main.__file__, main.__spec__ = path, spec
    sys.modules["__main__"] = main
    exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)


def call(path: str, name: str, arguments: str) -> None:
    spec = importlib.util.spec_from_file_location(f"called_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    getattr(module, name)(int(os.environ["RANK"]), *pickle.loads(Path(arguments).read_bytes()))


if __name__ == "__main__":
    become(serve(sys.argv[1]))()
