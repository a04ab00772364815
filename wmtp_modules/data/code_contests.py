"""CodeContests (Li et al. 2022, arXiv 2203.07814): programming contests with human solutions."""

import hashlib
from functools import partial
from typing import Any

import datasets
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.data.forms import Sample
from wmtp_modules.data.rows import build_rows
from wmtp_modules.data.sources import BadRow, text_field

PYTHON3 = 3  # the data set's language codes: 1 Python 2, 2 C++, 3 Python 3, 4 Java
REWARDS = {"solutions": 1.0, "incorrect_solutions": 0.0}


def code_contests_dataset(
    tokenizer: Llama2Tokenizer,
    *,
    source: str | list[str],
    split: str = "train",
    seed: int = 0,
    validation_fraction: float = 0.0,
    max_solutions: int = 16,
    incorrect: bool = False,
) -> datasets.Dataset:
    """Tokenised CodeContests problems, one row for each Python 3 solution.

    Args:
        source: hub name (``deepmind/code_contests``), or a local file or folder in its row shape:
            name, description, solutions {language[], solution[]}, and incorrect_solutions in the
            same form.
        seed: assigns problems to the splits and draws the solutions.
        max_solutions: most correct and most incorrect solutions of a problem; some have hundreds.
        incorrect: include failed solutions, so that a problem has good and bad responses. A text
            that a problem lists as both is dropped without being counted.

    The other arguments, and the errors, are those of ``rows_dataset``.

    Returns:
        Rows ``tokens``, ``keep``, ``reward`` (1.0 correct, 0.0 incorrect), ``problem_id`` (the
        problem's name), ``prompt`` and ``response``.
    """
    if max_solutions < 1:
        raise ValueError(f"max_solutions must be at least 1, got {max_solutions}")
    fields = tuple(REWARDS) if incorrect else ("solutions",)
    return build_rows(
        tokenizer,
        source=source,
        split=split,
        seed=seed,
        validation_fraction=validation_fraction,
        to_samples=partial(_to_samples, fields=fields, seed=seed, limit=max_solutions),
        columns=("name", "description", *fields),
        recipe=f"code_contests {' '.join(fields)} {max_solutions} {seed}",
        unused="problems without a Python 3 solution",
    )


def code_contests_prompt(description: str) -> str:
    """A problem as the model reads it; its code starts on a new line."""
    return description if description.endswith("\n") else description + "\n"


def _to_samples(record: dict, fields: tuple[str, ...], seed: int, limit: int) -> list[Sample]:
    name, prompt = text_field(record, "name"), text_field(record, "description")
    codes = {field: _python3(record, field) for field in fields}
    in_both = set.intersection(*codes.values()) if len(fields) > 1 else set()
    samples = []
    for field in fields:
        drawn = sorted(
            codes[field] - in_both,
            key=lambda code: hashlib.blake2b(f"{seed} {code}".encode()).digest(),
        )
        samples += [
            Sample(code, code_contests_prompt(prompt), reward=REWARDS[field], problem_id=name)
            for code in drawn[:limit]
        ]
    return samples


def _python3(record: dict, field: str) -> set[str]:
    solutions: Any = record.get(field)
    try:
        pairs = list(zip(solutions["language"], solutions["solution"], strict=True))
    except (TypeError, KeyError, ValueError) as error:
        raise BadRow(f"{field} is not {{language[], solution[]}} of equal length") from error
    return {
        text_field({field: code}, field).replace("\r\n", "\n")
        for language, code in pairs
        if language == PYTHON3
    }
