"""How jobs are run: what tests may do, how scripts get input, and what happens if things break."""

import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wmtp_modules.sandbox import proof, seccomp
from wmtp_modules.sandbox.jobs import FunctionJob, Limits, SandboxError, StdinJob
from wmtp_modules.sandbox.pool import Sandbox
from wmtp_modules.sandbox.process import Server, ServerLost
from wmtp_modules.sandbox.worker import Worker

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sandbox(open_sandbox):
    """At the best tier of this machine."""
    with open_sandbox("auto") as sandbox:
        yield sandbox


def run_one(sandbox, job):
    [(key, outcome)] = sandbox.run([("key", job)])
    assert key == "key"
    return outcome


def same_words(expected, actual):
    return None if expected.split() == actual.split() else f"got {actual!r}"


TREE = "class Node:\n    def __init__(self, v):\n        self.v, self.left = v, None\n"


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x): return x", "for x in (None, True, 1, -(2 ** 70), 10 ** 5000, 1.5, 1j, 'ü\\0',"
         " b'\\xff', [1, (2,)], {1: {2}}, frozenset({3}), range(3), {}, set(), bytearray(b'x'),"
         " (), '\\ud800'):\n"
         "    y = f(x)\n    assert y == x and type(y) is type(x), x"),
        ("def f(): return [float('inf'), float('nan'), -0.0]",
         "import math\na, b, c = f()\n"
         "assert a == math.inf and b != b and math.copysign(1, c) == -1"),
        ("from collections import *\nfrom fractions import Fraction\nfrom decimal import Decimal\n"
         "import datetime\ndef f(): return [Counter('aab'), defaultdict(int, a=1), deque([1]),"
         " OrderedDict(b=1), Fraction(1, 3), Decimal('1.50'), datetime.date(2020, 1, 2),"
         " datetime.datetime(2020, 1, 2, 3), datetime.timedelta(1, 2, 3)]",
         "import datetime as d\nfrom collections import *\nfrom fractions import Fraction as F\n"
         "from decimal import Decimal as D\nassert f() == [Counter(a=2, b=1), {'a': 1}, deque([1]),"
         " OrderedDict(b=1), F(1, 3), D('1.5'), d.date(2020, 1, 2), d.datetime(2020, 1, 2, 3),"
         " d.timedelta(1, 2, 3)]"),
        ("def f(a, *b, c=1, **d): return a, b, c, d",
         "assert f(1, 2, c=3, e=4) == (1, (2,), 3, {'e': 4})"),
        (TREE + "def depth(n): return 0 if n is None else 1 + depth(n.left)",
         "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)\n"
         "assert depth(root) == 3 and root.left.v == 2 and depth(None) == 0\n"
         "assert root.left is root.left and root.left == root.left and root != root.left"),
        ("def f(n):\n    for i in range(n): yield i",
         "assert list(f(3)) == [0, 1, 2]\ng = f(2)\nassert next(g) == 0 and 1 in g\n"
         "assert sum(f(4)) == 6 and [*zip(f(2), 'ab')] == [(0, 'a'), (1, 'b')]"),
        ("def f(d): return d.items()", "assert sorted(f({1: 2})) == [(1, 2)] and len(f({})) == 0"),
        ("LIMIT = 7\ndef f(x):\n    if x > LIMIT: raise ValueError('too large')\n    return x",
         "assert LIMIT == 7\ntry:\n    f(8)\n    assert False, 'no error'\n"
         "except ValueError as error:\n    assert 'too large' in str(error)"),
        ("def f(values, kind): return [v for v in values if type(v) is not kind]",
         "assert f([1, 'a'], str) == [1]"),
        ("def sum(a, b): return a * b", "assert sum(3, 4) == 12"),
        ("if __name__ == '__main__':\n    input()\ndef f(): return 1", "assert f() == 1"),
        ("import math\ndef f(x): return math.sqrt(x)", "assert math.isclose(f(2) ** 2, 2)"),
        ("def f(x):\n    print('noise' * 1000)\n    return x",
         "def check(g):\n    assert g(1) == 1\ncheck(f)"),
        ("nested = []\nfor _ in range(150): nested = [nested]\ndef f(): return nested",
         "x, depth = f(), 0\nwhile x:\n    x, depth = x[0], depth + 1\nassert depth == 150"),
        ("def f(x): return x\r\n\r\ndef g(x):\r\n    return f(x)\r\n",
         "assert g('a\\r\\n') == 'a\\r\\n'"),
    ],
)  # fmt: skip
def test_tests_may_do_with_a_program_what_they_do_with_functions(sandbox, program, tests):
    outcome = run_one(sandbox, FunctionJob(program, tests))
    assert outcome.verdict == "pass", outcome


