"""Scales raw token weights to mean 1 within fixed bounds, over a micro-batch or a data set.

Shapes: B rows of the joint micro-batch, T positions, K heads, N = B * T.

Normalising first and clipping afterwards lets the mean drift below 1, which silently lowers the
learning rate. Here the clipped weights themselves have mean 1.
"""

import math
from collections.abc import Callable, Sequence

import torch

# The logarithm of a raw weight of 0 is taken to lie this far below the smallest other one.
ZERO_BELOW = 350.0
CHUNK = 2**22  # tokens of a data set that are looked at together: 32 MB in fp64


def check_bounds(w_min: float, w_max: float) -> None:
    """ValueError unless weights of mean 1 are possible: 0 <= w_min < 1 < w_max."""
    if not 0 <= w_min < 1 < w_max < float("inf"):
        raise ValueError(
            f"w_min {w_min} and w_max {w_max} must satisfy 0 <= w_min < 1 < w_max: "
            "otherwise no weights between them have mean 1"
        )


def calibrate(
    raw_BTK: torch.Tensor, mask_BTK: torch.Tensor, w_min: float, w_max: float
) -> torch.Tensor:
    """``calibrate_log`` of raw weights, of which only the ratios within a head matter.

    A raw weight that is negative or not finite is treated as 0.
    """
    return calibrate_log(raw_BTK.detach().double().log(), mask_BTK, w_min, w_max)


def calibrate_log(
    log_raw_BTK: torch.Tensor, mask_BTK: torch.Tensor, w_min: float, w_max: float
) -> torch.Tensor:
    """Weights clip(c * raw, w_min, w_max) whose masked mean is 1, with one scalar c per head.

    The mean grows with c, from w_min to w_max, and is linear between the points where a token
    reaches a bound. All of these are evaluated at once from sorted raw weights and their prefix
    sums, and the crossing of 1 is interpolated: exact, without iteration or host sync.

    Raw weights come and are kept as logarithms: exp(z / temperature) at a low temperature spans
    more than fp64 does, and what underflows would tie.

    A raw weight whose logarithm is NaN or infinite is treated as 0, i.e. as the smallest: one bad
    token gets the lowest weight and does not affect the others. Zeros tie with each other, so a
    head whose raw weights are all 0 gets weights of 1.

    Args:
        log_raw_BTK: logarithms of the raw weights, only their differences within a head matter.
        mask_BTK: bool, True where the head has a target.

    Returns:
        fp32 weights_BTK, 0 where the mask is False.
    """
    check_bounds(w_min, w_max)
    raw_KN = log_raw_BTK.detach().double().flatten(0, 1).T.contiguous()  # logs from here on
    mask_KN = mask_BTK.flatten(0, 1).T.contiguous()
    good_KN = mask_KN & raw_KN.isfinite()
    raw_KN = torch.where(good_KN, raw_KN, -torch.inf)
    largest_K1 = raw_KN.amax(dim=1, keepdim=True)
    raw_KN = raw_KN - torch.where(largest_K1.isfinite(), largest_K1, 0.0)
    smallest_K1 = torch.where(good_KN, raw_KN, 0.0).amin(dim=1, keepdim=True)
    raw_KN = torch.maximum(raw_KN, smallest_K1 - ZERO_BELOW)

    count_K1 = mask_KN.sum(dim=1, keepdim=True).clamp(min=1)
    sorted_KN = torch.where(mask_KN, raw_KN, torch.inf).sort(dim=1).values
    prefix_KN = torch.where(sorted_KN.isfinite(), sorted_KN, -torch.inf).logcumsumexp(dim=1)
    prefix_KN = torch.nn.functional.pad(prefix_KN, (1, 0), value=-torch.inf)

    # The largest raw weight is 1, so c = 1 gives a mean of at most 1: no need to look below.
    log_min = math.log(w_min) if w_min > 0 else -math.inf
    log_max = math.log(w_max)
    c_KC = torch.cat([log_min - sorted_KN, log_max - sorted_KN], dim=1)
    c_KC = c_KC.clamp(min=0.0).sort(dim=1).values
    at_min_KC = torch.searchsorted(sorted_KN, log_min - c_KC)
    below_max_KC = torch.searchsorted(sorted_KN, log_max - c_KC)
    to_KC, from_KC = prefix_KN.gather(1, below_max_KC), prefix_KN.gather(1, at_min_KC)
    inside_KC = (c_KC + to_KC).exp() * -(from_KC - to_KC).expm1()  # c * (e^to - e^from)
    inside_KC = torch.where(below_max_KC > at_min_KC, inside_KC, 0.0)
    at_max_KC = mask_KN.sum(dim=1, keepdim=True) - below_max_KC
    mean_KC = (w_min * at_min_KC + inside_KC + w_max * at_max_KC) / count_K1

    # cummax undoes rounding where the mean is flat; the first point is c = 0, mean w_min.
    mean_KC = torch.nn.functional.pad(mean_KC.cummax(dim=1).values, (1, 0), value=w_min)
    c_KC = torch.nn.functional.pad(c_KC, (1, 0), value=-torch.inf)
    right_K1 = (mean_KC <= 1).sum(dim=1, keepdim=True).clamp(max=c_KC.shape[1] - 1)
    left_K1 = right_K1 - 1
    mean_left_K1, mean_right_K1 = mean_KC.gather(1, left_K1), mean_KC.gather(1, right_K1)
    share_K1 = (1 - mean_left_K1) / (mean_right_K1 - mean_left_K1)
    c_K1 = torch.logaddexp(
        (-share_K1).log1p() + c_KC.gather(1, left_K1), share_K1.log() + c_KC.gather(1, right_K1)
    )
    weights_KN = torch.where(mask_KN, (c_K1 + raw_KN).exp().clamp(w_min, w_max), 0.0)
    return weights_KN.T.reshape(log_raw_BTK.shape).float()


