"""The critic's value head: how likely a response is to be good, after every token of it.

Shapes: B rows, one response each, T positions, D width of the trunk. L[u] and V[u] are after token
u; s is the first response token, so V[s - 1] knows the prompt only.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

HEADS = ("state", "turn", "sum")
N_SURPRISE = 3  # loss and entropy of head 0, loss of head 1
FIRST_HAZARD = 0.02  # of a turn at a token: one in fifty, before anything is learned
NEVER = -1e9  # logarithm of the odds of a turn before the response


class ValueHead(nn.Module):
    """An MLP of one hidden layer on the trunk's state and the model's own surprise, in fp32.

    It returns the logit of V[u] = P(good | tokens up to u). With d[u] the MLP's output there and b
    the logit of the training responses' mean:

    - ``state``: b + d[u]. What is at u decides.
    - ``sum``: b + kappa * (d[s] + ... + d[u]). Evidence adds up; for the objective ``pairs``.
    - ``turn``: wrong once, wrong to the end. A bad response turns bad at some token m, at each with
      hazard kappa, and d[j] is the evidence of token j that it has not: the odds of bad are a sum
      over the place of the turn (docs/critic.md has the equation).

    The output layer starts at zero, so an untrained critic says b everywhere.

    Args:
        embed_dim: D.
        kind: ``state``, ``turn`` or ``sum``.
    """

    def __init__(self, embed_dim: int, kind: str) -> None:
        super().__init__()
        assert kind in HEADS, kind
        self.kind = kind
        self.hidden = nn.Linear(embed_dim + N_SURPRISE, embed_dim)
        self.out = nn.Linear(embed_dim, 1)
        zero = [self.out]
        if kind == "turn":
            self.start = nn.Linear(embed_dim + N_SURPRISE, 1)  # what the prompt says, v0 - b
            self.hazard = nn.Parameter(torch.tensor(math.log(math.expm1(FIRST_HAZARD))))
            zero.append(self.start)
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("base", torch.zeros(()))  # b
        self.register_buffer("kappa", torch.ones(()))  # of ``sum``, fitted after training
        # Of the features. A trunk's states have much in common, and a few large entries.
        self.register_buffer("mean", torch.zeros(embed_dim + N_SURPRISE))
        self.register_buffer("std", torch.ones(embed_dim + N_SURPRISE))

    def forward(
        self, hidden_BTD: torch.Tensor, surprise_BT3: torch.Tensor, y_BT: torch.Tensor
    ) -> torch.Tensor:
        """Logits of V after each token, fp32 [B, T].

        ``turn`` and ``sum`` say b (``turn``: what the prompt says) up to the last prompt token, and
        their last logit beyond the response.

        Args:
            hidden_BTD: the trunk's output, any floating dtype.
            surprise_BT3: from ``trunk_states``, NaN where there is none.
            y_BT: bool, response tokens (``response_mask``), one run in each row.
        """
        features_BTE = (features(hidden_BTD, surprise_BT3) - self.mean) / self.std
        missing_BTE = F.pad(surprise_BT3.isnan(), (hidden_BTD.shape[-1], 0))
        features_BTE = features_BTE.masked_fill(missing_BTE, 0.0)
        d_BT = self.out(F.silu(self.hidden(features_BTE))).squeeze(-1)
        if self.kind == "state":
            return self.base + d_BT
        d_BT = torch.where(y_BT, d_BT.double(), 0.0)  # sums of hundreds of terms
        if self.kind == "sum":
            return (self.base + self.kappa * d_BT.cumsum(1)).float()
        s_B1 = (y_BT.int().argmax(1, keepdim=True) - 1).clamp(min=0)  # the last prompt token
        start_BT = self.start(features_BTE).squeeze(-1)
        v0_B1 = (self.base + start_BT.gather(1, s_B1)).double()
        return turn_logits(d_BT, y_BT, v0_B1, F.softplus(self.hazard.double())).float()


def features(hidden_BTD: torch.Tensor, surprise_BT3: torch.Tensor) -> torch.Tensor:
    """What a head reads at each token, before it is standardised: fp32 [B, T, D + 3].

    The trunk's state is brought to a root mean square of 1, as every block of the model does.
    """
    hidden_BTD = F.rms_norm(hidden_BTD.float(), hidden_BTD.shape[-1:], eps=1e-6)
    return torch.cat([hidden_BTD, surprise_BT3], -1)


def turn_logits(
    d_BT: torch.Tensor, y_BT: torch.Tensor, v0_B1: torch.Tensor, kappa: torch.Tensor
) -> torch.Tensor:
    """logit V[u] = v0 - logaddexp(-kappa n, logsumexp_{s<=m<=u}(lh[m] - sum_{j=m..u} d[j])).

    n = u - s + 1 response tokens are there; lh[m] = log(1 - exp(-kappa)) - kappa (m - s) is the
    prior of a turn at m, exp(-kappa n) that of none so far. With d = 0 these sum to 1, and V stays
    v0. The inner sum is D[u] - D[m - 1] of cumulative sums, hence one logcumsumexp.

    Args:
        d_BT: fp64, 0 outside responses.
        v0_B1: logit before the response.
        kappa: hazard, above 0.
    """
    n_BT = y_BT.double().cumsum(1)
    sum_BT = d_BT.cumsum(1)
    prior_BT = (-torch.expm1(-kappa)).log() - kappa * (n_BT - 1)
    turned_BT = torch.where(y_BT, prior_BT + sum_BT - d_BT, NEVER).logcumsumexp(1) - sum_BT
    return v0_B1 - torch.logaddexp(-kappa * n_BT, turned_BT)
