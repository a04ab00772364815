"""What the sandbox is asked, and what it answers."""

from collections.abc import Callable
from dataclasses import dataclass

VERDICTS = (
    *("pass", "wrong", "timeout", "memory", "output_limit", "process_limit", "crash", "policy"),
    "infrastructure",  # ours, never counted against the model
)


class SandboxError(ValueError):
    """A tier that is not to be had here, or does not do what it claims."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        seconds: wall clock, of a script's one case or of a program and all its tests.
        memory_mb: address space beyond what the interpreter itself takes.
    """

    seconds: float = 15.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        if not (0 < self.seconds < 1e6 and 0 < self.memory_mb < 1 << 24):
            raise ValueError(
                f"limits of {self.seconds} s and {self.memory_mb} MB: both must be above 0"
            )


@dataclass(frozen=True)
class FunctionJob:
    """A program whose functions are called by tests (MBPP, HumanEval).

    The tests run in a process of their own. Arguments and results travel by value: a program that
    changes an argument in place changes its own copy.

    Args:
        program: untrusted source.
        tests: trusted source. A name that neither it nor the context defines is the program's.
        context: trusted source that runs before the tests. Of its functions, those without a body
            are the program's.
        limits: of the program and its tests together.
    """

    program: str
    tests: str
    context: str = ""
    limits: Limits = Limits()


@dataclass(frozen=True)
class StdinJob:
    """A program that reads input and writes output (CodeContests).

    Args:
        program: untrusted source, run once a case as a script.
        cases: pairs of input and expected output, run in order until the first that fails.
        compare: given expected and actual output, returns None or why they differ; runs here.
        input_file: name of a file in the scratch folder that holds the input; standard input
            holds it in any case.
        output_file: name of the file that the program writes; None: standard output.
        limits: of one case.
    """

    program: str
    cases: tuple[tuple[str, str], ...]
    compare: Callable[[str, str], str | None]
    input_file: str | None = None
    output_file: str | None = None
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not self.cases:
            raise ValueError("a script without cases would pass unseen: give at least one case")
        for name in (self.input_file, self.output_file):
            if name is not None and (
                not name or "/" in name or "\0" in name or name in (".", "..")
            ):
                raise ValueError(f"{name!r} names no file in the scratch folder: use a bare name")


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Args:
        verdict: one of ``VERDICTS``.
        seconds: wall clock of its process, the slowest case's for a script.
        peak_mb: most resident memory of its process, some 15 MB of interpreter included.
        detail: end of the error or the output, printable, at most 2,000 characters.
    """

    verdict: str
    seconds: float
    peak_mb: float
    detail: str
