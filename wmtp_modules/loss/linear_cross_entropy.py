"""Output projection and cross-entropy in one step, without holding [N, V] logits.

Shapes: N tokens (batch x positions x heads), D model width, V vocabulary.

No library provides all three requirements: losses in fp32 from bf16 operands, gradients that stay
exact when per-token weights are applied afterwards, and weights folded in at the forward when they
are known. ``F.linear_cross_entropy`` of torch 2.13 recomputes for ``reduction="none"`` but returns
losses in the operands' dtype and takes no token weights; docs/log.md compares cut-cross-entropy and
Liger.

Products of bf16 operands come out as the fp32 sums that they are: rounded to bf16, logits would put
1e-2 on a loss. CUDA's matrix product has them as its result (``out_dtype``); elsewhere a chunk's
hidden states and a piece of the weight are upcast. What CUDA cannot do is multiply fp32 by bf16 at
full speed: its backward reads the logits' gradients rounded to bf16, each off by at most 2^-8 of
itself. A CPU does not round them, and takes two to three times as long as for bf16 products.
"""

from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

IMPLS = ("chunked", "compiled")

# Logits held at a time. On a CPU a chunk should fit the caches; on a GPU each chunk also reads and
# writes the [V, D] gradient once, so chunks are larger there (0.5 GiB of fp32 logits).
CHUNK_LOGITS_CPU = 2**24
CHUNK_LOGITS_CUDA = 2**27

WIDE = (torch.float32, torch.float64)  # products of these are taken as they are


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None = None,
    *,
    impl: str = "chunked",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of ``hidden @ weight.T`` against labels, chunk by chunk.

    Without ``token_weights`` the per-token losses are differentiable and may be multiplied by
    any weights before the backward, which recomputes the logits (4 matrix products). With
    ``token_weights`` the gradients are computed in the forward (3 products).

    Args:
        hidden: [..., D] in the compute dtype.
        weight: [V, D] in the same dtype; a plain tensor.
        labels: int64 [...]; a negative label, such as -100, gives loss 0 and no gradient. A label
            of V or more is an indexing error of torch, asynchronous on a GPU.
        token_weights: [...] fp32, treated as constants.
        impl: "chunked", or "compiled" for the same arithmetic through ``torch.compile``, which
            fuses the softmax passes (meant for CUDA).

    Returns:
        Losses [...] in fp32 (fp64 for fp64 operands), within 1e-5 of the operands' exact loss at
        the sizes of a Llama. With ``token_weights`` the pair
        (scalar sum of token_weights * losses, losses without gradient).

    Raises:
        ValueError: for an unknown ``impl``, mismatched shapes, or a sharded weight.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLS)}")
    if isinstance(weight, DTensor):
        raise ValueError(
            "the output weight is sharded: compute the loss inside the forward of the FSDP unit "
            "that owns it, otherwise the other ranks' gradients are lost"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit hidden {tuple(hidden.shape)}")
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    if token_weights is None:
        return _PerTokenLoss.apply(flat_hidden, weight, labels, impl)
    if token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights {tuple(token_weights.shape)} do not fit labels {tuple(labels.shape)}"
        )
    return _WeightedLoss.apply(flat_hidden, weight, labels, token_weights.detach(), impl)


