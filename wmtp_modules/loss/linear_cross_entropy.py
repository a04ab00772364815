"""Output projection and cross-entropy in one step, without holding [N, V] logits.

Shapes: N tokens (batch x positions x heads), D model width, V vocabulary.

No library provides all three requirements: losses in fp32 from bf16 operands, gradients that stay
exact when per-token weights are applied afterwards, and weights folded in at the forward when they
are known. ``F.linear_cross_entropy`` of torch 2.13 recomputes for ``reduction="none"`` but returns
losses in the operands' dtype and takes no token weights; docs/log.md compares cut-cross-entropy and
Liger.

Products of bf16 operands come out as the fp32 sums that they are: rounded to bf16, logits would put
1e-2 on a loss. CUDA's matrix product has them as its result (``out_dtype``), or adds them to
an fp32 sum (pytorch/pytorch#167931; linkedin/Liger-Kernel#1239 measures 13.4 ms where a pass of its
own makes it 23.5); elsewhere a chunk's hidden states and a piece of the weight are upcast. What
CUDA cannot do is multiply fp32 by bf16 at full speed: its backward reads the logits' gradients
rounded to bf16, each off by at most 2^-8 of itself. A CPU does not round them, and takes two to
three times as long as for bf16 products.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

IMPLS = ("chunked", "compiled")

# Logits held at a time. On a CPU a chunk should fit the caches (32 MiB of fp32 logits); on a GPU
# each chunk also reads and writes the [V, D] gradient once, so chunks are larger there (0.5 GiB).
CHUNK_LOGITS_CPU = 2**23
CHUNK_LOGITS_CUDA = 2**27

DENSE = 0.9  # share of rows with a target from which on all are taken: choosing them copies them
ROWS = 128  # of which a chunk has a multiple, for the sake of CUDA's tiles

WIDE = (torch.float32, torch.float64)  # products of these are taken as they are


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None = None,
    *,
    impl: str = "chunked",
    most_targets: int | None = None,
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
        most_targets: how many labels are not negative, at most, where the host knows: rows without
            one are then left out of the products. More is an error, asynchronous on a GPU.

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
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights {tuple(token_weights.shape)} do not fit labels {tuple(labels.shape)}"
        )
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    if most_targets is not None and most_targets < DENSE * labels.numel():
        return _of_targets(flat_hidden, weight, labels, token_weights, impl, most_targets)
    if token_weights is None:
        return _PerTokenLoss.apply(flat_hidden, weight, labels, impl)
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
    for chunk, logits_NV in _logits_by_chunk(hidden_ND, weight):
        choices.append(logits_NV.argmax(-1))
        losses.append(losses_of(logits_NV, labels_N[chunk])[0])
        del logits_NV
    return torch.cat(losses).view(labels.shape), torch.cat(choices).view(labels.shape)


def _of_targets(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    impl: str,
    most: int,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``linear_cross_entropy`` of the rows with a target, and losses of 0 for the others."""
    labels_N = labels.reshape(-1)
    rows = _targets_first(labels_N >= 0, most)
    operands = hidden_ND[rows], weight_VD, labels_N[rows]

    def spread(losses: torch.Tensor) -> torch.Tensor:
        losses_N = losses.new_zeros(len(labels_N)).index_copy(0, rows, losses)
        return losses_N.view(labels.shape).clone()  # no view: see ``_shaped``

    if token_weights is None:
        return spread(_PerTokenLoss.apply(*operands, impl))
    own = token_weights.detach().reshape(-1)[rows]
    loss, losses = _WeightedLoss.apply(*operands, own, impl)
    return loss, spread(losses)


def _targets_first(is_target_N: torch.Tensor, most: int) -> torch.Tensor:
    """The first ``most`` rows after those with a target have been put first, in order.

    A boolean index would be shorter, and the host would wait for the device to count.
    """
    torch._assert_async(is_target_N.sum() <= most, "more targets than most_targets")
    return (~is_target_N).byte().argsort(stable=True)[:most]


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


