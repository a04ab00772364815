"""Rho-1 token weighting (Lin et al. 2024, arXiv 2404.07965) for every head of an MTP model.

Shapes: B rows of the joint micro-batch of all data-parallel ranks, T positions, K heads,
N = B * T. Every statistic is per head: later heads have larger losses and, under a next-token
reference, larger excess, so a ranking across heads would mostly choose heads.
"""

import torch

from wmtp_modules.weighting.calibrate import calibrate_log

SCORES = ("excess", "abs_excess")
SELECTIONS = ("topk", "soft")
SCOPES = ("microbatch", "rank", "document")


def excess_scores(
    losses_BTK: torch.Tensor, reference_BTK: torch.Tensor, score: str = "excess"
) -> torch.Tensor:
    """Excess loss over the reference at the same targets (arXiv 2404.07965, eq. 3), no gradient.

    ``excess`` is the signed difference of the paper, ``abs_excess`` its magnitude.
    """
    scores_BTK = (losses_BTK - reference_BTK).detach()
    return scores_BTK.abs() if score == "abs_excess" else scores_BTK


def scope_ids(scope: str, doc_BT: torch.Tensor, world: int) -> torch.Tensor:
    """Number of the group within which tokens compete for selection, int64 in [0, B * T).

    ``microbatch``: all tokens of all ranks; ``rank``: those of one rank (row g of the joint
    micro-batch is rank g % world's); ``document``: those of one document of ``doc_BT``.
    """
    B, T = doc_BT.shape
    row_B1 = torch.arange(B, device=doc_BT.device)[:, None]
    if scope == "document":
        return row_B1 * T + doc_BT.clamp(min=0)
    if scope == "rank":
        return (row_B1 % world).expand(B, T)
    return torch.zeros_like(doc_BT)


def topk_weights(
    scores_BTK: torch.Tensor, mask_BTK: torch.Tensor, ratio: float, scope_BT: torch.Tensor
) -> torch.Tensor:
    """Keep the largest scores of each scope and head (arXiv 2404.07965, eq. 4).

    With N valid positions in a scope, m = min(N, max(1, round(ratio * N))) are selected, ties by
    (row, position), and weigh N / m, so that the mean weight within the scope is 1. A NaN score
    ranks last. ``mask_BTK`` is True where the head has a target.

    Returns:
        fp32 weights_BTK, 0 where not selected.
    """
    B, T, K = scores_BTK.shape
    N = B * T
    mask_KN = mask_BTK.flatten(0, 1).T
    scope_N = scope_BT.flatten()
    lowest, largest = torch.finfo(scores_BTK.dtype).min, torch.finfo(scores_BTK.dtype).max
    scores_KN = torch.nan_to_num(scores_BTK.flatten(0, 1).T, lowest, largest, lowest)
    scores_KN = torch.where(mask_KN, scores_KN, -torch.inf)

    # Order by scope, then by falling score; both sorts are stable, so ties keep (row, position).
    by_score_KN = scores_KN.argsort(dim=1, descending=True, stable=True)
    by_scope_KN = scope_N[by_score_KN].argsort(dim=1, stable=True)
    order_KN = by_score_KN.gather(1, by_scope_KN)
    scope_KN = scope_N[order_KN]
    # A scope's first place in that order; at most N scopes, so no host sync to count them.
    size_S = torch.zeros_like(scope_N).scatter_add(0, scope_N, torch.ones_like(scope_N))
    place_KN = torch.arange(N, device=scope_N.device) - (size_S.cumsum(0) - size_S)[scope_KN]

    valid_KS = torch.zeros_like(scope_KN).scatter_add(1, scope_N.expand(K, N), mask_KN.long())
    wanted_KS = (ratio * valid_KS.double()).round().long().clamp(min=1)
    chosen_KS = torch.minimum(valid_KS, wanted_KS)
    weight_KS = (valid_KS / chosen_KS.clamp(min=1)).float()
    sorted_KN = torch.where(
        place_KN < chosen_KS.gather(1, scope_KN), weight_KS.gather(1, scope_KN), 0.0
    )
    weights_KN = torch.zeros_like(sorted_KN).scatter(1, order_KN, sorted_KN)
    return weights_KN.T.reshape(B, T, K)


def soft_weights(
    scores_BTK: torch.Tensor,
    mask_BTK: torch.Tensor,
    temperature: float,
    w_min: float,
    w_max: float,
) -> torch.Tensor:
    """Softmax over the tokens of the joint micro-batch, calibrated to mean 1.

    z = clamp((s - mean) / (std + 1e-6), -5, 5) per head, raw = exp(z / temperature). Mean and
    (population) standard deviation are those of the finite scores; a NaN score gets the smallest
    raw weight. ``temperature`` is in standard deviations; small is sharp.
    """
    scores_BTK = scores_BTK.detach().double()
    finite_BTK = mask_BTK & scores_BTK.isfinite()
    count_K = finite_BTK.sum(dim=(0, 1)).clamp(min=1)
    mean_K = _sum_K(torch.where(finite_BTK, scores_BTK, 0.0)) / count_K
    centred_BTK = scores_BTK - mean_K
    std_K = (_sum_K(torch.where(finite_BTK, centred_BTK, 0.0).square()) / count_K).sqrt()
    z_BTK = (centred_BTK / (std_K + 1e-6)).clamp(-5, 5)
    return calibrate_log(z_BTK / temperature, mask_BTK, w_min, w_max)


def _sum_K(x_BTK: torch.Tensor) -> torch.Tensor:
    """Each head's sum by itself: all at once would round it by how many heads there are."""
    return torch.stack([x_BT.contiguous().sum() for x_BT in x_BTK.unbind(-1)])
