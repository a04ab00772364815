"""Objectives of a critic, and the tokens of a row that they are about.

Shapes: B rows, T positions, P pairs of rows. Logits and values at u are after token u.
"""

import torch
import torch.nn.functional as F


def response_mask(keep_BT: torch.Tensor, doc_BT: torch.Tensor) -> torch.Tensor:
    """y_BT: response tokens with a token before them, u >= 1 in the document of u - 1.

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


def judged_mask(y_BT: torch.Tensor) -> torch.Tensor:
    """Tokens after which a critic is asked: those of a response, and the one before them."""
    return y_BT | F.pad(y_BT[:, 1:], (0, 1))


def token_cross_entropy(
    logits_BT: torch.Tensor, good_B: torch.Tensor, y_BT: torch.Tensor
) -> torch.Tensor:
    """Sum over ``judged_mask`` of the cross-entropy of V = sigmoid(logits) against f(R) in [0, 1].

    Divide by the number of judged tokens of all ranks. Every token counts the same: a mean over
    each response first would weigh prefixes by 1 / length, and V would not be calibrated.
    """
    target_BT = good_B.to(logits_BT)[:, None].expand_as(logits_BT)
    loss_BT = F.binary_cross_entropy_with_logits(logits_BT, target_BT, reduction="none")
    return torch.where(judged_mask(y_BT), loss_BT, 0.0).sum()


def pairs_loss(logits_BT: torch.Tensor, y_BT: torch.Tensor, rho: float = 1.0) -> torch.Tensor:
    """Sum over pairs of -log sigmoid(L[end] of the better - L[end] of the worse) + rho mean d^2.

    The first half of the rows are the better responses to the second half's problems. L is a
    running sum of d over the response (a ``sum`` head's logits); the mean of d^2 is over both
    responses' tokens. Divide by the pairs of all ranks.
    """
    steps_BT = torch.where(y_BT, logits_BT - values_before(logits_BT), 0.0)
    better_P, worse_P = steps_BT.sum(1).chunk(2)
    square_P = steps_BT.square().sum(1).view(2, -1).sum(0)
    n_P = y_BT.sum(1).view(2, -1).sum(0)
    return (rho * square_P / n_P.clamp(min=1) - F.logsigmoid(better_P - worse_P)).sum()
