"""CodeContests (Li et al. 2022, arXiv 2203.07814) as an evaluation: programs that read stdin."""

import math
from dataclasses import dataclass

from wmtp_modules.data.code_contests import PYTHON3, code_contests_prompt
from wmtp_modules.data.sources import BadRow, string_field, strings_field, text_field
from wmtp_modules.evaluation.compare import COMPARISONS, other_comparison
from wmtp_modules.evaluation.task import Task
from wmtp_modules.sandbox.jobs import Limits, StdinJob

LANGUAGES = {0: "UNKNOWN", 1: "PYTHON2", 2: "CPP", 3: "PYTHON3", 4: "JAVA"}
TESTS = ("public_tests", "private_tests", "generated_tests")
# Used where the data gives no limit. Contests allow 1 to 5 s, mostly for compiled programs; twice
# the largest leaves room for any Python solution that was once accepted.
SECONDS = 10.0
# The largest common limit of contests: a default must not fail what was once accepted.
MEMORY_MB = 1024


@dataclass(frozen=True)
class CodeContestsTask(Task):
    """One contest problem; its completion is a whole program, judged case by case."""

    description: str
    cases: tuple[tuple[str, str], ...]  # input, expected output
    input_file: str | None  # None: stdin
    output_file: str | None  # None: stdout
    seconds: float
    memory_mb: int
    languages: tuple[str, ...]  # of the problem's solutions
    comparison: str = "official"  # of ``compare.COMPARISONS``

    @property
    def prompt(self) -> str:
        return code_contests_prompt(self.description)

    @property
    def reference_languages(self) -> tuple[str, ...]:
        return self.languages

    def job(self, completion: str, machine_factor: float = 1.0) -> StdinJob:
        return StdinJob(
            program=completion,
            cases=self.cases,
            compare=COMPARISONS[self.comparison],
            other=COMPARISONS[other_comparison(self.comparison)],
            input_file=self.input_file,
            output_file=self.output_file,
            limits=Limits(seconds=self.seconds * machine_factor, memory_mb=self.memory_mb),
        )


def code_contests_task(record: dict) -> CodeContestsTask:
    """A row in the shape of ``deepmind/code_contests``, maybe without limits and files."""
    cases = [case for field in TESTS for case in _pairs(record, field, "input", "output", str)]
    if not cases:
        raise BadRow(f"no test in {', '.join(TESTS)}")
    solutions = _pairs(record, "solutions", "language", "solution", int)
    python3 = [code.replace("\r\n", "\n") for language, code in solutions if language == PYTHON3]
    return CodeContestsTask(
        task_id=text_field(record, "name"),
        reference=python3[0] if python3 else None,
        description=text_field(record, "description"),
        cases=tuple((_whole_lines(given), expected) for given, expected in cases),
        input_file=_file_name(record, "input_file"),
        output_file=_file_name(record, "output_file"),
        seconds=_seconds(record.get("time_limit")),
        memory_mb=_memory_mb(record.get("memory_limit_bytes")),
        languages=tuple(sorted({LANGUAGES.get(code, f"language {code}") for code, _ in solutions})),
    )


def _pairs(record: dict, field: str, first: str, second: str, kind: type) -> list[tuple]:
    """The pairs of a field {first[], second[]}; both lists have the same length."""
    value = record.get(field)
    if value is None:
        raise BadRow(f"{field} is missing")
    if not isinstance(value, dict):
        raise BadRow(f"{field} is not {{{first}[], {second}[]}}")
    left, right = value.get(first), strings_field(value, second)
    if not isinstance(left, list) or not all(type(item) is kind for item in left):
        raise BadRow(f"{field}.{first} is not a list of {kind.__name__}")
    if len(left) != len(right):
        raise BadRow(f"{field} has {len(left)} {first} and {len(right)} {second}")
    return list(zip(left, right, strict=True))


def _whole_lines(given: str) -> str:
    """The input with its final newline, which some copies of the data have stripped.

    Without it a solution that drops the last character of ``readline()`` would lose a letter.
    """
    return given if not given or given.endswith("\n") else given + "\n"


def _file_name(record: dict, field: str) -> str | None:
    if record.get(field) is None:
        return None
    name = string_field(record, field)
    if "/" in name or "\0" in name or name in (".", ".."):
        raise BadRow(f"{field} is {name!r}, not the name of a file")
    return name or None


def _seconds(limit: object) -> float:
    if limit is None:
        return SECONDS
    # `datasets` may write a part that is 0 as null.
    parts = (
        [limit.get(part) or 0 for part in ("seconds", "nanos")] if type(limit) is dict else [None]
    )
    if not all(type(part) is int and part >= 0 for part in parts):
        raise BadRow(f"time_limit is {limit!r}, not {{seconds, nanos}}")
    return parts[0] + parts[1] / 1e9 or SECONDS


def _memory_mb(limit: object) -> int:
    if limit is None:
        return MEMORY_MB
    if type(limit) is not int or limit < 0:
        raise BadRow(f"memory_limit_bytes is {limit!r}, not a number of bytes")
    return math.ceil(limit / 2**20) or MEMORY_MB  # the data set writes 0 for unknown
