"""Weights from a critic: what each of the published and derived advantages makes of its values.

V[u] = E[f(R) | x_<=u] is the value after token u, f(R) in [0, 1] how much a response is wanted. The
loss of token u depends on x_<=u only, so that weighting it by V[u] has the objective of training on
wanted responses alone, with less variance (docs/critic.md).

Shapes: B packed rows, T positions, K heads. A quantity per token is stored at the token u itself;
head k at position t reads it at u = t + k + 1. s is the first token of a response.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from wmtp_modules.loss.mtp_loss import shift_to_heads
from wmtp_modules.loss.value_loss import response_mask, values_before
from wmtp_modules.weighting import controls
from wmtp_modules.weighting.calibrate import calibrate_log, scaled_weights
from wmtp_modules.weighting.token_weighting import TokenWeighting

# Raw weights that are known before training, and hence one scale for the whole data set; and those
# that are standardised and then calibrated in each joint micro-batch.
SCALED = ("value", "relative", "gated", "ratio")
STANDARDISED = ("td", "gae")
ADVANTAGES = (*SCALED, *STANDARDISED)
FLOOR = 0.1  # of V[s - 1] in ``relative``, times the mean of f: a hopeless prompt counts less
TINY = torch.finfo(torch.float32).tiny  # below it a value is 0 for a quotient


def response_starts(keep_BT: torch.Tensor, doc_BT: torch.Tensor) -> torch.Tensor:
    """Bool, first token of each run of response tokens, [B, T]."""
    y_BT = response_mask(keep_BT, doc_BT)
    goes_on_BT = y_BT[:, :-1] & (doc_BT[:, 1:] == doc_BT[:, :-1])
    return y_BT & ~F.pad(goes_on_BT, (1, 0))


def check_one_response(keep_BT: torch.Tensor, doc_BT: torch.Tensor, row_BT: torch.Tensor) -> None:
    """Check that the response tokens of each document are one contiguous run.

    A gap would end the response, and pay out the reward, in the middle. Synchronises with the
    device: call it once per data set, not once per step. The ValueError names the row of the
    data set, from ``row_BT``.
    """
    starts_BT = response_starts(keep_BT, doc_BT)
    rows, counts = row_BT[starts_BT].unique(return_counts=True)
    if (counts > 1).any():
        row = int(rows[counts > 1][0])
        raise ValueError(
            f"row {row} of the data set has {int(counts.max())} separate runs of supervised "
            "tokens: a reward belongs to one response, so mask the prompt only"
        )


def advantages(
    values_BT: torch.Tensor,
    good_BT: torch.Tensor,
    keep_BT: torch.Tensor,
    doc_BT: torch.Tensor,
    *,
    lam: float,
) -> torch.Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16), gamma 1.

    delta[u] = V[u] - V[u - 1], and f(R) - V[u - 1] at the last token of a response;
    A[u] = delta[u] + lam * A[u + 1] within the response. The recurrence is linear, so log2(T)
    doublings solve it for all rows at once.

    Args:
        values_BT: value after each token.
        good_BT: f(R) of each token's response.
        keep_BT: bool, token is supervised; one contiguous run per document.
        lam: in [0, 1]; 0 gives the temporal differences delta, 1 gives f(R) - V[u - 1].

    Returns:
        advantages_BT, fp64, 0 outside responses.
    """
    y_BT = response_mask(keep_BT, doc_BT)
    goes_on_BT = F.pad(y_BT[:, 1:] & (doc_BT[:, 1:] == doc_BT[:, :-1]), (0, 1)) & y_BT
    values_BT = values_BT.double()
    next_BT = torch.where(goes_on_BT, values_BT, good_BT.double())
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


def values_at_start(
    values_BT: torch.Tensor, keep_BT: torch.Tensor, doc_BT: torch.Tensor
) -> torch.Tensor:
    """V[s - 1] at every token of a response, s its first one; anything outside responses.

    s - 1 is the last prompt token, and the row's first token where there is no prompt.
    """
    starts_BT = response_starts(keep_BT, doc_BT)
    place_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    before_start_BT = torch.where(starts_BT, place_T - 1, 0).cummax(dim=1).values
    return values_BT.gather(1, before_start_BT)


