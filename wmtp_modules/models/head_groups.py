"""Parameters that train together, with the heads that train them: one n', one clipped norm each.

Shapes: K heads, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from wmtp_modules.loss.mtp_loss import head_alphas
from wmtp_modules.models.mtp_transformer import MTPTransformer


@dataclass(frozen=True)
class HeadGroup:
    """What trains together.

    Args:
        parameters: those of the group that train, in the model's order.
        alphas_K: fp32 weight of each head in its loss, of sum 1.
    """

    parameters: list[nn.Parameter]
    alphas_K: torch.Tensor


def head_groups(model: MTPTransformer, decay: float = 1.0) -> list[HeadGroup]:
    """One group of all, unless heads 1 to K - 1 train apart.

    Then these are a group with the weights decay^k that they have among themselves; and before it,
    if it trains at all, everything else, for head 0 with weight 1, as in a model of one head.
    """
    K = model.n_future_tokens
    device = next(model.parameters()).device
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if model.extra_heads == "full":
        return [HeadGroup([*trained.values()], head_alphas(K, decay).to(device))]
    further = tuple(f"heads.{k}." for k in range(1, K))
    own = {True: [], False: []}
    for name, parameter in trained.items():
        own[name.startswith(further)].append(parameter)
    of_0 = torch.cat([torch.ones(1), torch.zeros(K - 1)])
    of_others = torch.cat([torch.zeros(1), head_alphas(K - 1, decay)])
    pairs = (own[False], of_0), (own[True], of_others)
    return [HeadGroup(p, alphas_K.to(device)) for p, alphas_K in pairs if p]


@torch.no_grad()
def scale_and_clip_(
    groups: Sequence[HeadGroup], n_K: torch.Tensor, world: int, max_norm: float
) -> torch.Tensor:
    """Divide the gradients of summed losses by n', and clip each group's norm; a collective.

    n' = sum_k alpha_k n_k, see ``loss/mtp_loss.py``. FSDP2 averages gradients over ranks, hence
    the factor ``world``.

    Args:
        groups: of ``head_groups``.
        n_K: targets of each head, over all ranks and micro-batches of the step.
        world: number of ranks.
        max_norm: of a group.

    Returns:
        Norms before clipping, [G].
    """
    norms = []
    for group in groups:
        n_prime = (group.alphas_K * n_K).sum().clamp(min=1e-6)
        grads = [p.grad for p in group.parameters if p.grad is not None]
        # This rank's shards: one kernel for many, where a DTensor is dispatched one by one.
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        if local:
            torch._foreach_mul_(local, (world / n_prime).to(local[0].dtype))
        norm = nn.utils.clip_grad_norm_(group.parameters, max_norm)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.stack(norms)
