"""Self-distillation: heads 1 to K - 1 learn what head 0 expects of the tokens that they predict.

Shapes: B rows, T positions, J = K - 1 further heads, D model width, V vocabulary, N = B * T.
Head k at position t predicts token u = t + k + 1, and so does head 0 at position t + k, which has
seen k tokens more. Per token, with z the head's logits, y head 0's at t + k, and a temperature s,

    loss = (1 - weight) * cross-entropy(z, u) + weight * s^2 * KL(softmax(y / s) || softmax(z / s)),

the second term being Hinton et al. 2015 (arXiv 1503.02531, section 2), whose s^2 keeps gradients of
one size. The teacher has no gradient, as in MTP-D (arXiv 2603.23911), which takes the N largest
logits where we take all; KL in this direction over all of the vocabulary is also what the library
speculators trains its drafts with (``kl_div_loss``). FastMTP (arXiv 2509.18362) distils otherwise:
by text that the model wrote, which is a matter of the data set.

As in ``linear_cross_entropy`` logits live in chunks. Head 0's are made once for all heads: a chunk
holds its positions p = t + k, and each head's positions t = p - k beside them. Positions p from
which nothing is to be predicted, in prompts and padding, are left out where their number is known.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from wmtp_modules.loss.linear_cross_entropy import (
    DENSE,
    _chunks,
    _Gradients,
    _logit_grads,
    _logits,
    _pick,
    _scaled,
    _targets_first,
)


@dataclass(frozen=True)
class Distill:
    """How much heads 1 to K - 1 learn from head 0; by default nothing.

    Args:
        weight: share of the distillation in their loss, in [0, 1].
        temperature: of both distributions, above 0.
    """

    weight: float = 0.0
    temperature: float = 1.0


def distilled_cross_entropy(
    hidden_BTJD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_BTJ: torch.Tensor,
    teacher_BTD: torch.Tensor,
    distill: Distill,
    token_weights_BTJ: torch.Tensor | None = None,
    *,
    impl: str = "chunked",
    most_targets: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of heads 1 to K - 1 against their labels and head 0.

    Args:
        hidden_BTJD: normed hidden states of these heads, as ``linear_cross_entropy`` takes them.
        weight_VD: output projection; a plain tensor.
        labels_BTJ: int64; a negative one gives loss 0. Where it is not negative, position
            t + j + 1 lies in the same row and document, see ``mtp_labels``.
        teacher_BTD: head 0's normed hidden states; no gradient goes there.
        token_weights_BTJ: fp32 weights known beforehand, constants.
        impl: as in ``linear_cross_entropy``.
        most_targets: how many labels of a head are not negative, at most, where the host knows.

    Returns:
        (what to train on, cross-entropy_BTJ, temperature^2 KL_BTJ), the last two without gradient.
        The first is the loss above per token, [B, T, J], or with weights the sum of weight * loss.
    """
    B, T, J, D = hidden_BTJD.shape
    of_heads = (
        None if x is None else x.permute(2, 0, 1).reshape(J, -1)
        for x in (labels_BTJ, token_weights_BTJ)
    )
    hidden_XD = hidden_BTJD.permute(2, 0, 1, 3).reshape(-1, D)  # X = J * N, a head after the other
    teacher_ND = teacher_BTD.detach().reshape(-1, D)
    labels_JN, token_weights_JN = of_heads
    assert labels_JN is not None
    rows = _teachers(labels_JN, most_targets)
    operands = hidden_XD, weight_VD, teacher_ND, labels_JN, token_weights_JN
    results = _Distilled.apply(*operands, rows, distill, impl)
    back = [x.view(J, B, T).permute(1, 2, 0) if x.dim() else x for x in results]
    return back[0], back[1], back[2]


