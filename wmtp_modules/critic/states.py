"""What a critic reads: the frozen trunk's last state, and how surprised the model itself was.

Shapes: B rows, one document each, T positions, D width of the trunk. Everything is stored at token
u and was known once u was read.
"""

from collections.abc import Iterable

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from wmtp_modules.data.packing import pad_rows, row_lengths
from wmtp_modules.loss.linear_cross_entropy import (
    CHUNK_LOGITS_CPU,
    CHUNK_LOGITS_CUDA,
    linear_logits,
)
from wmtp_modules.loss.value_loss import judged_mask, response_mask
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.models.value_head import N_SURPRISE, ValueHead, features
from wmtp_modules.parallel.process_group import all_reduce_sum

KEPT_BYTES = 2**30  # of states, on each rank
GROUP = 32  # rows


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
def trunk_states(
    model: MTPTransformer, tokens_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The trunk's output and the model's surprise at each token.

    Args:
        model: whole on this rank.
        tokens_BT: one document a row, padded on the right, where causal attention does not see.

    Returns:
        (hidden_BTD in the model's dtype, surprise_BT3 fp32: loss and entropy, in nats, of the
        distribution that head 0 had at u - 1 for token u, and loss of head 1's at u - 2; NaN where
        there is no such position or head).
    """
    hidden_BTD = model.trunk(tokens_BT)
    surprise_BT3 = torch.full((*tokens_BT.shape, N_SURPRISE), torch.nan, device=tokens_BT.device)
    ahead_BTKD = model.output.norm(torch.stack([head(hidden_BTD) for head in model.heads[:2]], 2))
    weight_VD = model.output.proj.weight
    for k in range(ahead_BTKD.shape[2]):
        if tokens_BT.shape[1] > k + 1:
            ahead_BTD = ahead_BTKD[:, : -k - 1, k]
            loss_BT, entropy_BT = _loss_and_entropy(ahead_BTD, weight_VD, tokens_BT[:, k + 1 :])
            surprise_BT3[:, k + 1 :, 2 * k] = loss_BT
            if k == 0:
                surprise_BT3[:, 1:, 1] = entropy_BT
    return hidden_BTD, surprise_BT3


def _loss_and_entropy(
    hidden_BTD: torch.Tensor, weight_VD: torch.Tensor, targets_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy against the targets and entropy of the distribution, fp32 [B, T] each."""
    at_a_time = CHUNK_LOGITS_CUDA if hidden_BTD.device.type == "cuda" else CHUNK_LOGITS_CPU
    flat_ND, flat_N, found = hidden_BTD.flatten(0, 1), targets_BT.flatten(), []
    for rows in torch.arange(len(flat_N), device=flat_N.device).split(
        max(1, at_a_time // len(weight_VD))
    ):
        log_p_NV = linear_logits(flat_ND[rows], weight_VD).log_softmax(-1)
        loss_N = -log_p_NV.gather(1, flat_N[rows, None]).squeeze(1)
        found.append(torch.stack([loss_N, -(log_p_NV.exp() * log_p_NV).sum(-1)]))
    loss_N, entropy_N = torch.cat(found, 1)
    return loss_N.view_as(targets_BT), entropy_N.view_as(targets_BT)


class RowStates:
    """``trunk_states`` of a data set's rows, each computed once if all of them fit in memory.

    The rows of a group are computed together, whichever of them is asked for, so that a restart
    finds the same bits.

    Args:
        model: whole on this rank, on ``device``.
    """

    def __init__(self, model: MTPTransformer, rows: Dataset, device: torch.device) -> None:
        self._model, self._rows, self._device = model, rows, device
        width = model.args["embed_dim"] * model.output.proj.weight.element_size() + 4 * N_SURPRISE
        self._is_kept = int(row_lengths(rows).sum()) * width <= KEPT_BYTES
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, indices: np.ndarray) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """``batch_of`` some rows, and their hidden_BTD and surprise_BT3."""
        batch = batch_of(self._rows, indices.tolist(), self._device)
        if not self._is_kept:
            return batch, *trunk_states(self._model, batch["tokens"])
        for row in indices.tolist():
            if row not in self._kept:
                self._compute_group(row // GROUP)
        kept = [self._kept[row] for row in indices.tolist()]
        return (
            batch,
            pad_sequence([hidden for hidden, _ in kept], batch_first=True),
            pad_sequence([x for _, x in kept], batch_first=True, padding_value=torch.nan),
        )

    def _compute_group(self, group: int) -> None:
        rows = list(range(group * GROUP, min((group + 1) * GROUP, len(self._rows))))
        batch = batch_of(self._rows, rows, self._device)
        hidden_BTD, surprise_BT3 = trunk_states(self._model, batch["tokens"])
        for b, n in enumerate((batch["doc"] >= 0).sum(1).tolist()):
            self._kept[rows[b]] = hidden_BTD[b, :n], surprise_BT3[b, :n]


def set_feature_statistics_(
    head: ValueHead, states: RowStates, batches: Iterable[np.ndarray]
) -> None:
    """Let a head standardise its features by mean and deviation over some rows of all ranks.

    ``batches`` are this rank's indices, some at a time. Over the tokens after which a critic is
    asked.
    """
    sums_3E = torch.zeros(3, len(head.mean), dtype=torch.float64, device=head.mean.device)
    for indices in batches:
        batch, *both = states(indices)
        found_NE = features(*both)[judged_mask(batch["y"])].double()
        known_NE = found_NE.isfinite()
        found_NE = found_NE.where(known_NE, 0.0)
        sums_3E += torch.stack([known_NE.sum(0), found_NE.sum(0), found_NE.square().sum(0)])
    (sums_3E,) = all_reduce_sum(sums_3E)
    n_E = sums_3E[0].clamp(min=1)
    mean_E = sums_3E[1] / n_E
    head.mean.copy_(mean_E)
    head.std.copy_((sums_3E[2] / n_E - mean_E.square()).clamp(min=1e-6).sqrt())