def solve_scale(
    log_raw_N: torch.Tensor,
    first_K: Sequence[int],
    w_min: float,
    w_max: float,
    *,
    add_up: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> list[float]:
    """The scalar c of each head with which clip(c * raw, w_min, w_max) has mean 1 over a data set.

    Safeguarded Newton: the mean is piecewise linear in c, so that a step which lands in the right
    piece is exact, up to rounding in fp64. That takes some five to ten passes over this rank's
    tokens and one ``add_up`` of [K, 2] numbers for each. ``log_raw_N`` has 4 bytes a token (250 MB
    a rank for 500 million tokens on 8), this needs one more and some 150 MB. With equal raw
    weights c * raw rounds to 1 in fp32: all weights are exactly 1.

    Args:
        log_raw_N: fp32, logarithms of the raw weights of this rank's target tokens; -inf of 0.
        first_K: head k has the targets ``log_raw_N[first_K[k]:]``.
        add_up: sums a tensor over all ranks, each of which calls this.

    Returns:
        c of each head; 1 for a head without targets.

    Raises:
        ValueError: if too many raw weights are 0: then w_max cannot lift the others to mean 1.
    """
    check_bounds(w_min, w_max)
    K = len(first_K)

    def sums(c_K: list[float]) -> list[list[float]]:
        """Of each head: sum of the weights, sum of raw strictly inside the bounds."""
        sums_K2 = torch.zeros(K, 2, dtype=torch.float64)
        for begin in range(0, len(log_raw_N), CHUNK):
            raw_N = log_raw_N[begin : begin + CHUNK].double().exp()
            for k, c in enumerate(c_K):
                own_N = raw_N[max(first_K[k] - begin, 0) :]
                scaled_N = c * own_N
                inside_N = (scaled_N > w_min) & (scaled_N < w_max)
                sums_K2[k, 0] += scaled_N.clamp(w_min, w_max).sum()
                sums_K2[k, 1] += own_N[inside_N].sum()
        return add_up(sums_K2).tolist()

    is_zero_N = log_raw_N == -torch.inf
    counts = [(len(log_raw_N) - first, int(is_zero_N[first:].sum())) for first in first_K]
    counts_K2 = add_up(torch.tensor(counts, dtype=torch.float64)).tolist()
    for k, (n, zeros) in enumerate(counts_K2):
        most = w_max * (n - zeros) + w_min * zeros
        if most < n:
            needed = (n - w_min * zeros) / (n - zeros) if zeros < n else math.inf
            way_out = f"raise weighting.w_max above {needed:.3g}, or " if zeros < n else ""
            raise ValueError(
                f"{zeros / n:.2%} of head {k}'s {n:.0f} target tokens have a raw weight of 0, and "
                f"with weighting.w_max {w_max:g} the others cannot lift the mean weight to 1 "
                f"(at most {most / n:.3g}): {way_out}train on more good responses"
            )

    low_K, high_K = [0.0] * K, [math.inf] * K
    c_K, is_open_K = [1.0] * K, [n > 0 for n, _ in counts_K2]
    passes = 0
    while any(is_open_K):
        for k, (total, inside) in enumerate(sums(c_K)):
            n, c = counts_K2[k][0], c_K[k]
            if not is_open_K[k]:
                continue
            low_K[k], high_K[k] = (c, high_K[k]) if total < n else (low_K[k], c)
            if abs(total - n) <= 1e-12 * n or high_K[k] <= low_K[k] * (1 + 1e-15):
                is_open_K[k] = False
                continue
            newton = c + (n - total) / inside if inside else -1.0
            if low_K[k] < newton < high_K[k] and (passes < 20 or passes % 3):
                c_K[k] = newton
            elif high_K[k] == math.inf:
                c_K[k] = 16 * c
            else:
                c_K[k] = math.sqrt(low_K[k] * high_K[k]) if low_K[k] else c / 16
        passes += 1
    return c_K


def scaled_weights(
    log_raw_BTK: torch.Tensor,
    mask_BTK: torch.Tensor,
    scale_K: Sequence[float],
    w_min: float,
    w_max: float,
) -> torch.Tensor:
    """clip(scale * raw, w_min, w_max) with one known scale per head, from ``solve_scale``.

    Returns:
        fp32 weights_BTK, 0 where the mask is False.
    """
    raw_BTK = log_raw_BTK.detach().double().exp()
    # Plain numbers go along with a kernel; a tensor made of them would be waited for.
    scaled = [scale * raw_BTK[..., k] for k, scale in enumerate(scale_K)]
    weights_BTK = torch.stack(scaled, dim=-1).clamp(w_min, w_max)
    return torch.where(mask_BTK, weights_BTK, 0.0).float()
