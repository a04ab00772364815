"""The jobs that the sandbox takes, and the outcomes it returns."""

from collections.abc import Callable
from dataclasses import dataclass

VERDICTS = (
    *("pass", "wrong", "timeout", "memory", "output_limit", "process_limit", "crash", "policy"),
    "infrastructure",  # our fault, never counted against the model
)


class SandboxError(ValueError):
    """A tier is not available here, or does not do what it claims."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        seconds: wall-clock time of one case of a script, or of a program with all its tests.
        memory_mb: memory beyond what the interpreter itself takes. Address space counts, but of the
            stacks of threads only what is used.
    """

    seconds: float = 15.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        if not (0 < self.seconds < 1e6 and 0 < self.memory_mb < 1 << 24):
            raise ValueError(
                f"limits: both must be above 0, got {self.seconds} s and {self.memory_mb} MB"
            )


@dataclass(frozen=True)
class FunctionJob:
    """A program whose functions are called by tests (MBPP, HumanEval).

    The tests run in a separate process, and their verdict is that of plain Python, where program
    and tests are in one: values compare by their own data, and a change in place is seen.

    Args:
        program: untrusted source.
        tests: trusted source. Names that neither it nor the context defines are the program's.
        context: trusted source that runs before the tests. Its functions without a body are the
            program's.
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
        program: untrusted source, run as a script once per case.
        cases: pairs of input and expected output, run in order until one fails.
        compare: given expected and actual output, returns None or why they differ; runs outside
            the sandbox.
        other: another comparison, whose verdict is told beside the first.
        input_file: name of a file in the scratch folder that gets the input; standard input
            always does.
        output_file: name of the file that the program writes; None: standard output.
        limits: of one case.
    """

    program: str
    cases: tuple[tuple[str, str], ...]
    compare: Callable[[str, str], str | None]
    input_file: str | None = None
    output_file: str | None = None
    limits: Limits = Limits()
    other: Callable[[str, str], str | None] | None = None

    def __post_init__(self) -> None:
        if not self.cases:
            raise ValueError("a script without cases would pass untested: give at least one case")
        for name in (self.input_file, self.output_file):
            if name is not None and (
                not name or "/" in name or "\0" in name or name in (".", "..")
            ):
                raise ValueError(
                    f"{name!r} is not a file name in the scratch folder: use a bare name"
                )


@dataclass(frozen=True)
class Outcome:
    """The result of running a program.

    Args:
        verdict: one of ``VERDICTS``.
        seconds: wall-clock time of its process; for a script, of the slowest case.
        peak_mb: peak resident memory of its process, including some 15 MB for the interpreter.
        detail: end of the error or the output, printable, at most 2,000 characters.
        other: the verdict by the job's other comparison, or None.
    """

    verdict: str
    seconds: float
    peak_mb: float
    detail: str
    other: str | None = None
