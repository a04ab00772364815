"""Starts, uses and ends one fork server, from the trusted parent."""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from wmtp_modules.sandbox import scratch
from wmtp_modules.sandbox.contention import descendants
from wmtp_modules.sandbox.jobs import SandboxError

HERE = Path(__file__).parent
NOBODY = 65534
# Modules that run inside, in this order.
INSIDE = ("wire", "kinds", "shared", "scratch", "substitutes", "program", "judge", "server")
START_SECONDS = 30
BACKSTOP_SECONDS = 10  # for a server to answer after the time of its program

BOOTSTRAP = """
import sys, types
for name, source in {sources!r}:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, f"<{{name}}>", "exec"), module.__dict__)
program = sys.modules["program"]
script = sys.modules["server"].serve({control}, {config!r})
if script:  # this is a fork of the server
    for name in {names!r}:
        del sys.modules[name]  # the script may have modules of these names
    # Here, because no other frames of ours shall be below the script's.
    try:
        exec(compile(script.source, script.path, "exec", dont_inherit=True), script.namespace)
    except SystemExit:
        raise
    except BaseException as error:
        program.fail(error)
"""


def launcher(tier: str, **config) -> list[str]:
    """The command that starts ``launch.py``."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    config |= {"tier": tier, "python": python, "prefix": sys.base_prefix}
    config |= {"scratch_bytes": scratch.MOST_BYTES, "scratch_inodes": 2 * scratch.MOST_FILES}
    return [python, "-I", "-S", "-B", str(HERE / "launch.py"), json.dumps(config)]


def why_no_namespaces() -> str | None:
    """Why the kernel grants this process no namespaces; None if it does."""
    done = subprocess.run(
        launcher("namespaces"), capture_output=True, stdin=subprocess.DEVNULL, text=True
    )
    return done.stderr.strip()[-200:] or "unknown reason" if done.returncode else None


def end_session(leader: int) -> None:
    """End what runs in a session or stems from its leader: programs that outlived their server."""
    for _ in range(500):
        found = descendants([leader]) - {leader}
        if not found:
            return
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


class ServerLost(Exception):
    """A fork server ended, or does not answer; ``ours``: before the program could be to blame."""

    def __init__(self, reason: str, ours: bool = False) -> None:
        super().__init__(reason)
        self.ours = ours


class Server:
    """A fork server within the walls of a tier; runs one program at a time.

    Start it from a thread that lives as long: the kernel ends it with that thread.

    Args:
        tier: of the walls.
        config: for ``server.serve``.
        folder: holds the scratch folder; None if the server gets a file system of its own, as
            bubblewrap gives it, and namespaces where ``why_no_namespaces`` finds no obstacle.

    Attributes:
        streams: at tier bubblewrap, the ends to read of the named pipes that /dev/stdout and
            /dev/stderr are inside; elsewhere these lead to whatever a program is given.

    Raises:
        SandboxError: if the tier is not available, with the reason.
    """

    def __init__(self, tier: str, config: dict, folder: str | None) -> None:
        self._strays = tier == "rlimits" and folder is not None
        own = None if folder is None else tempfile.mkdtemp(dir=folder)
        if own is not None and os.getuid() == 0:
            os.chown(own, NOBODY, NOBODY)
        bwrap = shutil.which("bwrap")
        if tier == "bubblewrap" and bwrap is None:
            raise SandboxError("bubblewrap is not installed (apt-get install bubblewrap)")
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        launch = {"bwrap": bwrap, "scratch": own, "parent": os.getpid()}
        sources = [(name, (HERE / f"{name}.py").read_text("utf-8")) for name in INSIDE]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            launcher(tier, **launch),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # a keyboard interrupt is for the parent only
        )
        self.pid = self._process.pid
        self.tasks = 0  # RLIMIT_NPROC of programs: processes and threads
        self.reply: dict | None = None
        self.streams: list[int] = []
        config = config | {"streams": tier == "bubblewrap"}
        text = BOOTSTRAP.format(
            sources=sources, names=INSIDE, control=theirs.fileno(), config=config
        )
        theirs.close()
        script = self._process.stdin
        assert script is not None
        try:
            script.write(text.encode())
            script.close()
            ready = None
            if self._answers(START_SECONDS):
                ready, self.streams, _, _ = socket.recv_fds(self.link, 100, 2)
        except OSError:  # it ended before it read everything
            ready = None
        if not ready:
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise SandboxError(
                f"tier {tier} cannot start: {lines[-1] if lines else 'unknown reason'}"
            )

    def fileno(self) -> int:
        return self.link.fileno()

    def start(self, request: dict, descriptors: list[int]) -> None:
        """Start a program. The descriptors are copied; close yours."""
        self.reply = None
        try:
            data = json.dumps({**request, "tasks": self.tasks}).encode()
            socket.send_fds(self.link, [data], descriptors)
        except OSError as error:
            raise ServerLost(f"a fork server is gone: {error}") from None

    def receive(self) -> dict:
        """Read the pending reply, into ``reply`` too."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self.link, 1 << 16, 4)
        except OSError as error:
            raise ServerLost(f"a fork server is gone: {error}") from None
        if not data:
            raise ServerLost("a fork server ended while a program ran")
        reply = json.loads(data)
        if "failed" in reply:
            raise ServerLost(reply["failed"], ours=True)
        self.reply = reply | {"descriptors": descriptors}
        return self.reply

    def stop(self) -> dict:
        """End the program if it still runs; its reply."""
        if self.reply is not None:
            return self.reply
        try:
            self.link.send(b'{"kill": true}')
        except OSError as error:
            raise ServerLost(f"a fork server is gone: {error}") from None
        if not self._answers(BACKSTOP_SECONDS):
            raise ServerLost(f"a fork server did not answer within {BACKSTOP_SECONDS} s")
        return self.receive()

    def _answers(self, seconds: float) -> bool:
        """Whether something arrives in time. Not ``select``, which is limited to 1,024 files."""
        poller = select.poll()
        poller.register(self.link, select.POLLIN)
        return bool(poller.poll(seconds * 1000))

    def abandon(self) -> None:
        """Cut the connection, from any thread: the server ends, and waiting threads are told."""
        with contextlib.suppress(OSError):  # it may already be closed
            self.link.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        """Wait until a worn server has removed what its last program wrote."""
        self._process.wait()
        self.close()

    def close(self) -> None:
        """End the server and everything inside."""
        self.link.close()
        for stream in self.streams:
            os.close(stream)
        self.streams = []
        if self._strays and self._process.returncode is None:
            os.kill(self.pid, signal.SIGKILL)  # it is not waited for, so the id is still its own
            end_session(self.pid)
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        self._errors.close()