def _losses(
    logits_NV: torch.Tensor, teacher_NV: torch.Tensor, labels_N: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy, temperature^2 KL and log-sum-exp of a chunk; the teacher's are log p.

    In place: with logits and teacher two more of that size are alive, as in ``_grads``.
    """
    lse_N = logits_NV.logsumexp(-1)
    picked_N = logits_NV.gather(1, labels_N.clamp(min=0)[:, None]).squeeze(1)
    ce_N = torch.where(labels_N >= 0, lse_N - picked_N, 0.0)
    log_q_NV = logits_NV / temperature
    log_q_NV.sub_(log_q_NV.logsumexp(-1, keepdim=True))
    kl_N = log_q_NV.neg_().add_(teacher_NV).mul_(teacher_NV.exp()).sum(-1)
    return ce_N, torch.where(labels_N >= 0, temperature**2 * kl_N, 0.0), lse_N


def _grads(
    logits_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    labels_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_N: torch.Tensor,
    weight: float,
    temperature: float,
) -> torch.Tensor:
    """d(sum grad * loss) / d logits; the KL's is temperature * (q - p). Overwrites the logits."""
    soft_N = torch.where(labels_N >= 0, grad_N, 0.0) * (weight * temperature)
    q_NV = (logits_NV / temperature).softmax(-1)
    soft_NV = q_NV.sub_(teacher_NV.exp()).mul_(soft_N[:, None])
    return soft_NV.add_(_logit_grads(logits_NV, labels_N, lse_N, (1 - weight) * grad_N))


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_XD, weight_VD, teacher_ND, labels_JN, token_weights_JN, rows, distill, impl
    ):
        needed = ctx.needs_input_grad[:2]
        folds = token_weights_JN is not None
        grads = _new_gradients(hidden_XD, weight_VD, needed) if folds and any(needed) else None
        losses_of, grads_of = _pick(_losses, impl), _pick(_grads, impl)
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        ce_JN, kl_JN, lse_JN = (torch.zeros_like(labels_JN, dtype=wide) for _ in range(3))
        chunks = _chunks_of(hidden_XD, weight_VD, teacher_ND, labels_JN, rows, distill.temperature)
        for at, own_rows, logits_NV, teacher_NV in chunks:
            figures = losses_of(logits_NV, teacher_NV, labels_JN[at], distill.temperature)
            ce_JN[at], kl_JN[at], lse_JN[at] = figures
            if grads is not None:
                own = labels_JN[at], lse_JN[at], token_weights_JN[at].to(wide)
                grads.add(own_rows, grads_of(logits_NV, teacher_NV, *own, *_numbers(distill)))
            del logits_NV, teacher_NV  # before the next ones are made
        made = (None, None) if grads is None else (grads.hidden_grad, grads.weight_grad)
        ctx.save_for_backward(hidden_XD, weight_VD, teacher_ND, labels_JN, rows, lse_JN, *made)
        ctx.distill, ctx.impl, ctx.folds = distill, impl, folds
        ctx.mark_non_differentiable(ce_JN, kl_JN)
        loss = torch.lerp(ce_JN, kl_JN, distill.weight)
        return (loss * token_weights_JN).sum() if folds else loss, ce_JN, kl_JN

    @staticmethod
    def backward(ctx, *outer):
        grad, *_ = outer  # of the figures, which are not differentiable, there is none
        hidden_XD, weight_VD, teacher_ND, labels_JN, rows, lse_JN, *made = ctx.saved_tensors
        if ctx.folds:  # all but the incoming scalar is done
            dtypes = hidden_XD.dtype, weight_VD.dtype
            return *_scaled(made, grad, dtypes), *[None] * 6
        grads = _new_gradients(hidden_XD, weight_VD, ctx.needs_input_grad)
        grads_of, distill = _pick(_grads, ctx.impl), ctx.distill
        chunks = _chunks_of(hidden_XD, weight_VD, teacher_ND, labels_JN, rows, distill.temperature)
        for at, own_rows, logits_NV, teacher_NV in chunks:
            own = labels_JN[at], lse_JN[at], grad[at]
            grads.add(own_rows, grads_of(logits_NV, teacher_NV, *own, *_numbers(distill)))
            del logits_NV, teacher_NV
        return *grads.results(), *[None] * 6


def _numbers(distill: Distill) -> tuple[float, float]:
    return distill.weight, distill.temperature


def _new_gradients(hidden_XD: torch.Tensor, weight_VD: torch.Tensor, needed: tuple) -> _Gradients:
    grads = _Gradients(hidden_XD, weight_VD, needed)
    if grads.hidden_grad is not None:
        grads.hidden_grad.zero_()  # of rows that are in no chunk
    return grads


def _teachers(labels_JN: torch.Tensor, most: int | None) -> torch.Tensor:
    """Head 0's positions p that some head's label at t = p - k has it predict, in order."""
    J, N = labels_JN.shape
    if most is None or most >= DENSE * N:
        return torch.arange(N, device=labels_JN.device)
    # Of the last positions t, which have no p, no label is 0 or more: they may come round.
    is_target_JN = torch.stack([labels_JN[j].roll(j + 1) >= 0 for j in range(J)])
    return _targets_first(is_target_JN.any(0), most)


def _chunks_of(
    hidden_XD: torch.Tensor,
    weight_VD: torch.Tensor,
    teacher_ND: torch.Tensor,
    labels_JN: torch.Tensor,
    rows: torch.Tensor,
    temperature: float,
) -> Iterator[tuple[tuple[int, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A head at a time: index into [J, N], rows of hidden_XD, its logits, log p of the teacher.

    ``rows`` are positions of the teacher.
    """
    J, N = labels_JN.shape
    # Half the rows of a plain loss: a head's logits and the teacher's are there together.
    for chunk in _chunks(len(rows), 2 * len(weight_VD), weight_VD.device):
        teacher_NV = (_logits(teacher_ND[rows[chunk]], weight_VD) / temperature).log_softmax(-1)
        for j in range(J):
            at = (rows[chunk] - j - 1) % N
            yield (j, at), j * N + at, _logits(hidden_XD[j * N + at], weight_VD), teacher_NV
        del teacher_NV
