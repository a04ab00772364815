"""Runs a critic over rows: values, their sums and the advantages that follow from them.

Shapes: N rows of a data set, B rows of a batch, T positions. V[t] is the value after token t.

``model`` is the critic's trunk, whole on this rank; ``rows`` are N tokenised rows, ``batches`` the
indices of those to take, some at a time; ``rewards_N`` are the standardised rewards of all rows.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset

from wmtp_modules.critic.figures import near_marks
from wmtp_modules.data.packing import pad_rows
from wmtp_modules.loss.value_loss import response_mask, value_sums
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.run.watchdog import Watchdog
from wmtp_modules.scoring.score_table import compute_scores, fingerprint_tokenizer
from wmtp_modules.weighting.advantage import advantages


@torch.no_grad()
def row_values(model: MTPTransformer, head: ValueHead, rows: list[np.ndarray]) -> list[np.ndarray]:
    """fp32 V after every token of some rows, [len] each; ValueError if one is not finite."""
    tokens_BT, _ = pad_rows(rows)
    hidden_BTD = model.trunk(tokens_BT.to(head.shift.device))
    values_BT = head(hidden_BTD).cpu().numpy()
    values = [values_BT[b, : len(row)] for b, row in enumerate(rows)]
    for values_T in values:
        if not np.isfinite(values_T).all():
            raise ValueError(
                f"the critic's value is not finite somewhere in a row of {len(values_T)} tokens: "
                "check the trunk's checkpoint, its tokenizer and the dtype"
            )
    return values


def batch_of(rows: Dataset, indices: list[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Some rows side by side, padded on the right, each a document of its own.

    Returns:
        ``tokens``, ``doc`` int64 [B, T] and ``y``, ``noise`` bool [B, T].
    """
    picked = rows.select(indices).with_format("numpy")
    tokens_BT, doc_BT = pad_rows(list(picked["tokens"]))
    batch = {"tokens": tokens_BT, "doc": doc_BT}
    for name in ("keep", "noise"):
        batch[name] = torch.zeros_like(doc_BT, dtype=torch.bool)
        if name in picked.column_names:
            for b, row in enumerate(picked[name]):
                batch[name][b, : len(row)] = torch.from_numpy(np.asarray(row, bool))
    batch["y"] = response_mask(batch.pop("keep"), doc_BT)
    return {name: value.to(device) for name, value in batch.items()}


@torch.no_grad()
def sums_of_rows(
    model: MTPTransformer, head: ValueHead, rows: Dataset, batches: Iterable[np.ndarray]
) -> np.ndarray:
    """``value_sums`` of some rows, fp64 [N, 3]; 0 for the others, so that ranks can add up."""
    sums_N3 = np.zeros((len(rows), 3))
    for indices in batches:
        batch = batch_of(rows, indices.tolist(), head.shift.device)
        values_BT = head(model.trunk(batch["tokens"]))
        sums_N3[indices] = value_sums(values_BT, batch["y"]).cpu().numpy()
    return sums_N3


@torch.no_grad()
def row_advantages(
    model: MTPTransformer,
    head: ValueHead,
    rows: Dataset,
    indices: np.ndarray,
    rewards_N: np.ndarray,
    *,
    lam: float,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """``batch_of`` some rows and their fp64 advantages_BT, straight from the critic."""
    batch = batch_of(rows, indices.tolist(), head.shift.device)
    values_BT = head(model.trunk(batch["tokens"]))
    rewards_BT = torch.from_numpy(rewards_N[indices]).to(values_BT)[:, None].expand_as(values_BT)
    return batch, advantages(values_BT, rewards_BT, batch["y"], batch["doc"], lam=lam)


def near_marks_of_rows(
    model: MTPTransformer,
    head: ValueHead,
    rows: Dataset,
    batches: Iterable[np.ndarray],
    rewards_N: np.ndarray,
) -> np.ndarray:
    """``near_marks`` of some rows whose column ``noise`` marks what is wrong, for ranks to add."""
    found = np.zeros(3)
    for indices in batches:
        batch, delta_BT = row_advantages(model, head, rows, indices, rewards_N, lam=0.0)
        found += near_marks(delta_BT, batch["y"], batch["noise"])
    return found


def values_fingerprint(critic: dict, head_file: Path, *, max_seq_len: int) -> dict:
    """What a table of values depends on: ``critic_fingerprint``, the head's weights, the rows."""
    return {
        "checkpoint": critic["trunk"],
        "critic": fingerprint_tokenizer(head_file),
        "tokenizer": critic["tokenizer"],
        "dataset": critic["dataset"],
        "max_seq_len": max_seq_len,
        "kind": "values",
        "n_heads": 1,
        "dtype": critic["dtype"],
    }


def compute_values(
    trunk: Callable[[], MTPTransformer],
    head: ValueHead,
    rows: Dataset,
    *,
    table_dir: str | Path,
    fingerprint: dict,
    batch_tokens: int,
    watchdog: Watchdog,
) -> None:
    """V after every token of some rows, kept in a table; the ranks share the rows.

    Args:
        trunk: loads the model, if a row is missing.
        batch_tokens: tokens at a time, padding included.

    Raises:
        ValueError: if the folder holds a table of something else, or a value is not finite.
    """
    with watchdog:
        compute_scores(
            table_dir,
            fingerprint,
            rows,
            lambda batch: row_values(trunk(), head, batch),
            batch_tokens=batch_tokens,
            rank=dist.get_rank(),
            world=dist.get_world_size(),
            desc="values",
            beat=watchdog.beat,
        )
