"""Pairs of responses to one problem that a critic learns from, and the order it sees them in."""

import hashlib
import json

import numpy as np
from datasets import Dataset

from wmtp_modules.critic.rewards import Responses

LENGTH_BIN = 1.25  # responses of a pair differ in length by less than a quarter


def make_pairs(
    lengths_N: np.ndarray, rewards_N: np.ndarray, problem_ids: list[str | None], *, seed: int
) -> np.ndarray:
    """Pairs of responses to one problem, of like length and unlike reward.

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
        rows.sort(key=lambda row: -rewards_N[row])  # stable: ties stay in random order
        for better, worse in zip(rows, reversed(rows), strict=True):
            if rewards_N[better] <= rewards_N[worse]:
                break
            pairs.append((better, worse))
    return rng.permutation(np.array(pairs, np.int64).reshape(-1, 2))


def response_lengths(rows: Dataset) -> np.ndarray:
    """Response tokens of each row (those with a value before them), int64 [N]."""
    batches = rows.select_columns("keep").with_format("numpy").iter(batch_size=4096)
    lengths = [np.count_nonzero(keep[1:]) for batch in batches for keep in batch["keep"]]
    return np.array(lengths, np.int64)


def problem_ids(rows: Dataset) -> list[str | None]:
    """Problem of each row, None where it has none."""
    return rows["problem_id"][:] if "problem_id" in rows.column_names else [None] * len(rows)


def fingerprint_responses(rows: Dataset) -> str:
    """Hash of what the tokens do not show: how long each response is, and to which problem."""
    content = [response_lengths(rows).tolist(), problem_ids(rows)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def training_items(
    train: Responses, heldout: Responses, *, objective: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """What a critic is trained on, and the held-out pairs that judge it.

    Returns:
        int64 [n, 1], rows with a response (``regression``), or [n, 2], pairs of rows
        (``pairwise``); and held-out pairs [P, 2].

    Raises:
        ValueError: if the objective needs pairs and there are none.
    """
    found = {}
    for name, responses in (("dataset", train), ("dataset_val", heldout)):
        assert responses.rewards is not None
        lengths, problems = response_lengths(responses.rows), problem_ids(responses.rows)
        found[name] = make_pairs(lengths, responses.rewards, problems, seed=seed)
        if objective == "pairwise" and not len(found[name]):
            raise ValueError(
                f"{name} has no two responses to one problem of like length and unlike reward: "
                "the pairwise objective needs good and bad responses with a problem_id; with "
                "critic.objective: regression a reward is enough"
            )
    items = found["dataset"]
    if objective == "regression":
        items = np.flatnonzero(response_lengths(train.rows))[:, None]
    return items, found["dataset_val"]


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