def test_functions_without_a_body_are_the_programs_and_helpers_the_contexts(sandbox):
    context = (
        "from typing import List\n\ndef helper(x):\n    return x + 1\n\n"
        'def answer(xs: List[int]) -> int:\n    """Adds."""\n    pass\n'
    )
    tests = "def check(f):\n    assert helper(f([1, 2])) == 4\ncheck(answer)"
    good = "def helper(x):\n    return 4\ndef answer(xs):\n    return sum(xs)\n"
    assert run_one(sandbox, FunctionJob(good, tests, context)).verdict == "pass"
    bad = good.replace("sum(xs)", "0")  # its own helper must not hide that
    outcome = run_one(sandbox, FunctionJob(bad, tests, context))
    assert outcome.verdict == "wrong"
    assert "assert helper(f([1, 2])) == 4" in outcome.detail


@pytest.mark.parametrize(
    ("program", "verdict", "said"),
    [
        ("def f(x):\n    return x", "wrong", "assert f(1) == 2"),
        ("def f(x):\n\n    raise KeyError(x)", "crash", "KeyError: 1 (line 3 of the program)"),
        ("def f(x: return", "crash", "SyntaxError"),
        ("def g(x): pass", "crash", "the program does not define f"),
        ("def f(x): return None", "wrong", "assert f(1) == 2"),
        ("import socket\nsocket.socket()", "policy", "PermissionError"),
    ],
)
def test_a_failure_says_what_and_where(sandbox, program, verdict, said):
    outcome = run_one(sandbox, FunctionJob(program, "assert f(1) == 2"))
    assert outcome.verdict == verdict, outcome
    assert said in outcome.detail


def test_tests_that_are_no_python_are_not_the_programs_fault(sandbox):
    outcome = run_one(sandbox, FunctionJob("def f(): pass", "assert ("))
    assert outcome.verdict == "infrastructure"
    assert "not Python" in outcome.detail


def test_a_script_runs_case_after_case_until_one_fails(sandbox):
    cases = tuple((f"{n}\n", str(n)) for n in (1, 2, 30, 4))
    seen = []

    def compare(expected, actual):
        seen.append(actual)
        return same_words(expected, actual)

    program = "n = int(input())\nprint(n if n < 10 else 'many')\n"
    outcome = run_one(sandbox, StdinJob(program, cases, compare))
    assert outcome.verdict == "wrong"
    assert outcome.detail == "case 3 of 4: got 'many\\n'"
    assert seen == ["1\n", "2\n", "many\n"]
    assert run_one(sandbox, StdinJob(program, cases[:2], same_words)).verdict == "pass"


def same_lower_words(expected, actual):
    return same_words(expected.lower(), actual.lower())


@pytest.mark.parametrize(
    ("outputs", "verdicts", "runs"),
    [
        (["Yes", "No", "Yes"], ("pass", "pass"), 3),
        (["YES", "No", "Yes"], ("pass", "wrong"), 3),
        (["YES", "No", "x"], ("wrong", "wrong"), 3),
        (["Yes", "x", "x"], ("wrong", "wrong"), 2),  # no case more than needed
        (["YES", "1 / 0", "x"], ("crash", "wrong"), 2),
    ],
)
def test_a_script_is_judged_by_another_comparison_too(sandbox, outputs, verdicts, runs):
    program = f"x = {outputs}[int(input())]\nprint(eval(x) if ' ' in x else x)\n"
    cases = tuple((f"{n}\n", word) for n, word in enumerate(["Yes", "No", "Yes"]))
    seen = []

    def compare(expected, actual):
        seen.append(actual)
        return same_lower_words(expected, actual)

    job = StdinJob(program, cases, compare, other=same_words)
    swapped = StdinJob(program, cases, same_words, other=same_lower_words)
    outcomes = dict(sandbox.run([(0, job), (1, swapped)]))
    assert (outcomes[0].verdict, outcomes[0].other) == verdicts
    assert (outcomes[1].other, outcomes[1].verdict) == verdicts
    assert len(seen) == runs - (verdicts[0] == "crash")
    assert run_one(sandbox, StdinJob(program, cases, compare)).other is None


