"""An HTML page of held-out responses, each token coloured by the weight that it would get."""

from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.critic.rewards import Responses
from wmtp_modules.loss.mtp_loss import shift_to_heads
from wmtp_modules.loss.value_loss import response_mask, values_before
from wmtp_modules.reports.weights_page import token_texts, write_weights_page
from wmtp_modules.weighting.advantage import CriticWeighting


def shown_rows(heldout: Responses, pairs_P2: np.ndarray, most: int) -> np.ndarray:
    """Rows to show: ``most`` pairs, or as many good and bad ones in turn where no two are a pair.

    Args:
        pairs_P2: better and worse responses among the rows.
    """
    if len(pairs_P2):
        return pairs_P2[:most].flatten()
    is_good_N = heldout.good > 0.5
    good, bad = (np.flatnonzero(of)[:most].tolist() for of in (is_good_N, ~is_good_N))
    both = [row for two in zip(good, bad, strict=False) for row in two]
    n = min(len(good), len(bad))
    return np.array(both + good[n:] + bad[n:], np.int64)


def write_page(
    path: Path,
    heldout: Responses,
    indices: np.ndarray,
    values: list[np.ndarray],
    *,
    weighting: CriticWeighting,
    scale: dict,
    tokenizer: Llama2Tokenizer,
    caption: str,
) -> None:
    """An HTML page of some rows with every token coloured by the weight that head 0 would give.

    Args:
        indices: of the rows.
        values: V after every token of each, [len].
        scale: of ``weight_scale``, of the policy's rows.
    """
    rows = [heldout.rows[index] for index in indices.tolist()]
    lengths = [len(row["tokens"]) for row in rows]
    keep_BT = pad_sequence([torch.tensor(row["keep"]) for row in rows], batch_first=True)
    values_BT = pad_sequence([torch.from_numpy(one) for one in values], batch_first=True)
    T = keep_BT.shape[1]
    doc_BT = torch.where(torch.arange(T) < torch.tensor(lengths)[:, None], 0, -1)
    good_BT = torch.from_numpy(heldout.good[indices])[:, None].expand(-1, T)
    mean, std = scale["statistics"]
    log_raw_BT = weighting.log_raw(
        *(values_BT, good_BT, keep_BT, doc_BT), floor=scale["floor"], mean=mean, std=std
    )
    mask_BT1 = shift_to_heads(response_mask(keep_BT, doc_BT), 1, False)
    scale_1 = scale["scale_K"] and scale["scale_K"][:1]
    weights_BT1 = weighting.weights_of(
        shift_to_heads(log_raw_BT.float(), 1, 0.0), mask_BT1, scale_1
    )
    weights_BT = values_before(weights_BT1.squeeze(-1))  # back at the token itself
    is_shown_BT = values_before(mask_BT1.squeeze(-1))
    functions = []
    for b, (index, row) in enumerate(zip(indices.tolist(), rows, strict=True)):
        is_shown, weights = (x[b, : lengths[b]].tolist() for x in (is_shown_BT, weights_BT))
        good = heldout.good[index]
        functions.append(
            {
                "name": row.get("problem_id") or f"held-out response {index}",
                "note": f"{'good' if good > 0.5 else 'bad'} response (f {good:.2f}), "
                f"standardised reward {heldout.rewards[index]:+.2f}",
                "tokens": token_texts(tokenizer, row["tokens"]),
                "weights": [w if y else None for w, y in zip(weights, is_shown, strict=True)],
                "marked": row.get("noise") or [False] * lengths[b],
            }
        )
    write_weights_page(path, functions, title="Weights of held-out responses", caption=caption)


def page_caption(weighting: CriticWeighting, of: str) -> str:
    """What the page shows; a page with another caption is of another weighting or critic.

    ``of`` names the critic and the rows that train.
    """
    over = "all rows that train the policy" if weighting.is_scaled else "all shown"
    how = {"gae": f" with lambda {weighting.lam}, temperature {weighting.temperature}"}
    how["td"] = f" with temperature {weighting.temperature}"
    return (
        f"The weight that the critic gives each token of a response; the mean over {over} is 1. "
        f"Advantage {weighting.advantage}{how.get(weighting.advantage, '')}, weights from "
        f"{weighting.w_min} to {weighting.w_max}; {of}. Outlined: what makes a response worse, "
        "where it is known."
    )
