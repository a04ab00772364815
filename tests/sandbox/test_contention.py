"""No program, and nothing else that the user runs, makes the verdict on another one wrong.

Each tier is tried as it is here and, below bubblewrap, as where the kernel grants no namespaces.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from wmtp_modules.sandbox import pool, worker
from wmtp_modules.sandbox.contention import descendants
from wmtp_modules.sandbox.jobs import FunctionJob, Limits, StdinJob
from wmtp_modules.sandbox.pool import FOLDER, Sandbox
from wmtp_modules.sandbox.process import NOBODY
from wmtp_modules.sandbox.worker import Worker

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
KINDS = ("bubblewrap", "landlock", "rlimits", "landlock alone", "rlimits alone")


@pytest.fixture(scope="module", params=KINDS)
def sandbox(request, open_sandbox):
    tier, _, alone = request.param.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        if alone:
            patch.setattr(pool, "why_no_namespaces", lambda: "they are switched off")
        with open_sandbox(tier) as sandbox:
            assert not (alone and sandbox._apart)
            yield sandbox


@pytest.fixture
def tries(monkeypatch):
    """How often each job was run, and what to do beside its first run."""
    run, counts, beside = Worker.run, {}, []

    def counted(self, job):
        counts[job] = counts.get(job, 0) + 1
        old = descendants([self._programs.pid])
        threads = []
        if counts[job] == 1:
            threads = [threading.Thread(target=each, args=(self, old)) for each in beside]
        for thread in threads:
            thread.start()
        try:
            return run(self, job)
        finally:
            for thread in threads:
                thread.join()

    monkeypatch.setattr(Worker, "run", counted)
    return counts, beside


def program_of(worker, old):
    """The process of the program that is about to start, as seen outside."""
    until = time.monotonic() + 10
    while not (new := descendants([worker._programs.pid]) - old):
        assert time.monotonic() < until
    return new.pop()


def same(expected, actual):
    return None if expected.split() == actual.split() else f"got {actual!r}"


def script(text, seconds=20.0, megabytes=2048):
    return StdinJob(text, (("", "fine"),), same, limits=Limits(seconds, megabytes))


def verdicts(sandbox, *jobs):
    outcomes = dict(sandbox.run(enumerate(jobs)))
    return [outcomes[n].verdict for n in range(len(jobs))]


THREADS = """
import threading, time
threading.stack_size(1 << 16)
for _ in range({many}): threading.Thread(target=time.sleep, args=({seconds},), daemon=True).start()
time.sleep({seconds})
print("fine")
"""


def test_threads_of_one_program_are_not_anothers(sandbox):
    # Above the bound of 256 together, with room for what programs of another test have meanwhile.
    many, some = (script(THREADS.format(many=n, seconds=0.4)) for n in (200, 100))
    assert verdicts(sandbox, many, some) == ["pass", "pass"]
    bomb = script(THREADS.format(many=5000, seconds=0.3))
    assert verdicts(sandbox, bomb, some, some) == ["process_limit", "pass", "pass"]


def test_threads_of_the_users_own_job_are_not_the_programs(sandbox):
    """Under the user that programs run as, and started after the sandbox."""
    text = THREADS.format(many=400, seconds=60).replace("time.sleep(60)\n", "input()\n")
    text = text.replace("input", "print('ready', flush=True); input", 1)
    become = dict(user=NOBODY, group=NOBODY, extra_groups=[]) if os.getuid() == 0 else {}
    own = subprocess.Popen(
        ["/usr/bin/python3", "-c", text],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", **become,
    )  # fmt: skip
    try:
        assert own.stdout.readline() == b"ready\n"
        job = script(THREADS.format(many=100, seconds=0.1))
        assert verdicts(sandbox, job, job) == ["pass", "pass"]
    finally:
        own.kill()
        own.communicate()


FOREVER = "while True: pass"
BRIEF = "import time\ntime.sleep(0.4)\nprint('fine')\n"


def test_a_program_that_the_kernel_ended_is_judged_again(sandbox, tries, monkeypatch):
    counts, beside = tries
    beside.append(lambda worker, old: os.kill(program_of(worker, old), signal.SIGKILL))
    job = script(BRIEF)
    assert verdicts(sandbox, job) == ["pass"]
    assert counts[job] == 2
    beside.clear()
    suicide = script("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert verdicts(sandbox, suicide) == ["crash"]
    kills = iter(range(9))
    monkeypatch.setattr(worker, "out_of_memory_kills", lambda: next(kills))
    assert verdicts(sandbox, suicide) == ["memory"]


def test_functions_that_the_kernel_ended_are_judged_again(sandbox, tries):
    counts, beside = tries
    beside.append(lambda worker, old: os.kill(program_of(worker, old), signal.SIGKILL))
    job = FunctionJob(BRIEF + "def f(): return 1", "assert f() == 1")
    assert verdicts(sandbox, job) == ["pass"]
    assert counts[job] == 2


def test_a_program_that_was_kept_from_running_is_judged_again_alone(sandbox, tries):
    counts, beside = tries

    def stop(worker, old):
        os.kill(program_of(worker, old), signal.SIGSTOP)

    beside.append(stop)
    job = script(BRIEF.replace("0.4", "0.2"), seconds=0.6)
    assert verdicts(sandbox, job) == ["pass"]
    assert counts[job] == 2


def test_what_the_time_limit_costs(sandbox, tries):
    """An endless loop has worked all its time and is not tried again; what sleeps is."""
    counts, _ = tries
    loop, sleep = script(FOREVER, 0.3), script("import time\ntime.sleep(60)", 0.2)
    ask = FunctionJob("def f():\n    while True: yield 1", "for _ in f(): pass", limits=Limits(0.3))
    assert verdicts(sandbox, loop, loop, sleep) == ["timeout"] * 3
    assert (counts[loop], counts[sleep]) == (2, 2)
    assert verdicts(sandbox, ask) == ["timeout"]


def test_time_that_others_took_does_not_count(sandbox):
    """Three busy processes on the processor that the programs have."""
    pids = sandbox.processes()
    processors = os.sched_getaffinity(0)
    one = {min(processors)}
    text = f"import os\nos.sched_setaffinity(0, {one})\nprint(flush=True)\n{FOREVER}"
    burners = [
        subprocess.Popen([sys.executable, "-I", "-S", "-c", text], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    try:
        for burner in burners:
            burner.stdout.read(1)
        for pid in pids:
            os.sched_setaffinity(pid, one)
        text = "import time\nwhile time.process_time() < 0.3: pass\nprint('fine')\n"
        functions = "import time\ndef f():\n    while time.process_time() < 0.3: pass\n"
        jobs = script(text, seconds=0.6), FunctionJob(functions, "f()", limits=Limits(0.6))
        assert verdicts(sandbox, *jobs) == ["pass", "pass"]
    finally:
        for burner in burners:
            burner.kill()
            burner.communicate()
        for pid in sandbox.processes() & pids:
            os.sched_setaffinity(pid, processors)


FLOODS = {
    "flat": "i = 0\nwhile True:\n    os.mkdir(str(i))\n    i += 1",
    "deep": "while True:\n    os.mkdir('d')\n    os.chdir('d')",
    "links": "i = 0\nwhile True:\n    os.symlink('x' * 99, str(i))\n    i += 1",
    "stubborn": "i = 0\nwhile True:\n    i += 1\n    try: os.makedirs(f'{i}/a/b/c')\n"
    "    except OSError: pass",
}


def test_many_folders_meet_their_limit_at_once_and_keep_nobody_waiting(sandbox):
    jobs = [script("import os\n" + text, seconds=2) for text in FLOODS.values()]
    began = time.monotonic()
    outcomes = dict(sandbox.run(enumerate(jobs)))
    took = time.monotonic() - began
    assert {outcome.verdict for outcome in outcomes.values()} == {"output_limit"}
    slow = 1 if sandbox._apart else 3  # a disk; half a second where nobody else uses it
    assert max(outcome.seconds for outcome in outcomes.values()) < 2 * slow
    assert took < 6 * slow
    left = script("import os\nprint(*{*os.listdir('.')} - {'program.py'} or ['fine'])")
    assert verdicts(sandbox, left, left, left) == ["pass"] * 3


LEAVING = """
import sys
from wmtp_modules.sandbox import pool
from wmtp_modules.sandbox.jobs import StdinJob
if sys.argv[2]:
    pool.why_no_namespaces = lambda: "they are switched off"
