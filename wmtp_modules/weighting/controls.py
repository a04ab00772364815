"""Controls of Rho-1: the same selection, but random, shuffled or reference-free, and an oracle.

Shapes: B rows of the joint micro-batch of all ranks, T positions, K heads, N = B * T.
"""

import numpy as np
import torch

from wmtp_modules.loss.mtp_loss import shift_to_heads
from wmtp_modules.weighting.calibrate import calibrate, calibrate_log
from wmtp_modules.weighting.rho1 import scope_ids


def random_keys(B: int, T: int, *, seed: int, step: int, device: torch.device) -> torch.Tensor:
    """One random number per token, fp64 in [0, 1), the same on any number of ranks.

    ``step`` counts micro-batches: each one draws new numbers, and a resumed run repeats them.
    """
    keys_BT = torch.from_numpy(np.random.default_rng((seed, step)).random((B, T)))
    if device.type == "cuda":  # pinned, so that nobody waits for the copy
        keys_BT = keys_BT.pin_memory()
    return keys_BT.to(device, non_blocking=True)


def shuffle_scores(
    scores_BTK: torch.Tensor, mask_BTK: torch.Tensor, doc_BT: torch.Tensor, keys_BT: torch.Tensor
) -> torch.Tensor:
    """Permute real scores within each document, which removes only the information in their place.

    The i-th valid position of a head in a document receives the score of the position whose
    target token has the i-th smallest key (``random_keys``) there: one permutation of the
    document's tokens, restricted to the targets that each head has. Each document and head keeps
    its multiset of scores over valid positions.
    """
    B, T, K = scores_BTK.shape
    # Positions without a target form a group of their own after all documents.
    group_BTK = torch.where(mask_BTK, scope_ids("document", doc_BT, 1)[..., None], B * T)
    group_KN = group_BTK.flatten(0, 1).T
    keys_KN = shift_to_heads(keys_BT, K, 0.0).flatten(0, 1).T
    scores_KN = scores_BTK.flatten(0, 1).T

    to_KN = group_KN.argsort(dim=1, stable=True)
    by_key_KN = keys_KN.argsort(dim=1, stable=True)
    from_KN = by_key_KN.gather(1, group_KN.gather(1, by_key_KN).argsort(dim=1, stable=True))
    shuffled_KN = torch.empty_like(scores_KN).scatter(1, to_KN, scores_KN.gather(1, from_KN))
    return shuffled_KN.T.reshape(B, T, K)


def dft_weights(
    losses_BTK: torch.Tensor, mask_BTK: torch.Tensor, w_min: float, w_max: float
) -> torch.Tensor:
    """Dynamic fine-tuning (arXiv 2508.05629): weight by the model's own probability of the token.

    raw = exp(-loss). The paper uses raw itself, which lowers the learning rate; here each head is
    calibrated to mean 1 so that a comparison is about the weighting.
    """
    return calibrate_log(-losses_BTK, mask_BTK, w_min, w_max)


def oracle_weights(marks_BTK: torch.Tensor, mask_BTK: torch.Tensor) -> torch.Tensor:
    """What a weighting could do that knows which targets are wrong: 0 there, elsewhere all equal.

    With n of a head's N targets marked the others weigh N / (N - n), whatever that is: no bound
    cuts it, else the mean would not be 1. A head whose targets are all marked has weights of 1, as
    ``calibrate`` has it for raw weights that are all 0.
    """
    return calibrate(~marks_BTK, mask_BTK, 0.0, mask_BTK.numel() + 1.0)
