"""Pairs of responses to one problem that a critic learns from, and the order it sees them in."""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from wmtp_modules.critic.rewards import Responses


class HeldoutPairs(NamedTuple):
    """Better and worse held-out rows, int64 [P, 2], of one "problem" or else of like "length"."""

    rows_P2: np.ndarray
    kind: str


LENGTH_BIN = 1.25  # responses of a pair differ in length by less than a quarter


def make_pairs(
    lengths_N: np.ndarray, good_N: np.ndarray, problem_ids: Sequence[str | None], *, seed: int
) -> np.ndarray:
    """Pairs of responses to one problem, of like length, one better than the other.

    Responses to a problem are sorted into bins of length, so that length does not give the label
    away. Inside a bin the best response is paired with the worst, the second best with the second
    worst and so on, ties in random order, so that each response is in one pair at most. Rows
    without response tokens (``lengths_N``) or without a problem are left out.

    Returns:
        int64 [P, 2], rows of the better and of the worse response.
    """
    rng = np.random.default_rng(seed)
    bins: dict[tuple, list[int]] = {}
    for row in rng.permutation(len(lengths_N)).tolist():
        if problem_ids[row] is not None and lengths_N[row] > 0:
            length_bin = int(np.log(lengths_N[row]) / np.log(LENGTH_BIN))
            bins.setdefault((problem_ids[row], length_bin), []).append(row)
    pairs = []
    for rows in bins.values():
        rows.sort(key=lambda row: -good_N[row])  # stable: ties stay in random order
        for better, worse in zip(rows, reversed(rows), strict=True):
            if good_N[better] <= good_N[worse]:
                break
            pairs.append((better, worse))
    return rng.permutation(np.array(pairs, np.int64).reshape(-1, 2))


def response_spans(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """First response token and number of response tokens of each row, int64 [N] each.

    The first token of a row has no token before it and is no response token.

    Raises:
        ValueError: if a response is not one run of supervised tokens; names the row.
    """
    first, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    batches = rows.select_columns("keep").with_format("numpy").iter(batch_size=4096)
    keeps = (keep for batch in batches for keep in batch["keep"])
    for row, keep in enumerate(keeps):
        at = np.flatnonzero(keep[1:]) + 1
        if len(at):
            first[row], lengths[row] = at[0], len(at)
            if at[-1] - at[0] >= len(at):
                raise ValueError(
                    f"row {row} of the data set has separate runs of supervised tokens: a reward "
                    "belongs to one response, so mask the prompt only"
                )
    return first, lengths


def problem_ids(rows: Dataset) -> list[str | None]:
    """Problem of each row, None where it has none."""
    return rows["problem_id"][:] if "problem_id" in rows.column_names else [None] * len(rows)


def hopeless_problems(responses: Responses) -> dict:
    """Problems without a good response, f(R) above one half: their ``count`` and ``names``."""
    best: dict[str, float] = {}
    for problem, good in zip(problem_ids(responses.rows), responses.good, strict=True):
        if problem is not None:
            best[problem] = max(best.get(problem, 0.0), good)
    names = [problem for problem, good in best.items() if good <= 0.5]
    return {"count": len(names), "names": names}


def fingerprint_responses(rows: Dataset) -> str:
    """Hash of what the tokens do not show: how long each response is, and to which problem."""
    content = [[x.tolist() for x in response_spans(rows)], problem_ids(rows)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def heldout_pairs(heldout: Responses, *, seed: int) -> HeldoutPairs:
    """Pairs that judge a critic: of one problem, or of like length where no problem has any."""
    lengths = response_spans(heldout.rows)[1]
    found = make_pairs(lengths, heldout.good, problem_ids(heldout.rows), seed=seed)
    if len(found):
        return HeldoutPairs(found, "problem")
    return HeldoutPairs(make_pairs(lengths, heldout.good, [""] * len(lengths), seed=seed), "length")


def training_items(train: Responses, *, objective: str, seed: int) -> np.ndarray:
    """What a critic is trained on: int64 [n, 1], rows with a response, or [n, 2], pairs of rows.

    Raises:
        ValueError: if the objective is ``pairs`` and there are none.
    """
    lengths = response_spans(train.rows)[1]
    if objective == "bce":
        return np.flatnonzero(lengths)[:, None]
    found = make_pairs(lengths, train.good, problem_ids(train.rows), seed=seed)
    if not len(found):
        raise ValueError(
            "no two responses that the critic learns from are to one problem, of like length, one "
            "good and one bad: critic.objective: pairs needs them, with a problem_id; with bce a "
            "reward is enough"
        )
    return found


def joint_batch(n_items: int, size: int, step: int, seed: int) -> np.ndarray:
    """Items of a step (from 0) of all ranks, each epoch in a new order; ValueError if too few."""
    if n_items < size:
        raise ValueError(
            f"there are {n_items} to train the critic on, fewer than a joint batch of {size}: "
            "lower critic.batch_size or add data"
        )
    epoch, place = divmod(step, n_items // size)
    order = np.random.default_rng([seed, epoch]).permutation(n_items)
    return order[place * size : (place + 1) * size]
