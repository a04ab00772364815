"""Per-token losses of a reference model, computed before or during training.

Shapes: B batch, T positions, K heads. Head k at position t predicts token u = t + k + 1.

A next-token reference gives one loss per token, stored at the predicted token and shared by every
head that predicts it: r[b, t, k] = q[b, t + k + 1]. An MTP reference gives each head's own loss,
stored at the predicting position.
"""

import numpy as np
import torch

from wmtp_modules.data.packing import pad_rows
from wmtp_modules.loss.mtp_loss import IGNORE_INDEX, mtp_labels, shift_to_heads
from wmtp_modules.models.mtp_transformer import MTPTransformer


@torch.no_grad()
def reference_losses(
    model: MTPTransformer,
    tokens_BT: torch.Tensor,
    doc_BT: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    input_pos: torch.Tensor | None = None,
) -> torch.Tensor:
    """Losses of a reference on every token, supervised or not.

    Args:
        model: the reference; with one head it is a next-token model.
        tokens_BT: token ids, int64.
        doc_BT: int64, index of the token's document inside its row, -1 for padding.
        mask: attention mask of the packed row, see ``MTPTransformer``.
        input_pos: position of each token inside its document.

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
