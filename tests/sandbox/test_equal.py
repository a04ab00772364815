"""Verdicts are those of plain Python, which runs program and test in one process.

``equal.txt`` holds programs with tests that benchmarks might make, right and wrong ones: after
``--- each``, every statement at the left margin with ``assert`` or ``except`` in it ends one test.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from wmtp_modules.sandbox.jobs import FunctionJob

# A process like that of the benchmarks' own harnesses, and of the time before limits of digits.
PLAIN = """
import json, sys
sys.set_int_max_str_digits(0)
passed = []
for program, tests in json.load(sys.stdin):
    try:
        namespace = {"__name__": "solution"}
        exec(program, namespace)
        exec(tests, namespace)
    except Exception:
        passed.append(False)
    else:
        passed.append(True)
print(json.dumps(passed))
"""


def read_pairs():
    """Names, programs and tests."""
    text = Path(__file__).with_name("equal.txt").read_text("utf-8")
    parts = re.split(r"^=== (.*)\n", text, flags=re.MULTILINE)[1:]
    for name, section in zip(parts[::2], parts[1::2], strict=True):
        program, tests = section.split("--- each\n")
        lines = []
        for line in tests.strip().split("\n"):
            lines.append(line)
            if re.match("(?!try).*(assert|except)", line):
                yield f"{name}: {lines[-1]}"[:150], program, "\n".join(lines) + "\n"
                lines = []
        assert not lines


PAIRS = list(read_pairs())


@pytest.fixture(scope="module")
def plain():
    pairs = json.dumps([pair[1:] for pair in PAIRS])
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN], input=pairs, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def ours(open_sandbox):
    with open_sandbox("auto") as sandbox:
        outcomes = dict(
            sandbox.run(
                (i, FunctionJob(program, tests)) for i, (_, program, tests) in enumerate(PAIRS)
            )
        )
    return [outcomes[i] for i in range(len(PAIRS))]


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=[name for name, *_ in PAIRS])
def test_a_verdict_is_that_of_plain_python(plain, ours, number):
    outcome = ours[number]
    assert (outcome.verdict == "pass") == plain[number], (PAIRS[number][2], outcome)
    assert outcome.verdict in ("pass", "wrong", "crash"), outcome


def test_the_table_has_right_and_wrong_ones(plain):
    assert sum(plain) > 100
    assert plain.count(False) > 40
