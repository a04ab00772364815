"""Scales raw token weights to mean 1 within fixed bounds.

Shapes: B rows of the joint micro-batch, T positions, K heads, N = B * T.

Normalising first and clipping afterwards lets the mean drift below 1, which silently lowers the
learning rate. Here the clipped weights themselves have mean 1.
"""

import math

import torch

# The logarithm of a raw weight of 0 is taken to lie this far below the smallest other one.
ZERO_BELOW = 350.0


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
