"""Per-token losses of a reference model, computed before or during training.

Shapes: B batch, T positions, K heads. Head k at position t predicts token u = t + k + 1.

An MTP reference gives each head's own loss, stored at the predicting position. A next-token
reference gives one loss per token, stored at the predicted token and shared by every head that
predicts it: r[b, t, k] = q[b, t + k + 1]. It knows tokens that heads above 0 cannot.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torchtune.modules.attention_utils import _MaskType

from wmtp_modules.checkpoints.read import check_same_vocabulary, load_into, model_args_from_folder
from wmtp_modules.data.packing import pad_rows
from wmtp_modules.loss.mtp_loss import IGNORE_INDEX, mtp_labels, shift_to_heads
from wmtp_modules.models.attention_mask import document_mask
from wmtp_modules.models.model_builders import mtp_llama2
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.parallel.process_group import share_from_rank_zero
from wmtp_modules.parallel.sharding import cast_parameters_
from wmtp_modules.scoring.score_table import (
    ScoreTable,
    compute_scores,
    fingerprint_checkpoint,
    fingerprint_rows,
    fingerprint_tokenizer,
)


def load_reference(
    checkpoint_dir: str | Path,
    *,
    tokenizer_path: str | Path,
    max_seq_len: int,
    n_future_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> MTPTransformer:
    """The reference, whole on each rank and in compute precision: it only scores.

    ``tokenizer_path`` and ``n_future_tokens`` are those of the training model.

    Raises:
        ValueError: if it has another vocabulary, or more than one head but fewer than the model.
    """
    args = model_args_from_folder(checkpoint_dir, max_seq_len=max_seq_len)
    check_same_vocabulary(tokenizer_path, Path(checkpoint_dir) / "tokenizer.model")
    if 1 < args["n_future_tokens"] < n_future_tokens:
        raise ValueError(
            f"the MTP reference in {checkpoint_dir} has {args['n_future_tokens']} heads, the model "
            f"{n_future_tokens}: use one with at least as many heads, or a next-token reference"
        )
    with torch.device("meta"):
        model = mtp_llama2(**args)
    cast_parameters_(model, dtype)
    load_into(model, checkpoint_dir, device=device)
    return model.eval().requires_grad_(False)


def reference_table(
    model: MTPTransformer,
    rows: Dataset,
    *,
    checkpoint_dir: str | Path,
    table_dir: str | Path,
    tokenizer_path: str | Path,
    max_seq_len: int,
    dtype: str,
    batch_tokens: int,
    beat: Callable[[str], None],
) -> ScoreTable:
    """Reference losses of every row: computed once, data-parallel, and kept in a table.

    Args:
        rows: tokenised rows, before packing.
        checkpoint_dir: where the model is from.
        table_dir: folder of the table.
        dtype: name of the dtype that computes the losses.
        batch_tokens: tokens that are scored at a time, padding included.
        beat: see ``compute_scores``, as for errors.
    """
    n_heads, fingerprint = model.n_future_tokens, None
    if dist.get_rank() == 0:  # reads every byte of the checkpoint: once is enough
        fingerprint = {
            "checkpoint": fingerprint_checkpoint(checkpoint_dir),
            "tokenizer": fingerprint_tokenizer(tokenizer_path),
            "dataset": fingerprint_rows(rows),
            "max_seq_len": max_seq_len,
            "kind": "next-token loss" if n_heads == 1 else "mtp losses",
            "n_heads": n_heads,
            # Tables of before 2026-11-28 hold losses of logits that were rounded to bf16.
            "dtype": dtype if dtype == "fp32" else f"{dtype}, fp32 logits",
        }
    fingerprint = share_from_rank_zero(fingerprint)
    compute_scores(
        table_dir,
        fingerprint,
        rows,
        lambda batch: score_rows(model, batch),
        batch_tokens=batch_tokens,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        beat=beat,
    )
    return ScoreTable.open(table_dir, fingerprint, rows)


@torch.no_grad()
def reference_losses(
    model: MTPTransformer,
    tokens_BT: torch.Tensor,
    doc_BT: torch.Tensor,
    *,
    mask: _MaskType | None = None,
    input_pos: torch.Tensor | None = None,
) -> torch.Tensor:
    """Losses of a reference on every token, supervised or not.

    Args: see ``MTPTransformer`` and ``mtp_labels``.

    Returns:
        One head: fp32 q_BT, q[b, u] = CE(reference at u - 1, token u), NaN at the first token of
        a document and at padding. More heads: fp32 losses_BTK, NaN where the target leaves the
        document.
    """
    labels_BTK = mtp_labels(tokens_BT, doc_BT >= 0, doc_BT, model.n_future_tokens)
    was_training = model.training
    model.eval()
    losses_BTK = model(tokens_BT, labels_BTK, mask=mask, input_pos=input_pos)
    model.train(was_training)
    losses_BTK = torch.where(labels_BTK == IGNORE_INDEX, torch.nan, losses_BTK.float())
    if model.n_future_tokens > 1:
        return losses_BTK
    return torch.nn.functional.pad(losses_BTK[:, :-1, 0], (1, 0), value=torch.nan)


def align_reference(
    reference: torch.Tensor, n_future_tokens: int, mask_BTK: torch.Tensor | None = None
) -> torch.Tensor:
    """Reference losses at the positions and heads of the training model.

    Args:
        reference: from ``reference_losses`` or a score table: [B, T] of a next-token reference,
            or [B, T, K_ref] of an MTP reference.
        n_future_tokens: K of the training model.
        mask_BTK: if given, every position where it is True must have a reference loss. Pass it
            while the batch is on the CPU: on a GPU the check would wait for the device.

    Returns:
        fp32 reference_BTK, NaN where the reference has no loss.

    Raises:
        ValueError: if the reference has fewer heads than the model, or lacks a needed loss.
    """
    if reference.dim() == 2:
        reference_BTK = shift_to_heads(reference, n_future_tokens, torch.nan)
    elif reference.shape[-1] >= n_future_tokens:
        reference_BTK = reference[..., :n_future_tokens]
    else:
        raise ValueError(
            f"the MTP reference has {reference.shape[-1]} heads, the model {n_future_tokens}: use "
            "a reference with at least as many heads, or a next-token reference"
        )
    if mask_BTK is not None and (mask_BTK & reference_BTK.isnan()).any():
        missing = int((mask_BTK & reference_BTK.isnan()).sum())
        raise ValueError(
            f"{missing} supervised targets of the batch have no reference loss: the scores belong "
            "to other rows, so score this data set again"
        )
    return reference_BTK


def packed_losses(
    model: MTPTransformer, batch: dict, n_future_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(reference_BTK, labels_BTK) of a packed micro-batch, for the heads of the training model.

    The reference's loss is 0 where the head has no target.
    """
    labels_BTK = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], n_future_tokens)
    mask, input_pos = document_mask(batch["doc"]), batch["input_pos"]
    reference = reference_losses(
        model, batch["tokens"], batch["doc"], mask=mask, input_pos=input_pos
    )
    reference_BTK = align_reference(reference, n_future_tokens)
    return torch.where(labels_BTK == IGNORE_INDEX, 0, reference_BTK), labels_BTK