def _add_product(to: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """to += a @ b in fp32, operands as ``_product`` takes them; CUDA adds within the product."""
    if _gives_fp32(a.device):
        torch.addmm(to, a, b, out_dtype=torch.float32, out=to)
    else:
        to += _product(a, b)


def _logits(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of one chunk in fp32, or fp64 for fp64 operands; a CPU writes them to ``out``."""
    if _gives_fp32(hidden_ND.device) and hidden_ND.dtype not in WIDE:
        return _product(hidden_ND, weight_VD.t())
    if out is None:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        out = hidden_ND.new_empty(len(hidden_ND), len(weight_VD), dtype=wide)
    if hidden_ND.dtype in WIDE:
        return torch.mm(hidden_ND, weight_VD.t(), out=out)
    hidden_ND = hidden_ND.float()
    for rows in _pieces(weight_VD):
        out[:, rows] = _product(hidden_ND, weight_VD[rows].t())
    return out


def _logits_by_chunk(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a chunk and their logits, which hold until the next ones.

    A CPU has all of them in one place: its allocator would give each 32 MiB back, and the kernel
    clear new ones. A GPU's keeps them, as soon as whoever asked has let go.
    """
    out_NV, in_one_place = None, not _gives_fp32(hidden_ND.device)
    for chunk in _chunks(len(hidden_ND), len(weight_VD), hidden_ND.device):
        own = out_NV if out_NV is None else out_NV[: chunk.stop - chunk.start]
        logits_NV = _logits(hidden_ND[chunk], weight_VD, own)
        if in_one_place and out_NV is None:
            out_NV = logits_NV  # the first chunk is the longest
        yield chunk, logits_NV
        del logits_NV


def _exponentials(
    logits_NV: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-token loss and log-sum-exp of one chunk, [N]; exp(logits - top) and their sum, [N, 1].

    Overwrites the logits: nothing else of their size is held, which a CPU's allocator would not
    always find room for again.
    """
    # Every negative label is ignored: checking for wrong ones would wait for the device.
    picked_N = logits_NV.gather(1, labels_N.clamp(min=0)[:, None]).squeeze(1)
    top_N1 = logits_NV.amax(-1, keepdim=True)
    exp_NV = logits_NV.sub_(top_N1).exp_()
    sum_N1 = exp_NV.sum(-1, keepdim=True)
    lse_N = (top_N1 + sum_N1.log()).squeeze(1)
    return torch.where(labels_N >= 0, lse_N - picked_N, 0.0), lse_N, exp_NV, sum_N1


def _losses_of(
    logits_NV: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token loss and log-sum-exp of one chunk. Overwrites the logits."""
    return _exponentials(logits_NV, labels_N)[:2]


def _logit_grads(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, lse_N: torch.Tensor, grad_N: torch.Tensor
) -> torch.Tensor:
    """d(sum grad * loss) / d logits = grad * (softmax - onehot). Overwrites the logits."""
    grad_N = torch.where(labels_N >= 0, grad_N, 0.0)
    probs_NV = logits_NV.sub_(lse_N[:, None]).exp_().mul_(grad_N[:, None])
    return probs_NV.scatter_add_(1, labels_N.clamp(min=0)[:, None], -grad_N[:, None])


def _losses_and_grads(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, weights_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both of a chunk, for weights that are known, with one exponential. Overwrites the logits."""
    losses_N, _, exp_NV, sum_N1 = _exponentials(logits_NV, labels_N)
    weights_N1 = torch.where(labels_N >= 0, weights_N.to(sum_N1.dtype), 0.0)[:, None]
    grads_NV = exp_NV.mul_(weights_N1 / sum_N1)
    return losses_N, grads_NV.scatter_add_(1, labels_N.clamp(min=0)[:, None], -weights_N1)


@lru_cache
def _pick(function, impl: str):
    return torch.compile(function, dynamic=True) if impl == "compiled" else function


def _limit(device: torch.device) -> int:
    return CHUNK_LOGITS_CUDA if device.type == "cuda" else CHUNK_LOGITS_CPU


def _chunks(n: int, vocab: int, device: torch.device) -> list[slice]:
    """Slices of one length but for the last, as few as have logits that fit the chunk size."""
    most = max(1, _limit(device) // vocab)
    multiple = ROWS if most >= ROWS else 1
    most -= most % multiple
    size = -(-n // max(1, -(-n // most)))  # as equal as can be
    size = max(1, -(-size // multiple) * multiple)
    cuts = [*range(0, n, size), n] if n else [0, 0]
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

    def add(self, chunk: slice | torch.Tensor, logit_grad_NV: torch.Tensor) -> None:
        """What these rows give, which are not given twice."""
        hidden_ND, weight_VD = self.hidden_ND[chunk], self.weight_VD
        if weight_VD.dtype in WIDE:
            if self.hidden_grad is not None:
                self.hidden_grad[chunk] = logit_grad_NV @ weight_VD
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
                _add_product(hidden_grad_ND, part_NR, weight_VD[rows])
            if self.weight_grad is not None:
                _add_product(self.weight_grad[rows], part_NR.t(), hidden_ND)
        if self.hidden_grad is not None:
            self.hidden_grad[chunk] = hidden_grad_ND.to(self.hidden_grad.dtype)

    def results(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both in the dtype of their operand."""
        weight_grad = self.weight_grad
        if weight_grad is not None:
            weight_grad = weight_grad.to(self.weight_VD.dtype)
        return self.hidden_grad, weight_grad


def _scaled(
    grads: Sequence[torch.Tensor | None], scale: torch.Tensor, dtypes: Sequence[torch.dtype]
) -> list[torch.Tensor | None]:
    """Gradients of a forward times the scalar that comes in, in place unless a backward follows.

    Rounded once: a scale without dimensions would be rounded to bf16 before.
    """
    may_come_again = torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph
    scale_11, scaled = scale.reshape(1, 1), list[torch.Tensor | None]()
    for x, dtype in zip(grads, dtypes, strict=True):
        if x is not None:
            in_place = x.dtype == dtype and not may_come_again
            out = x if in_place else torch.empty_like(x, dtype=dtype)
            x = torch.mul(x, scale_11, out=out)
        scaled.append(x)
    return scaled


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
        parts = []
        for chunk, logits_NV in _logits_by_chunk(hidden_ND, weight_VD):
            parts.append(losses_of(logits_NV, labels_N[chunk]))
            del logits_NV
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
        for chunk, logits_NV in _logits_by_chunk(hidden_ND, weight_VD):
            grads.add(chunk, logit_grads(logits_NV, labels_N[chunk], lse_N[chunk], grad_N[chunk]))
            del logits_NV
        return (*grads.results(), None, None)


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels, token_weights, impl):
        labels_N, token_weights_N = labels.reshape(-1), token_weights.reshape(-1)
        losses_of, losses_and_grads = _pick(_losses_of, impl), _pick(_losses_and_grads, impl)
        grads = _Gradients(hidden_ND, weight_VD, ctx.needs_input_grad)
        parts = []
        for chunk, logits_NV in _logits_by_chunk(hidden_ND, weight_VD):
            if any(ctx.needs_input_grad):
                own = labels_N[chunk], token_weights_N[chunk]
                chunk_losses, logit_grads_NV = losses_and_grads(logits_NV, *own)
                grads.add(chunk, logit_grads_NV)
                del logit_grads_NV  # the logits' memory
            else:
                chunk_losses, _ = losses_of(logits_NV, labels_N[chunk])
            parts.append(chunk_losses)
            del logits_NV
        losses_N = torch.cat(parts)
        losses = _shaped(losses_N, labels.shape)
        ctx.save_for_backward(grads.hidden_grad, grads.weight_grad)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        ctx.mark_non_differentiable(losses)
        return (losses_N * token_weights_N).sum(), losses

    @staticmethod
    def backward(ctx, *outer):
        grad, _ = outer  # of the losses, which are not differentiable, there is none
        # The products are already computed; only the incoming scalar is left to apply.
        return *_scaled(ctx.saved_tensors, grad, ctx.dtypes), None, None, None