def test_a_script_may_read_and_write_named_files(sandbox):
    program = "with open('out.txt', 'w') as f:\n    f.write(open('in.txt').read() * 2)\n"
    job = StdinJob(program, (("ab ", "ab ab"), ("c ", "c c")), same_words, "in.txt", "out.txt")
    assert run_one(sandbox, job).verdict == "pass"
    with pytest.raises(ValueError, match="is not a file name in the scratch folder"):
        StdinJob("", job.cases, same_words, input_file="../in.txt")
    with pytest.raises(ValueError, match="without cases would pass untested"):
        StdinJob("", (), same_words)


def test_digits_have_no_limit(sandbox):
    """As before Python 3.11, in scripts and in tests; the limit of this process stays."""
    before = sys.get_int_max_str_digits()
    digits = "7" * 5000
    script = StdinJob("print(int(input()) + 0)", ((digits, digits),), same_words)
    assert run_one(sandbox, script).verdict == "pass"
    functions = FunctionJob("def f(x): return x", f"assert f({digits}) == {digits}")
    assert run_one(sandbox, functions).verdict == "pass"
    assert sys.get_int_max_str_digits() == before > 0


def test_time_and_memory_are_those_of_the_program(sandbox):
    slow = "import time\ndef f():\n    x = bytearray(100 << 20)\n    time.sleep(0.3)\n    return 1"
    outcome = run_one(sandbox, FunctionJob(slow, "assert f() == 1"))
    assert outcome.verdict == "pass"
    assert 0.3 <= outcome.seconds < 5
    assert 100 < outcome.peak_mb < 150
    tight = FunctionJob(slow, "assert f() == 1", limits=Limits(15, 64))
    assert run_one(sandbox, tight).verdict == "memory"


def test_limits_must_be_positive():
    for limits in ((0, 100), (1, 0), (float("nan"), 100)):
        with pytest.raises(ValueError, match="both must be above 0"):
            Limits(*limits)


def test_jobs_are_pulled_as_workers_become_free_and_a_run_may_be_left(sandbox):
    pulled = []

    def jobs():
        for number in range(100):
            pulled.append(number)
            yield number, FunctionJob(f"def f(): return {number}", f"assert f() == {number}")

    run = sandbox.run(jobs())
    first = [next(run) for _ in range(3)]
    assert len(pulled) <= 3 + 2
    run.close()
    assert all(outcome.verdict == "pass" for _, outcome in first)
    outcomes = dict(sandbox.run((n, FunctionJob("def f(): pass", "f()")) for n in range(20)))
    assert sorted(outcomes) == list(range(20))
    assert {outcome.verdict for outcome in outcomes.values()} == {"pass"}


def test_an_error_of_a_comparison_is_raised_and_the_sandbox_lives_on(sandbox):
    def broken(expected, actual):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_one(sandbox, StdinJob("print(1)", (("", "1"),), broken))
    assert run_one(sandbox, FunctionJob("def f(): pass", "f()")).verdict == "pass"


def test_what_the_self_test_proved_and_how_fast_the_machine_is(sandbox):
    names = ("network", "outside_writes", "signals", "memory", "processes", "time", "survivors")
    assert sandbox.self_test == dict.fromkeys(names, True)
    assert 1 <= sandbox.machine_factor < 100


# What a tier does if one part of it is missing.
BREAKS = {
    "network": ("filter", "landlock"),
    "outside_writes": ("walls", "landlock"),
    "signals": ("filter", "bubblewrap"),
    "processes": ("filter", "bubblewrap"),
    "memory": ("memory", "bubblewrap"),
    "time": ("time", "bubblewrap"),
}


@pytest.mark.slow
@pytest.mark.parametrize("claim", BREAKS)
def test_a_tier_that_does_not_hold_fails_its_self_test(monkeypatch, require_tier, claim):
    part, tier = BREAKS[claim]
    require_tier(tier)
    start, launch = Server.start, Server.__init__
    if part in ("filter", "walls"):

        def weak(self, tier, config, folder):
            config = config | {"filter": "", "strays": False}
            launch(self, "rlimits" if part == "walls" else tier, config, folder)

        monkeypatch.setattr(Server, "__init__", weak)
    else:
        key = {"memory": "memory_mb", "time": "seconds"}[part]
        monkeypatch.setattr(
            Server,
            "start",
            lambda self, request, fds: start(self, request | {key: request[key] + 4000}, fds),
        )
        if part == "time":
            attend = Worker._attend
            monkeypatch.setattr(
                Worker, "_attend", lambda self, *a: attend(self, *a[:-1], 1) and "output_limit"
            )
    with pytest.raises(
        SandboxError, match=f"self-test of tier {tier} failed: .*{claim}: a program"
    ):
        Sandbox(tier, 1)
    if claim == "outside_writes":  # what got out is taken away
        assert not list(Path("/dev/shm").glob("escaped-*"))


