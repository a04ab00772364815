"""From a config block to the weights of one micro-batch, the same on any number of ranks.

Shapes: B rows of the local micro-batch, G = B * world rows of the joint one, T positions, K heads.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from wmtp_modules.loss.mtp_loss import shift_to_heads
from wmtp_modules.weighting import controls
from wmtp_modules.weighting.calibrate import calibrate, check_bounds
from wmtp_modules.weighting.rho1 import (
    SCOPES,
    SCORES,
    SELECTIONS,
    excess_scores,
    scope_ids,
    soft_weights,
    topk_weights,
)


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(x_B: torch.Tensor) -> torch.Tensor:
    """Joint micro-batch of all ranks, [B * world, ...], with one all-gather; no gradient.

    The sampler deals rows out in turn, so row b of rank r is row b * world + r of the joint
    micro-batch: the order in which one process would have seen them. Stack everything that a
    weighting needs along a trailing dimension first, so that one collective is enough.
    """
    _, world = _rank_and_world()
    if world == 1:
        return x_B
    B, *rest = x_B.shape
    x_WB = x_B.new_empty(world * B, *rest)
    dist.all_gather_single(x_WB, x_B.contiguous())
    return x_WB.unflatten(0, (world, B)).transpose(0, 1).flatten(0, 1)


def own_rows(x_G: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a joint tensor, the inverse of ``gather_rows``."""
    rank, world = _rank_and_world()
    return x_G[rank::world]


def weight_stats(
    weights_BTK: torch.Tensor, mask_BTK: torch.Tensor, w_min: float, w_max: float
) -> dict[str, torch.Tensor]:
    """Figures of the final weights of the joint micro-batch to log, per head, left on the device.

    Returns:
        fp32 tensors [K]: ``mean``; ``ess``, the effective share of tokens
        (sum w)^2 / (n sum w^2); ``selected``, the share with w >= 1; ``low`` and ``high``, the
        shares with w < 1/2 and w >= 2; ``at_min`` and ``at_max``, the shares not inside the
        bounds; and ``count``, the number n of targets. A head without a target has none of these
        figures: NaN, and count 0.
    """
    weights_BTK = weights_BTK.double()
    count_K = mask_BTK.sum(dim=(0, 1))
    sum_K, square_K = weights_BTK.sum(dim=(0, 1)), weights_BTK.square().sum(dim=(0, 1))

    def share(which_BTK: torch.Tensor) -> torch.Tensor:
        return ((which_BTK & mask_BTK).sum(dim=(0, 1)) / count_K).float()

    return {
        "mean": (sum_K / count_K).float(),
        # Weights that are all 0 (a critic may give them) have ESS 0.
        "ess": (sum_K.square() / (count_K * square_K.clamp(min=1e-12))).float(),
        "selected": share(weights_BTK >= 1 - 1e-6),
        "low": share(weights_BTK < 0.5 - 1e-6),
        "high": share(weights_BTK >= 2 - 1e-6),
        "at_min": share(weights_BTK <= w_min + 1e-6),
        "at_max": share(weights_BTK >= w_max - 1e-6),
        "count": count_K.float(),
    }


