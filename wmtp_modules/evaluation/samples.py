"""The samples of an evaluation: which ones a config asks for, and how they were generated."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product

from wmtp_modules.evaluation.evidence import sample_key
from wmtp_modules.evaluation.task import Task

REFERENCE = "reference"  # samples=reference: the tasks' own solutions
TOO_LONG = "prompt_too_long"  # finish reason of a sample that was not generated


def wanted_samples(
    tasks: Sequence[Task],
    settings: Mapping,
    *,
    temperatures: Sequence[float],
    samples_per_task: int,
    seed: int,
) -> list[tuple[dict, Task]]:
    """The samples that a config asks for, temperature by temperature.

    ``settings`` is everything that shapes a sample besides its task, temperature and seed, with
    the ``checkpoint`` fingerprint; ranks and batches are not. Returns for each sample a row that
    names it (``key``, ``task_id``, ``sample``, ``temperature``, ``seed``, ``checkpoint``), and its
    task.
    """
    wanted = []
    for temperature, task, sample in product(temperatures, tasks, range(samples_per_task)):
        # Its own seed, whichever rank and batch generates it.
        text = f"{seed} {task.task_id} {float(temperature)} {sample}"
        own_seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())
        row = {
            "key": sample_key(settings, task, temperature, own_seed),
            "task_id": task.task_id,
            "sample": sample,
            "temperature": temperature,
            "seed": own_seed,
            "checkpoint": settings["checkpoint"],
        }
        wanted.append((row, task))
    return wanted


def reference_samples(tasks: Sequence[Task]) -> list[dict]:
    """The tasks' own solutions, as samples."""
    return [
        {"task_id": task.task_id, "sample": 0, "temperature": None, "completion": task.reference}
        for task in tasks
        if task.reference is not None
    ]


def generation_figures(samples: Sequence[Mapping]) -> dict:
    """How samples were generated, over all temperatures.

    Takes rows with ``finish_reason`` and, unless that is ``TOO_LONG``, ``tokens``, ``forwards`` and
    ``accepted``.
    """
    made = [row for row in samples if row["finish_reason"] != TOO_LONG]
    forwards = sum(row["forwards"] for row in made)
    accepted = [sum(heads) for heads in zip(*(row["accepted"] for row in made), strict=True)]
    return {
        "samples": len(samples),
        "finish_reasons": dict(Counter(row["finish_reason"] for row in samples)),
        "tokens": sum(row["tokens"] for row in made),
        # Without the prefill and the token that it gives.
        "tokens_per_forward": 1 + sum(accepted) / forwards if forwards else None,
        "acceptance_per_head": [n / forwards if forwards else None for n in accepted],
    }
