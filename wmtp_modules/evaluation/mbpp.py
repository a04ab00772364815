"""MBPP (Austin et al. 2021, arXiv 2108.07732) as an evaluation: three shots, three assertions."""

from dataclasses import dataclass, replace

from wmtp_modules.data.mbpp import END, mbpp_fields, mbpp_prompt
from wmtp_modules.data.sources import string_field, strings_field, text_field
from wmtp_modules.evaluation.task import Task
from wmtp_modules.sandbox.jobs import FunctionJob, Limits

TEST_IDS = range(11, 511)  # the authors' division
SHOT_IDS = (2, 3, 4)  # of the paper's three-shot prompt
BETWEEN_SHOTS = "\n\n"
# The reference of task 123 takes several seconds, all others together take less.
SECONDS = 15.0


@dataclass(frozen=True)
class MBPPTask(Task):
    """One MBPP task; its completion is a whole program."""

    reference: str
    text: str
    tests: tuple[str, ...]
    imports: tuple[str, ...]  # of the tests; only the sanitized file has them
    setup: str  # runs after the program, whose classes it may use; only the full file has it
    shots: str | None = None  # solved tasks before this one; None if the source lacks them

    stop = ("[DONE]",)

    @property
    def prompt(self) -> str:
        """Three solved tasks and this one; ValueError if the source lacks one of the three."""
        if self.shots is None:
            raise ValueError(
                f"the MBPP prompt shows tasks {SHOT_IDS}, which the source lacks: add their rows, "
                "or execute existing samples, which need no prompt"
            )
        return self.shots + mbpp_prompt(self.text, list(self.tests))

    def job(self, completion: str, machine_factor: float = 1.0) -> FunctionJob:
        return FunctionJob(
            program=f"{completion}\n{self.setup}",
            tests="\n".join((*self.imports, *self.tests)),
            limits=Limits(seconds=SECONDS * machine_factor),
        )


def mbpp_task(record: dict) -> MBPPTask:
    """A row of the full file or, with ``prompt`` and ``test_imports``, the sanitized one."""
    task_id, tests, code = mbpp_fields(record)
    sanitized = record.get("text") is None and record.get("prompt") is not None
    return MBPPTask(
        task_id=task_id,
        reference=code,
        text=text_field(record, "prompt" if sanitized else "text"),
        tests=tuple(tests),
        imports=tuple(strings_field(record, "test_imports")) if sanitized else (),
        setup="" if sanitized else string_field(record, "test_setup_code").replace("\r", ""),
    )


def with_shots(tasks: list[MBPPTask]) -> list[MBPPTask]:
    """The tasks with the solved examples in their prompts, if the source has all three."""
    by_id = {task.task_id: task for task in tasks}
    if not by_id.keys() >= set(SHOT_IDS):
        return tasks
    shots = "".join(
        mbpp_prompt(by_id[i].text, list(by_id[i].tests)) + by_id[i].reference + END + BETWEEN_SHOTS
        for i in SHOT_IDS
    )
    return [replace(task, shots=shots) for task in tasks]
