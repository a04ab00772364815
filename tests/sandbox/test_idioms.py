"""Idioms of scripts: each tier prints what ``python program.py < input`` prints, and ends alike."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from wmtp_modules.sandbox.jobs import Limits, StdinJob

pytestmark = pytest.mark.slow

GIVEN = "3 4\n5 6\n"
TEXT = Path(__file__).with_name("idioms.txt").read_text()
PARTS = re.split(r"^=== (\w+)\n", TEXT, flags=re.MULTILINE)[1:]
PROGRAMS = dict(zip(PARTS[::2], PARTS[1::2], strict=True))
PROGRAMS["no_newline_at_the_end"] = PROGRAMS["no_newline_at_the_end"].strip()
PROGRAMS |= {
    "byte_order_mark": "\ufeffprint('ü', len('ü'))\n",
    "byte_order_mark_and_docstring": "\ufeff'''ü'''\r\nprint(__doc__)\r\n",
    "byte_order_mark_and_cookie": "\ufeff# coding: utf-8\nprint('ü')\n",
    "byte_order_mark_and_other_cookie": "\ufeff# coding: latin-1\nprint('ü')\n",
    "carriage_returns": "x = '''a\r\nb'''\r\nif x:\r\n    print(repr(x))\r\n",
    "only_carriage_returns": "x = 1\rif x:\r    print(x)\r",
    "form_feeds": "print(1)\n\f\nif True:\n\f    print(2)\n",
    "empty": "",
    "half_a_pair": "print('\ud800')\n",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Output and success of ``python program.py``, by name."""
    home = tmp_path_factory.mktemp("home")
    env = {"PATH": "/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    found = {}
    for name, program in PROGRAMS.items():
        folder = tmp_path_factory.mktemp("program")
        (folder / "program.py").write_bytes(program.encode("utf-8", "surrogatepass"))
        (folder.parent / "given").write_text(GIVEN)
        python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        with (folder.parent / "given").open() as given:
            done = subprocess.run(
                [python, "-B", "program.py"], stdin=given, capture_output=True, env=env, cwd=folder
            )
        found[name] = done.stdout.decode("utf-8", "replace"), done.returncode == 0
    return found


@pytest.fixture(scope="module", params=["bubblewrap", "landlock", "rlimits"])
def inside(request, open_sandbox):
    """The same of a tier, with the outcome."""
    outputs = {}
    with open_sandbox(request.param) as sandbox:
        limits = Limits(20, 256)
        jobs = (
            (name, StdinJob(text, ((GIVEN, name),), outputs.__setitem__, limits=limits))
            for name, text in PROGRAMS.items()
        )
        return {name: (outputs.get(name), outcome) for name, outcome in sandbox.run(jobs)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_script_does_what_python_does(plain, inside, name):
    output, outcome = inside[name]
    expected, succeeds = plain[name]
    assert (outcome.verdict == "pass") == succeeds, outcome
    if succeeds:
        assert output == expected
    else:
        assert outcome.verdict == "crash"
