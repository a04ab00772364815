"""Runs programs that nobody has read: see ``docs/sandbox.md`` for what each tier guarantees."""

from wmtp_modules.evaluation.sandbox.jobs import (
    VERDICTS,
    FunctionJob,
    Limits,
    Outcome,
    SandboxError,
    StdinJob,
)
from wmtp_modules.evaluation.sandbox.pool import Sandbox

__all__ = ["VERDICTS", "FunctionJob", "Limits", "Outcome", "Sandbox", "SandboxError", "StdinJob"]