def test_auto_falls_back_to_landlock_and_says_why(monkeypatch, caplog, require_tier):
    require_tier("landlock")
    monkeypatch.setenv("PATH", "/nowhere")
    with caplog.at_level(logging.WARNING), Sandbox("auto", 1) as sandbox:
        assert sandbox.tier == "landlock"
    assert "tier landlock, because of tier bubblewrap: bubblewrap is not installed" in caplog.text
    with pytest.raises(SandboxError, match=r"bubblewrap is not installed.*Install bubblewrap"):
        Sandbox("bubblewrap", 1)


def test_without_a_kernel_that_helps_auto_refuses_and_names_what_to_install(monkeypatch):
    def missing():
        raise OSError("libseccomp.so.2 is missing: install libseccomp2 (or libseccomp)")

    monkeypatch.setattr(seccomp, "build_filter", missing)
    with pytest.raises(SandboxError, match=r"no sandbox .*install libseccomp2.*Install bubblewrap"):
        Sandbox("auto", 1)


def test_what_is_no_tier_and_no_number_of_workers():
    with pytest.raises(SandboxError, match=r"there is no tier 'docker': use auto, bubblewrap"):
        Sandbox("docker")
    with pytest.raises(SandboxError, match="workers must be at least 1, got 0"):
        Sandbox("auto", 0)


@pytest.mark.slow
def test_tier_rlimits_runs_when_named_and_claims_little(open_sandbox):
    with open_sandbox("rlimits") as sandbox:
        assert sandbox.self_test["memory"] is True
        assert sandbox.self_test["network"] == proof.NOT_CLAIMED
        assert (
            run_one(sandbox, FunctionJob("def f(): return 1", "assert f() == 1")).verdict == "pass"
        )
        wrong = "import os\nos.fork()\ndef f(): return 2"
        job = FunctionJob(wrong, "assert f() == 1", limits=Limits(2))
        assert run_one(sandbox, job).verdict != "pass"


def test_a_closed_sandbox_says_so(open_sandbox):
    with open_sandbox("auto", 1) as sandbox:
        pass
    with pytest.raises(SandboxError, match="the sandbox is closed"):
        list(sandbox.run([]))


def test_a_lost_server_costs_one_repetition_and_then_the_program_is_scored(open_sandbox):
    with open_sandbox("auto") as sandbox:
        for worker in list(sandbox._live):
            os.kill(worker.pids[0], signal.SIGKILL)
        job = FunctionJob("def f(): return 1", "assert f() == 1")
        outcomes = dict(sandbox.run((n, job) for n in range(6)))
        assert {outcome.verdict for outcome in outcomes.values()} == {"pass"}


def test_the_repetition_is_in_new_servers(monkeypatch, open_sandbox):
    """Of servers that were lost with the first, unnoticed, a sound program would be a crash."""
    run, tried = Worker.run, []

    def lose(self, job):
        tried.append(self)
        if len(tried) == 1:
            raise ServerLost("a fork server ended while a program ran")
        return run(self, job)

    with open_sandbox("auto") as sandbox:
        old = set(sandbox._live)
        monkeypatch.setattr(Worker, "run", lose)
        ((_, outcome),) = sandbox.run([(0, FunctionJob("def f(): return 1", "assert f() == 1"))])
    assert outcome.verdict == "pass"
    assert tried[0] in old
    assert tried[1] not in old


@pytest.mark.parametrize(("ours", "verdict"), [(False, "crash"), (True, "infrastructure")])
def test_a_server_lost_twice_is_the_programs_doing_unless_it_never_began(
    monkeypatch, open_sandbox, ours, verdict
):
    run, tried = Worker.run, []

    def lose(self, job):
        if "wreck" in job.program:
            tried.append(len(tried))
            raise ServerLost("a fork server ended while a program ran", ours)
        return run(self, job)

    with open_sandbox("auto") as sandbox:
        monkeypatch.setattr(Worker, "run", lose)
        names = ["fine", "wreck", "fine too"]
        outcomes = dict(sandbox.run((n, FunctionJob(f"def f(): '{n}'", "f()")) for n in names))
    assert [outcomes[n].verdict for n in names] == ["pass", verdict, "pass"]
    assert "twice" in outcomes["wreck"].detail
    assert tried == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["bubblewrap", "landlock"])
