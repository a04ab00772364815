import functools
import shutil

import pytest

from wmtp_modules.sandbox.jobs import SandboxError
from wmtp_modules.sandbox.pool import Sandbox


@functools.cache
def why_not(tier):
    """Why this machine has no such tier, or None. A self-test that fails is no reason to skip."""
    if tier == "bubblewrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    try:
        Sandbox(tier, 1).close()
    except SandboxError as error:
        if "self-test" in str(error):
            raise
        return f"this machine has no tier {tier}: {error}"
    return None


@pytest.fixture(scope="session")
def require_tier():
    """Skips a test where this machine has no such tier."""

    def require(tier):
        if reason := why_not(tier):
            pytest.skip(reason)

    return require


@pytest.fixture(scope="session")
def open_sandbox(require_tier):
    def open_sandbox(tier, workers=2):
        require_tier(tier)
        return Sandbox(tier, workers)

    return open_sandbox