def log_raw_weights(
    values_BT: torch.Tensor,
    good_BT: torch.Tensor,
    keep_BT: torch.Tensor,
    doc_BT: torch.Tensor,
    *,
    advantage: str = "value",
    floor: float = 0.0,
    lam: float = 0.95,
    temperature: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> torch.Tensor:
    """Logarithms of the raw weights of response tokens, before any scale or bound.

    ``value``     V[u], the objective of training on wanted responses, for every head
    ``relative``  V[u] / max(V[s - 1], floor): prompts weigh alike
    ``gated``     V[u] / max(V[u - 1], V[s - 1]): a sound token gets 1, a lost prefix little
    ``ratio``     V[u] / V[u - 1]: a lost prefix keeps its weight
    ``td, gae``   exp(z / temperature), z = ``standardise`` of ``advantages``, td with lambda 0

    Args:
        values_BT: V after each token, in (0, 1); a value of 0 gives a raw weight of 0.
        good_BT: f(R) of each token's response; read by td and gae.
        keep_BT: bool, token is supervised; one contiguous run per document.
        doc_BT: int64, index of the token's document inside its row, -1 for padding.
        floor: ``FLOOR`` times the mean of f, for relative.
        lam: of gae.
        temperature: of td and gae, in standard deviations; small is sharp.
        mean: of the advantages, for td and gae.
        std: of the advantages, for td and gae.

    Returns:
        fp64 log_raw_BT, -inf where the raw weight is 0 and outside responses.
    """
    y_BT = response_mask(keep_BT, doc_BT)
    if advantage in STANDARDISED:
        lam = 0.0 if advantage == "td" else lam
        a_BT = advantages(values_BT, good_BT, keep_BT, doc_BT, lam=lam)
        return torch.where(y_BT, standardise(a_BT, mean, std) / temperature, -torch.inf)
    values_BT = torch.where(doc_BT >= 0, values_BT, 0.0).double()  # padding has none
    before_BT = values_before(values_BT)
    start_BT = values_at_start(values_BT, keep_BT, doc_BT)
    denominator_BT = {
        "value": torch.ones_like(values_BT),
        "relative": start_BT.clamp(min=floor),
        "gated": torch.maximum(before_BT, start_BT),
        "ratio": before_BT,
    }[advantage]
    raw_BT = values_BT.clamp(min=0) / denominator_BT.clamp(min=TINY)
    return torch.where(y_BT, raw_BT.log(), -torch.inf)


class CriticWeighting(TokenWeighting):
    """Weights of one micro-batch from a critic's values, or a control beside them.

    Args:
        name: ``critic``, or a control: ``uniform``, ``shuffled`` (the raw weights permuted among
            the response tokens of each document before the heads gather them), ``random_topk``,
            ``dft``, ``top_loss``, ``oracle`` (0 on marked tokens, else equal; ``w_min`` is then 0).
        advantage: of ``log_raw_weights``: ``value``, ``relative``, ``gated``, ``ratio``, ``td`` or
            ``gae``.
        lam: lambda of gae, in [0, 1].
        temperature: of td and gae, above 0.
        ratio: share that random_topk and top_loss select, in (0, 1].
        w_max: largest weight, above 1. A sound token has 1 / mean f under ``value``: stay above.

    The other arguments are those of ``TokenWeighting``.

    Raises:
        ValueError: for an unknown name or a value out of range.
    """

    NAMES: ClassVar[tuple] = (
        *("critic", "uniform", "shuffled", "random_topk", "dft", "top_loss"),
        "oracle",
    )

    def __init__(
        self,
        name: str = "critic",
        *,
        advantage: str = "value",
        lam: float = 0.95,
        temperature: float = 1.0,
        ratio: float = 0.6,
        w_min: float = 0.0,
        w_max: float = 20.0,
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
            w_min=0.0 if name == "oracle" else w_min,
            w_max=w_max,
            strength=strength,
            decay=decay,
            seed=seed,
        )
        self.advantage = advantage
        self.lam = lam

    @property
    def needs_scores(self) -> bool:
        """Whether a call needs logarithms of raw weights, log_raw_BT."""
        return self.needs_values or self.name == "oracle"

    @property
    def needs_values(self) -> bool:
        """Whether these come from a critic's values."""
        return self.name in ("critic", "shuffled")

    @property
    def needs_losses(self) -> bool:
        """Whether a call needs this forward's losses; a critic's weights are known before."""
        return self.name in ("dft", "top_loss")

    @property
    def is_scaled(self) -> bool:
        """Whether a call needs ``scale_K``, solved over all rows that train."""
        return self.needs_scores and (self.name == "oracle" or self.advantage in SCALED)

    def log_raw(
        self,
        values_BT: torch.Tensor,
        good_BT: torch.Tensor,
        keep_BT: torch.Tensor,
        doc_BT: torch.Tensor,
        *,
        floor: float,
        mean: float,
        std: float,
    ) -> torch.Tensor:
        """``log_raw_weights`` with this weighting's settings."""
        return log_raw_weights(
            *(values_BT, good_BT, keep_BT, doc_BT),
            advantage=self.advantage,
            floor=floor,
            lam=self.lam,
            temperature=self.temperature,
            mean=mean,
            std=std,
        )

    def _joint_weights(
        self,
        mask_GTK: torch.Tensor,
        doc_GT: torch.Tensor,
        *needed: torch.Tensor,
        step: int,
        scale_K: Sequence[float] | None = None,
    ) -> torch.Tensor:
        if not self.needs_scores:
            return super()._joint_weights(mask_GTK, doc_GT, *needed, step=step)
        log_raw_GT = needed[0].squeeze(-1)
        if self.name == "shuffled":
            # Head 0 has a target wherever there is a response token: its view is the tokens'.
            keys_GT = self._keys(doc_GT, step)
            log_raw_GT1 = shift_to_heads(log_raw_GT, 1, 0.0)
            log_raw_GT1 = controls.shuffle_scores(log_raw_GT1, mask_GTK[..., :1], doc_GT, keys_GT)
            log_raw_GT = values_before(log_raw_GT1.squeeze(-1))
        return self.weights_of(
            shift_to_heads(log_raw_GT, mask_GTK.shape[-1], 0.0), mask_GTK, scale_K
        )

    def weights_of(
        self,
        log_raw_BTK: torch.Tensor,
        mask_BTK: torch.Tensor,
        scale_K: Sequence[float] | None,
    ) -> torch.Tensor:
        """Weights of what the heads predict, calibrated over these or by a scale that is known.

        Raises:
            ValueError: if it needs a scale and there is none.
        """
        if not self.is_scaled:
            return calibrate_log(log_raw_BTK, mask_BTK, self.w_min, self.w_max)
        if scale_K is None:
            raise ValueError(
                f"weighting {self.name!r} needs scale_K, one number per head: see solve_scale"
            )
        return scaled_weights(log_raw_BTK, mask_BTK, scale_K, self.w_min, self.w_max)
