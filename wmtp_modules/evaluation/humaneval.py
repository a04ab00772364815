"""HumanEval (Chen et al. 2021, arXiv 2107.03374) as an evaluation: complete a function."""

from dataclasses import dataclass

from wmtp_modules.data.sources import string_field, text_field
from wmtp_modules.evaluation.task import Task
from wmtp_modules.sandbox.jobs import FunctionJob, Limits

# No reference takes a second; the same limit as MBPP, so that slow but correct programs pass.
SECONDS = 15.0


@dataclass(frozen=True)
class HumanEvalTask(Task):
    """One HumanEval task; its completion continues the signature and docstring."""

    head: str  # imports, helpers, signature and docstring
    test: str
    entry_point: str

    # What can only follow the requested function.
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

    @property
    def prompt(self) -> str:
        return self.head

    def job(self, completion: str, machine_factor: float = 1.0) -> FunctionJob:
        return FunctionJob(
            program=self.head + completion,
            tests=f"{self.test}\ncheck({self.entry_point})\n",
            context=self.head + "    pass\n",  # tests may call helpers that the prompt defines
            limits=Limits(seconds=SECONDS * machine_factor),
        )


def humaneval_task(record: dict) -> HumanEvalTask:
    """A row with the columns of ``HumanEval.jsonl``; ``BadRow`` if one is unusable."""
    return HumanEvalTask(
        task_id=text_field(record, "task_id"),
        reference=string_field(record, "canonical_solution"),
        head=text_field(record, "prompt"),
        test=text_field(record, "test"),
        entry_point=text_field(record, "entry_point"),
    )