text = '''
import os, time
with open("big", "wb") as file: file.write(bytes(48 << 20))
try:
    if os.fork() == 0: os.setsid()
except OSError: pass
print("x" * 100000, flush=True)
time.sleep(600)
'''
with pool.Sandbox(sys.argv[1], 1) as sandbox:
    print(*sandbox.processes(), flush=True)
    list(sandbox.run([(0, StdinJob(text, (("", ""),), lambda *_: None))]))
"""


def is_alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def folders():
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith(FOLDER)}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_after_everything_was_killed(kind, require_tier, open_sandbox):
    tier, _, alone = kind.partition(" ")
    require_tier(tier)
    before = folders()
    parent = subprocess.Popen(
        [sys.executable, "-c", LEAVING, tier, alone],
        stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    inside = {int(pid) for pid in parent.stdout.readline().split()}
    until = time.monotonic() + 20
    most = 2 if tier == "rlimits" else 1  # it forks where it can
    while len(everything := descendants([parent.pid])) < len(inside) + 1 + most:
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.2)  # it writes
    made = folders() - before
    assert bool(made) == bool(alone)
    # First the parent: where there are namespaces, the rest goes with it.
    for pid in sorted(everything, key=lambda pid: pid != parent.pid) if alone else [parent.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    parent.communicate()
    until = time.monotonic() + 10
    while left := set(filter(is_alive, everything)):
        assert time.monotonic() < until, f"{left} outlived their parent"
        time.sleep(0.02)
    with open_sandbox("bubblewrap" if tier != "bubblewrap" else "landlock", 1):
        assert not made & folders()


def test_cleaning_leaves_what_is_in_use_or_not_ours(monkeypatch, tmp_path, require_tier):
    require_tier("landlock")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(pool, "why_no_namespaces", lambda: "they are switched off")
    tmp_path.chmod(0o711)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o011)
    dead, elsewhere = tmp_path / f"{FOLDER}dead", tmp_path / "elsewhere"
    for folder in (dead, elsewhere):
        folder.mkdir()
        (folder / "file").write_text("kept")
    (tmp_path / f"{FOLDER}link").symlink_to(elsewhere)
    with Sandbox("landlock", 1) as first:
        (used,) = folders() - {f"{FOLDER}link"}
        assert not dead.exists()
        with Sandbox("landlock", 1) as second:
            job = script("open('x', 'w').close()\nprint('fine')")
            assert verdicts(first, job) == verdicts(second, job) == ["pass"]
            assert used in folders()
    assert folders() == {f"{FOLDER}link"}
    assert (elsewhere / "file").read_text() == "kept"
    stubborn = tmp_path / f"{FOLDER}stubborn"
    stubborn.mkdir()
    monkeypatch.setattr(pool, "remove_folder", refuse)
    pool.remove_leftovers()  # a warning, no error
    assert stubborn.exists()


def refuse(path, lock):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_fork_bomb_ends_and_its_neighbour_is_right(open_sandbox, monkeypatch, alone):
    """Where programs can fork, so at tier rlimits; the time of all of its processes counts."""
    bomb = script("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", 0.5)
    fine = script(THREADS.format(many=30, seconds=0.2))
    if alone:
        monkeypatch.setattr(pool, "why_no_namespaces", lambda: "they are switched off")
    with open_sandbox("rlimits") as sandbox:
        inside = sandbox.processes()
        assert verdicts(sandbox, bomb, fine, fine) == ["timeout", "pass", "pass"]
        assert sandbox.processes() == inside
