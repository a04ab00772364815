"""What is exported works with the newest transformers, not only with the pinned one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.nightly


def test_the_newest_transformers(tmp_path):
    """Runs the exports' own tests once more: the newest release lies before the pinned one."""
    site = tmp_path / "site"
    install = ["uv", "pip", "install", "--python", sys.executable, "--target", site, "transformers"]
    done = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True)
    if done.returncode and "was not found in the package registry" in done.stderr:
        pytest.skip("uv reaches no index")
    assert done.returncode == 0, done.stderr
    env = os.environ | {"PYTHONPATH": str(site)}
    version = [sys.executable, "-c", "import transformers as t; print(t.__file__, t.__version__)"]
    said = subprocess.run(version, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    assert said.startswith(str(site))
    print(said)
    tests = [ROOT / "tests" / "checkpoints" / f"test_{name}.py" for name in ("hf_mtp", "eagle3")]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
