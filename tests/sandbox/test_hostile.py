"""What hostile programs may cost: a verdict that is never ``pass``, and nothing of the host.

``fakes.txt`` claims to solve tasks, ``probes.txt`` tries to get out and prints what worked, and
``benign.txt`` looks odd but is in order. Each tier runs all of them once, then every program is
looked at, and the host too.
"""

import contextlib
import os
import re
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from wmtp_modules.sandbox.jobs import VERDICTS, FunctionJob, Limits, StdinJob
from wmtp_modules.sandbox.process import NOBODY

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
TESTS = "for n in (3, -4, 5):\n    assert square(n) == n * n\n"
CASES = (("3\n", "9"), ("-4\n", "16"))


def read_programs(name):
    """Sections ``=== name: verdicts | options``, each with a program and maybe its own tests."""
    parts = re.split(r"^=== (.*)\n", (HERE / name).read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def same_words(expected, actual):
    return None if expected.split() == actual.split() else f"{expected!r} is not {actual[-300:]!r}"


def read_fakes():
    sections = read_programs("fakes.txt")
    jobs, accepted = {}, {}
    for head, text in sections.items():
        if ":" not in head:
            continue  # a piece that others start with
        name, verdicts, options = re.fullmatch(r"(\w+): ([\w ]+?)(?: \| (.*))?", head).groups()
        options = dict(option.partition("=")[::2] for option in (options or "").split())
        program, _, tests = text.partition("--- tests\n")
        program = sections.get(options.get("with"), "") + program
        limits = Limits(float(options.get("seconds", 20)), 256)
        jobs[name] = (
            StdinJob(program, CASES, same_words, output_file=options.get("output"), limits=limits)
            if "script" in options
            else FunctionJob(program, tests or TESTS, limits=limits)
        )
        accepted[name] = verdicts.split()
        assert set(accepted[name]) < set(VERDICTS) - {"pass", "infrastructure"}
    for name, program in {"null_in_source": "x = 1\0\n", "surrogates": "x = '\ud800'\n"}.items():
        jobs[name], accepted[name] = FunctionJob(program, TESTS), ["crash"]
    return jobs, accepted


FAKES, ACCEPTED = read_fakes()
PROBES = {name: text for name, text in read_programs("probes.txt").items() if name != "try"}
BENIGN = read_programs("benign.txt") | {"crlf": "n = int(input())\r\nif n:\r\n    print(n * n)\r\n"}


class Host:
    """Places and doors of this machine that programs try to reach, and what became of them."""

    def __init__(self, folder):
        self.outside = folder / "outside"
        self.outside.mkdir()
        self.outside.chmod(0o777)
        for parent in self.outside.parents:
            if parent.stat().st_uid == os.getuid():
                parent.chmod(parent.stat().st_mode | 0o011)
        self.kept = self.outside / "kept"
        self.kept.write_text("kept")
        self.kept.chmod(0o666)
        self.stat = self.kept.stat()
        self.marker = f"escaped-{os.urandom(6).hex()}"
        self.stream = socket.create_server(("127.0.0.1", 0))
        port = self.stream.getsockname()[1]
        self.datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagram.bind(("127.0.0.1", port))
        self.sockets = [self.stream, self.datagram]
        for kind, address in (
            (socket.SOCK_STREAM, f"{self.outside}/stream"),
            (socket.SOCK_DGRAM, f"{self.outside}/datagram"),
            (socket.SOCK_STREAM, f"\0{self.marker}"),
        ):
            self.sockets.append(socket.socket(socket.AF_UNIX, kind))
            self.sockets[-1].bind(address)
            if not address.startswith("\0"):
                os.chmod(address, 0o777)
            if kind == socket.SOCK_STREAM:
                self.sockets[-1].listen()
        for each in self.sockets:
            each.setblocking(False)
        with socket.create_server(("127.0.0.1", 0)) as unused:
            free_port = unused.getsockname()[1]
        self.victim = subprocess.Popen(["sleep", "600"])
        self.names = {
            "outside": str(self.outside),
            "marker": self.marker,
            "port": port,
            "free_port": free_port,
            "stream_socket": f"{self.outside}/stream",
            "datagram_socket": f"{self.outside}/datagram",
            "abstract": self.marker,
            "home": str(Path.home()),
            "repository": str(Path(__file__).parents[2]),
            "parent": os.getpid(),
            "victim": self.victim.pid,
        }

    def close(self):
        for each in self.sockets:
            each.close()
        self.victim.kill()
        self.victim.wait()


def is_contacted(listener):
    try:
        listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(100)
    except BlockingIOError:
        return False
    return True


@pytest.fixture(scope="module", params=["bubblewrap", "landlock"])
def batch(request, tmp_path_factory, open_sandbox):
    """All programs, run: outcomes by name, the host, and what is left of the sandbox."""
    host = Host(tmp_path_factory.mktemp("host"))
    start = f"HOST = {host.names!r}\n" + read_programs("probes.txt")["try"]
    jobs = {("fake", name): job for name, job in FAKES.items()}
    for name, text in PROBES.items():
        script = f"{start}{text}\nprint(worked or 'held')\n"
        jobs["probe", name] = StdinJob(script, (("", "held"),), same_words)
    for name, text in BENIGN.items():
        jobs["benign", name] = StdinJob(text, CASES, same_words)
    before = {"descriptors": len(os.listdir("/proc/self/fd")), "shm": shared_memory()}
    os.environ["SANDBOX_SECRET"] = "secret"
    try:
        with open_sandbox(request.param) as sandbox:
            inside = sandbox.processes()
            outcomes = dict(sandbox.run(jobs.items()))
            after = sandbox.processes()
            left = {}
            look = "import os\ns = os.statvfs('.')\nprint(os.listdir('.'), s.f_files - s.f_ffree)"
            list(sandbox.run((n, StdinJob(look, (("", n),), left.__setitem__)) for n in "abcd"))
        yield {
            "outcomes": outcomes,
            "host": host,
            "inside": inside,
            "after": after,
            "left": left,
            "before": before,
            "tier": request.param,
        }
    finally:
        del os.environ["SANDBOX_SECRET"]
        host.close()


@pytest.mark.parametrize("name", FAKES)
def test_a_program_that_fakes_or_breaks_is_seen_through(batch, name):
    outcome = batch["outcomes"]["fake", name]
    assert outcome.verdict in ACCEPTED[name], outcome
    assert len(outcome.detail) <= 2000
    assert all(c.isprintable() or c in "\n\t" for c in outcome.detail)
    if outcome.verdict == "timeout":
        assert outcome.seconds < FAKES[name].limits.seconds + 10  # of a busy machine


@pytest.mark.parametrize("name", PROBES)
def test_nothing_that_a_program_tries_against_the_host_works(batch, name):
    outcome = batch["outcomes"]["probe", name]
    assert outcome.verdict == "pass", outcome


@pytest.mark.parametrize("name", BENIGN)
def test_a_program_that_is_in_order_passes(batch, name):
    outcome = batch["outcomes"]["benign", name]
    assert outcome.verdict == "pass", outcome


def shared_memory():
    """Segments of the user that programs run as; not the files of another test's self-test."""
    user = NOBODY if os.getuid() == 0 else os.getuid()
    found = set()
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process's, removed meanwhile
            if path.lstat().st_uid == user and not path.name.startswith("escaped-"):
                found.add(path.name)
    return found


def test_the_host_is_as_it_was(batch):
    host, before = batch["host"], batch["before"]
    assert host.victim.poll() is None
    assert sorted(os.listdir(host.outside)) == ["datagram", "kept", "stream"]
    now = host.kept.stat()
    for field in ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_ino", "st_nlink"):
        assert getattr(now, field) == getattr(host.stat, field), field
    assert not any(map(is_contacted, host.sockets))
    for folder in ("/tmp", "/var/tmp", "/dev/shm", "/", "/etc", "/usr/lib", "/run", Path.home()):
        assert not os.path.exists(f"{folder}/{host.marker}")
    socket.create_server(("127.0.0.1", host.names["free_port"])).close()  # nobody listens there
    assert shared_memory() <= before["shm"]
    assert len(os.listdir("/proc/self/fd")) == before["descriptors"]


def test_no_process_and_no_file_outlives_its_program(batch):
    assert batch["after"] == batch["inside"]
    assert not list(filter(is_alive, batch["inside"]))
    for left in batch["left"].values():
        assert left.startswith("['program.py'] ")  # that which looks
        if batch["tier"] == "bubblewrap":
            assert left == "['program.py'] 2\n"  # inodes of the tmpfs: no memory is held
    folders = [f for f in os.listdir(tempfile.gettempdir()) if f.startswith("wmtp-sandbox-")]
    owned = [f for f in folders if os.stat(f"{tempfile.gettempdir()}/{f}").st_uid == os.getuid()]
    assert not [f for f in owned if batch["tier"] == "landlock" and is_ours(f)]


def is_alive(pid):
    """A zombie waits only for the init of this machine to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_ours(folder):
    """Whether a folder's lock is free: that of a running sandbox of somebody else is not."""
    import fcntl

    descriptor = os.open(f"{tempfile.gettempdir()}/{folder}", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
