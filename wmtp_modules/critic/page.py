"""An HTML page of response pairs, each token coloured by the weight that the critic gives it."""

from pathlib import Path

import numpy as np
from datasets import Dataset
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.critic.values import row_advantages
from wmtp_modules.loss.mtp_loss import shift_to_heads
from wmtp_modules.loss.value_loss import values_before
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.reports.weights_page import token_texts, write_weights_page
from wmtp_modules.weighting.advantage import CriticWeighting, critic_weights, standardise


def write_pairs_page(
    path: Path,
    model: MTPTransformer,
    head: ValueHead,
    rows: Dataset,
    pairs_P2: np.ndarray,
    rewards_N: np.ndarray,
    *,
    weighting: CriticWeighting,
    statistics: tuple[float, float],
    tokenizer: Llama2Tokenizer,
    caption: str,
) -> None:
    """An HTML page of some pairs with every token coloured by the weight that head 0 would give.

    Args:
        pairs_P2: better and worse responses among the rows.
        rewards_N: standardised rewards of all rows.
        statistics: mean and standard deviation of the policy's advantages.
    """
    indices = pairs_P2.flatten()
    batch, a_BT = row_advantages(model, head, rows, indices, rewards_N, lam=weighting.lam)
    z_BT1 = shift_to_heads(standardise(a_BT, *statistics), 1, 0.0)
    mask_BT1 = shift_to_heads(batch["y"], 1, False)
    limits = weighting.w_min, weighting.w_max
    weights_BT1 = critic_weights(z_BT1, mask_BT1, weighting.temperature, *limits)
    weights_BT = values_before(weights_BT1.squeeze(-1))  # back at the token itself
    functions = []
    for b, row in enumerate(indices.tolist()):
        ids = rows[row]["tokens"]
        y, weights = batch["y"][b, : len(ids)].tolist(), weights_BT[b, : len(ids)].tolist()
        functions.append(
            {
                "name": rows[row]["problem_id"],
                "note": f"{('better', 'worse')[b % 2]} response, standardised reward "
                f"{rewards_N[row]:+.2f}",
                "tokens": token_texts(tokenizer, ids),
                "weights": [w if is_y else None for w, is_y in zip(weights, y, strict=True)],
                "marked": batch["noise"][b, : len(ids)].tolist(),
            }
        )
    write_weights_page(path, functions, title="Weights of held-out responses", caption=caption)


def page_caption(weighting: CriticWeighting, of: str) -> str:
    """What the page shows; a page with another caption is of another weighting or critic.

    ``of`` names the critic and the responses that standardise its advantages.
    """
    return (
        "The weight that the critic gives each token of a response; the mean over all shown is 1. "
        f"Advantages with lambda {weighting.lam}, temperature {weighting.temperature}, weights "
        f"from {weighting.w_min} to {weighting.w_max}; {of}. Outlined: what makes a response "
        "worse, where it is known."
    )