def beside_model(n_heads: int, reference_K: list[float], model_K: list[float]) -> dict:
    """Held-out losses of a reference with ``n_heads`` heads beside the model's, for summary.json.

    Both are means over each head's own targets, of a next-token reference too. ``not_below`` are
    the heads whose targets the reference does not know better.
    """
    pairs = enumerate(zip(reference_K, model_K, strict=True))
    return {
        "heads": n_heads,
        "kind": "next-token" if n_heads == 1 else "mtp",
        "heldout_loss": reference_K,
        "model_heldout_loss": model_K,
        "not_below": [k for k, (reference, model) in pairs if reference >= model],
    }


def said_of(beside: dict) -> list[tuple[int, str]]:
    """What a log says of ``beside_model``, each with its level: a table, a note or warnings."""
    names, K = ("reference", "model"), len(beside["heldout_loss"])
    table = "Held-out loss per head before training\n" + " " * 14
    table += "  ".join(f"head {k}" for k in range(K))
    for name, key in zip(names, ("heldout_loss", "model_heldout_loss"), strict=True):
        table += f"\n  {name:12}" + "  ".join(f"{loss:6.3f}" for loss in beside[key])
    said = [(logging.INFO, table)]
    if beside["kind"] == "next-token":
        heads = "head 1" if K == 2 else f"heads 1 to {K - 1}"
        note = (
            f"The reference is a next-token one. It has seen tokens that {heads} cannot see, and "
            f"tells {heads} to learn what they cannot know; one of {K} heads does not (docs/7b.md)."
        )
        return said + [(logging.INFO, note)] * (K > 1)
    warning = (
        "Head {} of the reference is not below the model's in held-out loss. As measured, such a "
        "reference does worse than a next-token one, though in noise still better than uniform "
        "weights: train it longer or on cleaner data (docs/7b.md)."
    )
    return said + [(logging.WARNING, warning.format(k)) for k in beside["not_below"]]


def score_rows(model: MTPTransformer, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Reference losses of some rows, for ``compute_scores``: fp32 [len] or [len, K] of each.

    Rows are padded on the right, where causal attention cannot see, so a row's scores do not depend
    on its batch. Ranks score different numbers of batches, so the model must not be sharded.

    Raises:
        ValueError: if a loss is not finite.
    """
    tokens_BT, doc_BT = pad_rows(rows)
    device = next(model.parameters()).device
    losses = reference_losses(model, tokens_BT.to(device), doc_BT.to(device)).cpu().numpy()

    scores = [losses[b, : len(row)] for b, row in enumerate(rows)]
    for row_scores in scores:
        n_targets = sum(max(len(row_scores) - k - 1, 0) for k in range(model.n_future_tokens))
        if np.isfinite(row_scores).sum() != n_targets:
            raise ValueError(
                f"the reference's loss is not finite in a row of {len(row_scores)} tokens: check "
                "its checkpoint, tokenizer and dtype"
            )
    return scores
