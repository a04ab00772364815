"""Weights from a critic: generalised advantages of each token, standardised and calibrated.

Shapes: B packed rows, T positions, K heads. A quantity per token is stored at the token u itself;
head k at position t reads it at u = t + k + 1.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F

from wmtp_modules.loss.mtp_loss import shift_to_heads
from wmtp_modules.loss.value_loss import response_mask, values_before
from wmtp_modules.weighting import controls
from wmtp_modules.weighting.calibrate import calibrate_log
from wmtp_modules.weighting.token_weighting import TokenWeighting

ADVANTAGES = ("td", "gae")


def check_one_response(keep_BT: torch.Tensor, doc_BT: torch.Tensor, row_BT: torch.Tensor) -> None:
    """Check that the response tokens of each document are one contiguous run.

    A gap would end the response, and pay out the reward, in the middle. Synchronises with the
    device: call it once per data set, not once per step. The ValueError names the row of the
    data set, from ``row_BT``.
    """
    y_BT = response_mask(keep_BT, doc_BT)
    starts_BT = y_BT.clone()
    starts_BT[:, 1:] &= ~(y_BT[:, :-1] & (doc_BT[:, 1:] == doc_BT[:, :-1]))
    rows, counts = row_BT[starts_BT].unique(return_counts=True)
    if (counts > 1).any():
        row = int(rows[counts > 1][0])
        raise ValueError(
            f"row {row} of the data set has {int(counts.max())} separate runs of supervised "
            "tokens: a reward belongs to one response, so mask the prompt only"
        )


def advantages(
    values_BT: torch.Tensor,
    rewards_BT: torch.Tensor,
    keep_BT: torch.Tensor,
    doc_BT: torch.Tensor,
    *,
    lam: float,
) -> torch.Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16), gamma 1.

    delta[u] = V[u] - V[u - 1], and R - V[u - 1] at the last token of a response;
    A[u] = delta[u] + lam * A[u + 1] within the response. The recurrence is linear, so log2(T)
    doublings solve it for all rows at once.

    Args:
        values_BT: value after each token.
        rewards_BT: standardised reward of each token's response.
        keep_BT: bool, token is supervised; one contiguous run per document.
        lam: in [0, 1]; 0 gives the temporal differences delta, 1 gives R - V[u - 1].

    Returns:
        advantages_BT, fp64, 0 outside responses.
    """
    y_BT = response_mask(keep_BT, doc_BT)
    goes_on_BT = F.pad(y_BT[:, 1:] & (doc_BT[:, 1:] == doc_BT[:, :-1]), (0, 1)) & y_BT
    values_BT = values_BT.double()
    next_BT = torch.where(goes_on_BT, values_BT, rewards_BT.double())
    total_BT = torch.where(y_BT, next_BT - values_before(values_BT), 0.0)
    factor_BT = lam * goes_on_BT.double()
    T, reach = y_BT.shape[1], 1
    while reach < T:  # total[u] holds the sum over [u, u + reach), factor[u] what carries it on
        total_BT = total_BT + factor_BT * F.pad(total_BT[:, reach:], (0, reach))
        factor_BT = factor_BT * F.pad(factor_BT[:, reach:], (0, reach))
        reach *= 2
    return total_BT


def standardise(advantages_BT: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """z = clamp((a - mean) / (std + 1e-6), -5, 5).

    ``mean`` and the population ``std`` are those of all response tokens that train the policy.
    """
    return ((advantages_BT - mean) / (std + 1e-6)).clamp(-5, 5)


def critic_weights(
    z_BTK: torch.Tensor, mask_BTK: torch.Tensor, temperature: float, w_min: float, w_max: float
) -> torch.Tensor:
    """w = calibrate(exp(z / temperature)) per head.

    ``z_BTK`` are standardised advantages of the tokens that the heads predict; ``temperature`` is
    in standard deviations, small is sharp.
    """
    return calibrate_log(z_BTK.double() / temperature, mask_BTK, w_min, w_max)


class CriticWeighting(TokenWeighting):
    """Weights of one micro-batch from standardised advantages, or a control beside them.

    Args:
        name: ``critic``, or a control: ``uniform``, ``shuffled`` (the advantages permuted inside
            each document before the heads gather them), ``random_topk``, ``dft``, ``top_loss``.
        advantage: ``gae``, or ``td`` for the temporal differences alone.
        lam: lambda of the generalised advantages, in [0, 1].
        temperature: of the weights, above 0.
        ratio: share that random_topk and top_loss select, in (0, 1].

    The other arguments are those of ``TokenWeighting``.

    Raises:
        ValueError: for an unknown name or a value out of range.
    """

    NAMES: ClassVar[tuple] = ("critic", "uniform", "shuffled", "random_topk", "dft", "top_loss")

    def __init__(
        self,
        name: str = "critic",
        *,
        advantage: str = "gae",
        lam: float = 0.95,
        temperature: float = 1.0,
        ratio: float = 0.6,
        w_min: float = 0.1,
        w_max: float = 5.0,
        strength: float = 1.0,
        decay: float = 1.0,
        seed: int = 0,
    ) -> None:
        if advantage not in ADVANTAGES:
            raise ValueError(
                f"weighting.advantage {advantage!r} is not one of {', '.join(ADVANTAGES)}"
            )
        if not 0 <= lam <= 1:
            raise ValueError(f"weighting.lam must be between 0 and 1, got {lam}")
        super().__init__(
            name,
            ratio=ratio,
            temperature=temperature,
            w_min=w_min,
            w_max=w_max,
            strength=strength,
            decay=decay,
            seed=seed,
        )
        self.lam = 0.0 if advantage == "td" else lam

    @property
    def needs_scores(self) -> bool:
        """Whether a call needs standardised advantages, z_BT."""
        return self.name in ("critic", "shuffled")

    @property
    def needs_losses(self) -> bool:
        """Whether a call needs this forward's losses; a critic's weights are known before."""
        return self.name in ("dft", "top_loss")

    def _joint_weights(
        self, mask_GTK: torch.Tensor, doc_GT: torch.Tensor, *needed: torch.Tensor, step: int
    ) -> torch.Tensor:
        if not self.needs_scores:
            return super()._joint_weights(mask_GTK, doc_GT, *needed, step=step)
        z_GT = needed[0].squeeze(-1)
        if self.name == "shuffled":
            # Head 0 has a target wherever there is a response token: its view is the tokens'.
            keys_GT = self._keys(doc_GT, step)
            z_GT1 = shift_to_heads(z_GT, 1, 0.0)
            z_GT1 = controls.shuffle_scores(z_GT1, mask_GTK[..., :1], doc_GT, keys_GT)
            z_GT = values_before(z_GT1.squeeze(-1))
        z_GTK = shift_to_heads(z_GT, mask_GTK.shape[-1], 0.0)
        return critic_weights(z_GTK, mask_GTK, self.temperature, self.w_min, self.w_max)
