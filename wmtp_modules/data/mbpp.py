"""MBPP (Austin et al. 2021, arXiv 2108.07732): short Python tasks with three assertions each."""

from functools import partial

import datasets
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.data.forms import Sample
from wmtp_modules.data.rows import build_rows
from wmtp_modules.data.sources import BadRow, strings_field, text_field

# The authors' split: 1-10 are few-shot prompts, 11-510 the test set.
SPLIT_IDS = {"train": range(601, 975), "validation": range(511, 601)}
END = "\n[DONE]"


def mbpp_dataset(
    tokenizer: Llama2Tokenizer, *, source: str | list[str], split: str = "train", seed: int = 0
) -> datasets.Dataset:
    """Tokenised MBPP tasks, in the prompt format of the paper's few-shot evaluation.

    Args:
        source: hub name (``google-research-datasets/mbpp``), or a local file or folder with the
            columns text, code, task_id, test_list.
        split: "train" (task ids 601-974) or "validation" (511-600).
        seed: unused by the official split; part of the builders' common signature.

    Returns rows ``tokens``, ``keep`` and ``problem_id`` ("MBPP/601"). Errors: see ``rows_dataset``.
    """
    return build_rows(
        tokenizer,
        source=source,
        split=split,
        seed=seed,
        to_samples=partial(_to_samples, split=split),
        columns=("text", "code", "task_id", "test_list"),
        validation_fraction=None,
        hub_config="full",
        recipe=f"mbpp {split}",
        unused="tasks of other splits",
    )


def mbpp_fields(record: dict) -> tuple[int, list[str], str]:
    """Task id, tests and code (with Unix line ends) of a row; ``BadRow`` if one is unusable."""
    task_id, tests = record.get("task_id"), strings_field(record, "test_list")
    if type(task_id) is not int:  # a bool is an int too
        raise BadRow(f"task_id is {task_id!r}, not an integer", "task_id")
    if not tests:
        raise BadRow("test_list is empty")
    return task_id, tests, text_field(record, "code").replace("\r", "")


def mbpp_prompt(text: str, tests: list[str]) -> str:
    """One task as the model reads it, up to the start of its code."""
    return (
        f"You are an expert Python programmer, and here is your task: {text} "
        "Your code should pass these tests:\n\n" + "\n".join(tests) + "\n[BEGIN]\n"
    )


def _to_samples(record: dict, split: str) -> list[Sample]:
    task_id, tests, code = mbpp_fields(record)
    prompt = mbpp_prompt(text_field(record, "text"), tests)
    if task_id not in SPLIT_IDS[split]:
        return []
    return [Sample(code + END, prompt, problem_id=f"MBPP/{task_id}")]
