"""Values of a data set's tokens from a critic, kept in a table, and what the policy makes of them.

Shapes: N rows of a data set, B rows of a batch, T positions. V[t] is the value after token t.

``model`` is the critic's trunk, whole on this rank.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset

from wmtp_modules.critic.pairs import fingerprint_responses
from wmtp_modules.critic.states import trunk_states
from wmtp_modules.data.packing import pad_rows
from wmtp_modules.loss.value_loss import response_mask
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.run.watchdog import Watchdog
from wmtp_modules.scoring.score_table import compute_scores, fingerprint_tokenizer

LEAST_LOGIT = -80.0  # of a value that fp32 still holds, so that ratios of values exist


@torch.no_grad()
def row_values(
    model: MTPTransformer, head: ValueHead, rows: list[tuple[np.ndarray, np.ndarray]]
) -> list[np.ndarray]:
    """V after every token of some rows, fp32 [len] each, given their tokens and ``keep``.

    ValueError if one is not finite.
    """
    device = head.base.device
    tokens_BT, doc_BT = pad_rows([tokens for tokens, _ in rows])
    keep_BT, _ = pad_rows([keep for _, keep in rows])
    y_BT = response_mask(keep_BT.bool(), doc_BT).to(device)
    logits_BT = head(*trunk_states(model, tokens_BT.to(device)), y_BT)
    values_BT = logits_BT.clamp(min=LEAST_LOGIT).sigmoid().cpu().numpy()
    values = [values_BT[b, : len(tokens)] for b, (tokens, _) in enumerate(rows)]
    for values_T in values:
        if not np.isfinite(values_T).all():
            raise ValueError(
                f"the critic's value is not finite somewhere in a row of {len(values_T)} tokens: "
                "check the trunk's checkpoint, its tokenizer and the dtype"
            )
    return values


def tokens_and_keep(rows: Dataset) -> list[tuple[np.ndarray, np.ndarray]]:
    """What ``row_values`` asks of some rows."""
    columns = rows.select_columns(["tokens", "keep"]).with_format("numpy")[:]
    return list(zip(columns["tokens"], columns["keep"], strict=True))


def values_fingerprint(
    critic: dict, head_file: Path, rows: Dataset, *, dataset: str, max_seq_len: int
) -> dict:
    """What a table of values depends on: ``critic_fingerprint``, the head's weights, the rows.

    ``dataset`` is the hash of the rows' tokens.
    """
    return {
        "checkpoint": critic["trunk"],
        "critic": fingerprint_tokenizer(head_file),
        "tokenizer": critic["tokenizer"],
        "dataset": dataset,
        "responses": fingerprint_responses(rows),
        "max_seq_len": max_seq_len,
        "kind": "good given the tokens so far",
        "n_heads": 1,
        "dtype": critic["dtype"],
    }


def compute_values(
    trunk: Callable[[], MTPTransformer],
    head: ValueHead,
    rows: Dataset,
    *,
    table_dir: str | Path,
    fingerprint: dict,
    batch_tokens: int,
    watchdog: Watchdog,
) -> None:
    """V after every token of some rows, kept in a table; the ranks share the rows.

    Args:
        trunk: loads the model, if a row is missing.
        batch_tokens: tokens at a time, padding included.

    Raises:
        ValueError: if the folder holds a table of something else, or a value is not finite.
    """
    with watchdog:
        compute_scores(
            table_dir,
            fingerprint,
            rows,
            lambda batch: row_values(trunk(), head, batch),
            inputs=tokens_and_keep,
            batch_tokens=batch_tokens,
            rank=dist.get_rank(),
            world=dist.get_world_size(),
            desc="values",
            beat=watchdog.beat,
        )