def test_an_ordinary_user_has_the_same_walls(tier, require_tier):
    """As nobody and with the system's Python: the whole of ``test_hostile.py`` needs pytest, which
    that has not, so the self-test and the verdicts on a few programs stand for it."""
    require_tier(tier)
    python = "/usr/bin/python3"
    if os.getuid() != 0:
        pytest.skip("not root: all of these tests run as an ordinary user already")
    probe = "import sys, wmtp_modules.sandbox; sys.exit(sys.version_info < (3, 11))"
    become = dict(user=65534, group=65534, extra_groups=[], cwd="/")
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        usable = subprocess.run([python, "-c", probe], env=env, capture_output=True, **become)
    except OSError:
        pytest.skip(f"no {python}")
    if usable.returncode:
        pytest.skip(f"{python} is older than 3.11, or nobody may not read this repository")
    script = Path(__file__).with_name("as_nobody.py").read_text()
    done = subprocess.run(
        [python, "-c", script, tier], env=env, capture_output=True, text=True, **become
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [
        "65534",
        tier,
        "pass",
        "wrong",
        "policy",
        "process_limit",
        "held",
    ]


@pytest.mark.parametrize("switch", ["-O", "-OO"])
def test_assertions_count_in_an_optimised_interpreter(require_tier, switch):
    """``python -O`` would drop the assertions of the tests, and every program would pass."""
    require_tier("landlock")
    script = (
        "from wmtp_modules.sandbox.jobs import FunctionJob\n"
        "from wmtp_modules.sandbox.pool import Sandbox\n"
        "with Sandbox('landlock', 1) as sandbox:\n"
        "    job = FunctionJob('def f(): return 1', 'assert f() == 2')\n"
        "    print(next(sandbox.run([(0, job)]))[1].verdict)\n"
    )
    done = subprocess.run(
        [sys.executable, switch, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout == "wrong\n", done.stderr


def test_a_function_with_nothing_but_imports_is_the_programs(sandbox):
    """HumanEval/115: the prompt's function imports before its docstring."""
    context = 'def f(x):\n    import math\n    """Round up."""\n    pass\n'
    program = "def f(x):\n    import math\n    return math.ceil(x)\n"
    assert run_one(sandbox, FunctionJob(program, "assert f(1.5) == 2", context)).verdict == "pass"


def test_a_function_may_be_named_like_a_module(sandbox):
    program = "def bisect(x): return x + 1"
    assert run_one(sandbox, FunctionJob(program, "assert bisect(1) == 2")).verdict == "pass"


def test_a_message_that_cannot_be_written_is_a_wrong_answer(sandbox):
    job = FunctionJob("def f(): return 10 ** 9000", "assert f() == 1, f()")
    outcome = run_one(sandbox, job)
    assert (outcome.verdict, outcome.detail.splitlines()[0]) == (
        "wrong",
        "AssertionError (its message cannot be printed)",
    )


def test_a_parent_with_many_open_files(sandbox):
    """``select`` takes no descriptor above 1,023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with Sandbox(sandbox.tier, 1) as another:
            job = FunctionJob("def f(): return 1", "assert f() == 1")
            assert run_one(another, job).verdict == "pass"
            endless = FunctionJob("def f():\n    while True: pass", "f()", limits=Limits(0.2))
            assert run_one(another, endless).verdict == "timeout"
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_socket_tells_nothing_of_who_made_it(sandbox):
    """SO_PEERPIDFD would be a handle on the process at the other end."""
    program = (
        "import socket\na, b = socket.socketpair()\na.send(b'x')\n"
        "try:\n    a.getsockopt(socket.SOL_SOCKET, 77)\nexcept OSError:\n    print('refused')\n"
    )
    job = StdinJob(program, (("", "refused"),), same_words)
    assert run_one(sandbox, job).verdict == "pass"


def test_what_came_while_the_parent_had_no_turn_counts(open_sandbox):
    """Another worker's comparison may hold the interpreter; the program was in time."""
    with open_sandbox("auto", 1) as sandbox:
        (worker,) = sandbox._live
        attend = worker._attend

        def late(server, streams, seconds):
            time.sleep(0.6)
            return attend(server, streams, 0.0)

        worker._attend = late
        assert run_one(sandbox, StdinJob("print(1)", (("", "1"),), same_words)).verdict == "pass"
