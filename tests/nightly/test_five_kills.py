"""A run that is killed again and again ends as if nothing had been; fifty kills are in benchmarks/.

That a resumed run equals an uninterrupted one to the bit, and that a half-written state is not
taken, is held in this process by tests/recipes and tests/run/test_training_state.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly


def test_five_kills_cost_nothing(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/kill_resume.py", "--kills", "5", "--steps", "60"),
            *("--output_dir", str(tmp_path)),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "final parameters equal to the bit: True; all logged figures equal: True" in done.stdout
    assert re.search(r"^0 of \d+ bytes of completed states lost", done.stdout, re.MULTILINE)