@torch.no_grad()
def losses_and_choices(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, impl: str = "chunked"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token losses and the likeliest tokens, of one product and without gradients.

    Args:
        hidden, weight, labels, impl: as ``linear_cross_entropy`` takes them.

    Returns:
        Its losses, [...] in fp32 (fp64 for fp64 operands), and argmax of the same logits, int64
        [...], also where a label is ignored: what greedy decoding chooses there.
    """
    labels_N, hidden_ND = labels.reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    losses_of, losses, choices = _pick(_losses_of, impl), [], []
    for chunk in _chunks(len(labels_N), len(weight), hidden.device):
        logits_NV = _logits(hidden_ND[chunk], weight)
        losses.append(losses_of(logits_NV, labels_N[chunk])[0])
        choices.append(logits_NV.argmax(-1))
    return torch.cat(losses).view(labels.shape), torch.cat(choices).view(labels.shape)


def linear_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits ``hidden @ weight.T``, differentiable: as those of the loss, but all at once.

    Args:
        hidden: [..., D] in the compute dtype.
        weight: [V, D] in the same dtype; a plain tensor.

    Returns:
        [..., V] in fp32 (fp64 for fp64 operands).
    """
    if hidden.dtype in WIDE:
        return F.linear(hidden, weight)
    logits_NV = _LinearLogits.apply(hidden.reshape(-1, hidden.shape[-1]), weight)
    return logits_NV.view(*hidden.shape[:-1], len(weight))


def _gives_fp32(device: torch.device) -> bool:
    """Whether a matrix product of bf16 operands can have an fp32 result there."""
    return device.type == "cuda"


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32; operands in bf16, or on a device that has to upcast them, in fp32."""
    if _gives_fp32(a.device):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _logits(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Logits of one chunk in fp32, or fp64 for fp64 operands."""
    if hidden_ND.dtype in WIDE:
        return hidden_ND @ weight_VD.t()
    if _gives_fp32(hidden_ND.device):
        return _product(hidden_ND, weight_VD.t())
    hidden_ND = hidden_ND.float()
    logits_NV = hidden_ND.new_empty(len(hidden_ND), len(weight_VD))
    for rows in _pieces(weight_VD):
        logits_NV[:, rows] = _product(hidden_ND, weight_VD[rows].t())
    return logits_NV


def _losses_of(
    logits_NV: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token loss and log-sum-exp of one chunk."""
    lse_N = torch.logsumexp(logits_NV, dim=-1)
    # Every negative label is ignored: checking for wrong ones would wait for the device.
    picked_N = logits_NV.gather(1, labels_N.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(labels_N >= 0, lse_N - picked_N, 0.0), lse_N


def _logit_grads(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, lse_N: torch.Tensor, grad_N: torch.Tensor
) -> torch.Tensor:
    """d(sum grad * loss) / d logits = grad * (softmax - onehot). Overwrites the logits."""
    grad_N = torch.where(labels_N >= 0, grad_N, 0.0)
    probs_NV = logits_NV.sub_(lse_N[:, None]).exp_().mul_(grad_N[:, None])
    return probs_NV.scatter_add_(1, labels_N.clamp(min=0)[:, None], -grad_N[:, None])


@lru_cache
def _pick(function, impl: str):
    return torch.compile(function, dynamic=True) if impl == "compiled" else function


def _limit(device: torch.device) -> int:
    return CHUNK_LOGITS_CUDA if device.type == "cuda" else CHUNK_LOGITS_CPU


def _chunks(n: int, vocab: int, device: torch.device) -> list[slice]:
    """Slices of nearly equal length, as few as have logits that fit the chunk size."""
    most = max(1, _limit(device) // vocab)
    count = max(1, -(-n // most))
    cuts = [n * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def _pieces(weight_VD: torch.Tensor) -> list[slice]:
    """Rows of a [V, D] tensor whose fp32 copy takes half of what a chunk's logits do."""
    V, D = weight_VD.shape
    most = max(1, _limit(weight_VD.device) // 2 // D)
    most = most // 64 * 64 or most  # CUDA's kernels want addresses that are aligned
    return [slice(start, min(start + most, V)) for start in range(0, V, most)]


def _shaped(losses_N: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Not a view: FSDP2 hooks its backward to what the forward returns, and an in-place
    operation on a view would drop the hook."""
    return losses_N.new_empty(shape).copy_(losses_N.view(shape))


class _Gradients:
    """Accumulates both gradients over chunks, the weight's in fp32 whatever the compute dtype."""

    def __init__(self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, needed: tuple) -> None:
        self.hidden_ND, self.weight_VD = hidden_ND, weight_VD
        self.hidden_grad = torch.empty_like(hidden_ND) if needed[0] else None
        accumulate = torch.promote_types(weight_VD.dtype, torch.float32)
        self.weight_grad = torch.zeros_like(weight_VD, dtype=accumulate) if needed[1] else None

    def add(self, chunk: slice, logit_grad_NV: torch.Tensor) -> None:
        hidden_ND, weight_VD = self.hidden_ND[chunk], self.weight_VD
        if weight_VD.dtype in WIDE:
            if self.hidden_grad is not None:
                torch.mm(logit_grad_NV, weight_VD, out=self.hidden_grad[chunk])
            if self.weight_grad is not None:
                self.weight_grad.addmm_(logit_grad_NV.t(), hidden_ND)
            return
        if _gives_fp32(weight_VD.device):
            logit_grad_NV = logit_grad_NV.to(weight_VD.dtype)  # both operands are of one dtype
        else:
            hidden_ND = hidden_ND.float()
        hidden_grad_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
        for rows in _pieces(weight_VD):
            part_NR = logit_grad_NV[:, rows]
            if self.hidden_grad is not None:
                hidden_grad_ND += _product(part_NR, weight_VD[rows])
            if self.weight_grad is not None:
                self.weight_grad[rows] += _product(part_NR.t(), hidden_ND)
        if self.hidden_grad is not None:
            self.hidden_grad[chunk] = hidden_grad_ND

    def results(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both in the dtype of their operand."""
        weight_grad = self.weight_grad
        if weight_grad is not None:
            weight_grad = weight_grad.to(self.weight_VD.dtype)
        return self.hidden_grad, weight_grad


def _scaled(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x * scale, rounded once: a scale without dimensions would be rounded to bf16 before."""
    return torch.mul(x, scale.reshape(1, 1), out=torch.empty_like(x, dtype=dtype))


class _LinearLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD):
        ctx.save_for_backward(hidden_ND, weight_VD)
        return _logits(hidden_ND, weight_VD)

    @staticmethod
    def backward(ctx, *grads_of_logits):
        (grad_NV,) = grads_of_logits
        hidden_ND, weight_VD = ctx.saved_tensors
        grads = _Gradients(hidden_ND, weight_VD, ctx.needs_input_grad)
        for chunk in _chunks(len(grad_NV), len(weight_VD), hidden_ND.device):
            grads.add(chunk, grad_NV[chunk])
        return grads.results()


class _PerTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels, impl):
        labels_N = labels.reshape(-1)
        losses_of = _pick(_losses_of, impl)
        parts = [
            losses_of(_logits(hidden_ND[chunk], weight_VD), labels_N[chunk])
            for chunk in _chunks(len(labels_N), len(weight_VD), hidden_ND.device)
        ]
        losses_N, lse_N = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, lse_N)
        ctx.impl = impl
        return _shaped(losses_N, labels.shape)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        grad_N = grad.reshape(-1)
        hidden_ND, weight_VD, labels_N, lse_N = ctx.saved_tensors
        logit_grads = _pick(_logit_grads, ctx.impl)
        grads = _Gradients(hidden_ND, weight_VD, ctx.needs_input_grad)
        for chunk in _chunks(len(labels_N), len(weight_VD), hidden_ND.device):
            logits_NV = _logits(hidden_ND[chunk], weight_VD)
            grads.add(chunk, logit_grads(logits_NV, labels_N[chunk], lse_N[chunk], grad_N[chunk]))
        return (*grads.results(), None, None)


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels, token_weights, impl):
        labels_N, token_weights_N = labels.reshape(-1), token_weights.reshape(-1)
        losses_of, logit_grads = _pick(_losses_of, impl), _pick(_logit_grads, impl)
        grads = _Gradients(hidden_ND, weight_VD, ctx.needs_input_grad)
        parts = []
        for chunk in _chunks(len(labels_N), len(weight_VD), hidden_ND.device):
            logits_NV = _logits(hidden_ND[chunk], weight_VD)
            chunk_losses, lse = losses_of(logits_NV, labels_N[chunk])
            parts.append(chunk_losses)
            if any(ctx.needs_input_grad):
                weights = token_weights_N[chunk].to(lse.dtype)
                grads.add(chunk, logit_grads(logits_NV, labels_N[chunk], lse, weights))
        losses_N = torch.cat(parts)
        losses = _shaped(losses_N, labels.shape)
        ctx.hidden_grad, ctx.weight_grad = grads.hidden_grad, grads.weight_grad
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(losses)
        return (losses_N * token_weights_N).sum(), losses

    @staticmethod
    def backward(ctx, *outer):
        grad, _ = outer  # of the losses, which are not differentiable, there is none
        # The products are already computed; only the incoming scalar is left to apply.
        hidden_grad, weight_grad = ctx.hidden_grad, ctx.weight_grad
        if hidden_grad is not None:
            hidden_grad = _scaled(hidden_grad, grad, hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = _scaled(weight_grad, grad, ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None
