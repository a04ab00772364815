"""Objectives of a critic: its response tokens, the regression and the pairwise loss.

Shapes: B rows, T positions. values[b, t] is the value after token t, so the value before token u
is values[b, u - 1]; every quantity below is stored at the token it is about.
"""

import torch
import torch.nn.functional as F


def response_mask(keep_BT: torch.Tensor, doc_BT: torch.Tensor) -> torch.Tensor:
    """y_BT: response tokens with a value before them, u >= 1 in the document of u - 1.

    Args:
        keep_BT: bool, token is supervised.
        doc_BT: int64, index of the token's document inside its row, -1 for padding.
    """
    y_BT = keep_BT.clone()
    y_BT[:, 0] = False
    y_BT[:, 1:] &= doc_BT[:, 1:] == doc_BT[:, :-1]
    return y_BT


def values_before(values_BT: torch.Tensor) -> torch.Tensor:
    """V[u - 1] at u, and 0 at the first position, which has none."""
    return F.pad(values_BT[:, :-1], (1, 0))


def regression_loss(
    values_BT: torch.Tensor, rewards_BT: torch.Tensor, y_BT: torch.Tensor
) -> torch.Tensor:
    """Sum over response tokens of 1/2 (V[u - 1] - R)^2: a Monte-Carlo target, lambda = 1.

    Divide by the number of response tokens of all ranks. A batch without any gives 0, still
    connected to the graph.

    Args:
        values_BT: fp32, values after each token.
        rewards_BT: standardised reward of each token's response; used where y is True.
    """
    error_BT = torch.where(y_BT, values_before(values_BT) - rewards_BT, 0.0)
    return 0.5 * error_BT.square().sum()


def row_means(values_BT: torch.Tensor, y_BT: torch.Tensor) -> torch.Tensor:
    """Mean of V[u - 1] over a row's response tokens, [B]; 0 for a row without any."""
    total_B = torch.where(y_BT, values_before(values_BT), 0.0).sum(1)
    return total_B / y_BT.sum(1).clamp(min=1)


def pairwise_loss(good_P: torch.Tensor, bad_P: torch.Tensor) -> torch.Tensor:
    """Sum over pairs of -log sigmoid(mean V of the better - mean V of the worse response).

    Both are ``row_means``, of responses to the same problems. Divide by the pairs of all ranks.
    """
    return -F.logsigmoid(good_P - bad_P).sum()


def value_sums(values_BT: torch.Tensor, y_BT: torch.Tensor) -> torch.Tensor:
    """Sums per row, from which every figure about a critic is computed.

    Returns fp64 [B, 3]: response tokens, and over them the sum of V[u - 1] and of its square.
    """
    before_BT = torch.where(y_BT, values_before(values_BT), 0.0).double()
    return torch.stack([y_BT.sum(1).double(), before_BT.sum(1), before_BT.square().sum(1)], 1)
