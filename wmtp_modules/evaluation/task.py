"""What a benchmark's problem is to the rest of the evaluation, whichever benchmark it is of."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from wmtp_modules.sandbox.jobs import FunctionJob, StdinJob


@dataclass(frozen=True)
class Task(ABC):
    """One problem of a benchmark.

    Attributes:
        task_id: as the benchmark has it; unique in a list of tasks.
        reference: the benchmark's own solution in the form of a completion, None where it has
            none in Python 3.
        stop: strings at which a completion ends; the completion does not hold them.
    """

    task_id: int | str
    reference: str | None

    stop: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def prompt(self) -> str:
        """What a model goes on from."""

    @property
    def reference_languages(self) -> tuple[str, ...]:
        """Languages of the benchmark's own solutions."""
        return ("PYTHON3",)

    @abstractmethod
    def job(self, completion: str, machine_factor: float = 1.0) -> FunctionJob | StdinJob:
        """What the sandbox runs to judge a completion.

        Args:
            completion: what came after the prompt.
            machine_factor: by which this machine is slower than the one that the limits of time
                are meant for.
        """
