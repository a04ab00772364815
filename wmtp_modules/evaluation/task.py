"""The interface of a benchmark's problem, the same for every benchmark."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from wmtp_modules.sandbox.jobs import FunctionJob, StdinJob


@dataclass(frozen=True)
class Task(ABC):
    """One problem of a benchmark.

    Attributes:
        task_id: the benchmark's id; unique in a list of tasks.
        reference: the benchmark's own solution as a completion; None if it has none in Python 3.
        stop: strings at which a completion ends; they are not part of it.
    """

    task_id: int | str
    reference: str | None

    stop: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def prompt(self) -> str:
        """The text that a model continues."""

    @property
    def reference_languages(self) -> tuple[str, ...]:
        """Languages of the benchmark's own solutions."""
        return ("PYTHON3",)

    @abstractmethod
    def job(self, completion: str, machine_factor: float = 1.0) -> FunctionJob | StdinJob:
        """What the sandbox runs to judge a completion.

        Args:
            completion: the text after the prompt.
            machine_factor: how much slower this machine is than the one the time limits are for.
        """