@dataclass(eq=False)
class TokenWeighting:
    """Weights of one micro-batch under one weighting, all statistics joint over ranks.

    Args:
        name: ``rho1``, or a control: ``uniform``, ``random_topk``, ``shuffled`` (Rho-1's scores
            permuted inside each document), ``dft``, ``top_loss``, ``oracle`` (0 on tokens that are
            marked as noise, equal on all others, without bounds); or ``column``, what the data say.
        score: ``excess`` or ``abs_excess``; for rho1 and shuffled.
        selection: ``topk`` or ``soft``; for rho1 and shuffled.
        ratio: share of tokens that topk selects, in (0, 1].
        scope: tokens among which topk selects: ``microbatch`` (of all ranks), ``rank`` or
            ``document``. The soft selection always uses the joint micro-batch.
        temperature: of the soft selection, above 0.
        w_min: smallest calibrated weight (soft, dft and column), in [0, 1).
        w_max: largest calibrated weight (soft, dft and column), above 1.
        strength: 0 is uniform, 1 the full weighting.
        decay: of the heads' share in the loss, for ``head_alphas``.
        seed: of random_topk and shuffled, at least 0.

    Raises:
        ValueError: for an unknown name or a value out of range.
    """

    NAMES: ClassVar[tuple] = (
        *("uniform", "random_topk", "shuffled", "dft", "top_loss", "oracle", "column", "rho1"),
    )

    name: str = "rho1"
    _: KW_ONLY
    score: str = "excess"
    selection: str = "topk"
    ratio: float = 0.6
    scope: str = "microbatch"
    temperature: float = 1.0
    w_min: float = 0.1
    w_max: float = 5.0
    strength: float = 1.0
    decay: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key, choices in (
            ("name", self.NAMES),
            ("score", SCORES),
            ("selection", SELECTIONS),
            ("scope", SCOPES),
        ):
            value = getattr(self, key)
            if value not in choices:
                raise ValueError(f"weighting.{key} {value!r} is not one of {', '.join(choices)}")
        for key, good, must in (
            ("ratio", 0 < self.ratio <= 1, "above 0 and at most 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("strength", 0 <= self.strength <= 1, "between 0 and 1"),
            ("decay", self.decay > 0, "above 0"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not good:
                raise ValueError(f"weighting.{key} must be {must}, got {getattr(self, key)}")
        if self.selection == "soft" and self.scope != "microbatch":
            raise ValueError(
                f"weighting.scope {self.scope!r} is for weighting.selection 'topk': the soft "
                "selection uses the joint micro-batch: set scope to 'microbatch'"
            )
        check_bounds(self.w_min, self.w_max)

    @property
    def needs_scores(self) -> bool:
        """Whether a call needs external scores: reference losses."""
        return self.name in ("rho1", "shuffled")

    @property
    def needs_marks(self) -> bool:
        """Whether a call needs marks of noise in the place of scores."""
        return self.name == "oracle"

    @property
    def needs_weights(self) -> bool:
        """Whether a call needs the weights that the data bring in the place of scores."""
        return self.name == "column"

    @property
    def needs_losses(self) -> bool:
        """Whether a call needs this forward's losses; if not, weights are known before it."""
        return self.name not in ("uniform", "random_topk", "oracle", "column")

    def __call__(
        self,
        losses_BTK: torch.Tensor | None,
        mask_BTK: torch.Tensor,
        doc_BT: torch.Tensor,
        scores: torch.Tensor | None,
        *,
        step: int,
        **known: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weights of this rank's rows. A collective: every rank calls it, even with an empty mask.

        Args:
            losses_BTK: per-token losses of this rank, or None if not needed.
            mask_BTK: bool, True where the head has a target.
            doc_BT: int64, index of the token's document inside its row, -1 for padding.
            scores: if ``needs_scores``, reference losses at the same targets, [B, T, K], or one
                number per token, [B, T]; if ``needs_marks``, bool; if ``needs_weights``, raw
                weights; otherwise None.
            step: number of the micro-batch since training began, the same on all ranks.
            known: what else ``_joint_weights`` of a subclass takes, equal on all ranks.

        Returns:
            (fp32 weights_BTK without gradient, 0 where the mask is False; figures of the joint
            micro-batch as in ``weight_stats``).

        Raises:
            ValueError: if losses or scores are needed and missing.
        """
        needed = []
        for key, value, needs in (
            ("losses", losses_BTK, self.needs_losses),
            ("scores", scores, self.needs_scores or self.needs_marks or self.needs_weights),
        ):
            if not needs:
                continue
            if value is None:
                raise ValueError(f"weighting {self.name!r} needs {key}")
            value = value.detach().float()
            needed.append(value if value.dim() == 3 else value[..., None])
        K = mask_BTK.shape[-1]
        # Document numbers stay below T, far inside what fp32 represents exactly.
        joint = gather_rows(torch.cat([mask_BTK.float(), doc_BT[..., None].float(), *needed], -1))
        widths = [value.shape[-1] for value in needed]
        mask_GTK, doc_GT1, *joint = joint.split([K, 1, *widths], dim=-1)
        mask_GTK, doc_GT = mask_GTK.bool(), doc_GT1.squeeze(-1).long()

        weights_GTK = self._joint_weights(mask_GTK, doc_GT, *joint, step=step, **known)
        # Exact at strength 0 and 1, and where a weight is 1.
        weights_GTK = torch.lerp(mask_GTK.float(), weights_GTK, self.strength)
        return own_rows(weights_GTK), weight_stats(weights_GTK, mask_GTK, self.w_min, self.w_max)

    def _joint_weights(
        self, mask_GTK: torch.Tensor, doc_GT: torch.Tensor, *needed: torch.Tensor, step: int
    ) -> torch.Tensor:
        """From what is needed, of all ranks: losses if there are any, then scores."""
        if self.name == "uniform":
            return mask_GTK.float()
        if self.name == "dft":
            return controls.dft_weights(needed[0], mask_GTK, self.w_min, self.w_max)
        if self.name == "oracle":
            marks_GTK, K = needed[0] > 0.5, mask_GTK.shape[-1]
            if marks_GTK.shape[-1] == 1:  # of tokens
                marks_GTK = shift_to_heads(marks_GTK.squeeze(-1), K, False)
            return controls.oracle_weights(marks_GTK, mask_GTK)

        if self.name == "column":
            raw_GTK, K = needed[0], mask_GTK.shape[-1]
            if raw_GTK.shape[-1] == 1:  # of tokens
                raw_GTK = shift_to_heads(raw_GTK.squeeze(-1), K, 1.0)
            return calibrate(raw_GTK, mask_GTK, self.w_min, self.w_max)

        if self.name == "random_topk":
            # The number belongs to the target token, so the heads agree on what they select.
            scores_GTK = shift_to_heads(self._keys(doc_GT, step), mask_GTK.shape[-1], 0.0)
        elif self.name == "top_loss":
            scores_GTK = needed[0]
        else:
            losses_GTK, reference_GTK = needed
            scores_GTK = excess_scores(losses_GTK, reference_GTK, self.score)
        if self.name == "shuffled":
            keys_GT = self._keys(doc_GT, step)
            scores_GTK = controls.shuffle_scores(scores_GTK, mask_GTK, doc_GT, keys_GT)

        if self.needs_scores and self.selection == "soft":
            return soft_weights(scores_GTK, mask_GTK, self.temperature, self.w_min, self.w_max)
        scope_GT = scope_ids(self.scope, doc_GT, _rank_and_world()[1])
        return topk_weights(scores_GTK, mask_GTK, self.ratio, scope_GT)

    def _keys(self, doc_GT: torch.Tensor, step: int) -> torch.Tensor:
        """A random number for each token of the joint micro-batch, of this step."""
        G, T = doc_GT.shape
        return controls.random_keys(G, T, seed=self.seed, step=step, device=doc_GT.device)
