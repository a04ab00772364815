"""What trains a policy: its rows, values beside their tokens, and the scale of its weights.

Shapes: N rows of a data set, B packed rows, T positions, K heads.
"""

import errno
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.utils.data import Subset

from wmtp_modules.critic.pairs import fingerprint_responses
from wmtp_modules.critic.rewards import Responses
from wmtp_modules.data.packing import PackedDataset, collate
from wmtp_modules.data.rows import has_marks
from wmtp_modules.files import new_file, read_json
from wmtp_modules.loss.value_loss import response_mask
from wmtp_modules.parallel.process_group import all_reduce_sum
from wmtp_modules.progress import progress_bar
from wmtp_modules.run.watchdog import Watchdog
from wmtp_modules.scoring.score_table import ScoreTable
from wmtp_modules.weighting.advantage import (
    FLOOR,
    STANDARDISED,
    CriticWeighting,
    advantages,
    check_one_response,
)
from wmtp_modules.weighting.calibrate import solve_scale

log = logging.getLogger(__name__)


def policy_rows(
    train: Responses, heldout: Responses, above: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that train the policy, and those that validate it: the good ones, whatever trains.

    Args:
        above: standardised rewards must be larger; None for all responses.

    Raises:
        ValueError: if there are none.
    """
    chosen, chosen_val = train.above(above), heldout.good_rows()
    if not len(chosen):
        raise ValueError(
            f"policy_rewards_above {above} leaves none of {len(train.rows)} training responses: "
            "lower it (rewards are standardised), or leave it out to train on all"
        )
    if not len(chosen_val):
        raise ValueError(
            f"none of the {len(heldout.rows)} responses of dataset_val is good, and the policy is "
            "validated on good ones only: add some, or choose another rewards.good"
        )
    return chosen, chosen_val


def check_marks(rows: Dataset) -> None:
    """ValueError if no token of the rows is marked, as weighting ``oracle`` needs it."""
    if not has_marks(rows):
        raise ValueError(
            "weighting oracle knows which tokens are marked, and no row of this data set has a "
            "mark: give rows the field noise, or leave oracle out"
        )


def policy_packs(
    train: Responses,
    chosen: np.ndarray,
    *,
    max_seq_len: int,
    seed: int,
    table: ScoreTable | None = None,
) -> PackedDataset:
    """Packs of the ``chosen`` responses; with a table of V, ``values`` and f(R) beside the tokens.

    f(R) is ``reward`` in a pack, fp32.
    """
    more: dict[str, Any] = {}
    if table is not None:
        as_rows: Any = table
        more = {"scores": {"values": Subset(as_rows, chosen.tolist())}}
        more |= {"rewards": train.good[chosen]}
    return PackedDataset(train.rows.select(chosen), max_seq_len=max_seq_len, seed=seed, **more)


def log_raw_of(
    batch: dict[str, torch.Tensor], weighting: CriticWeighting, scale: dict
) -> torch.Tensor | None:
    """Logarithms of the raw weights of a micro-batch's tokens, [B, T]; None if none are needed.

    ``scale`` is of ``weight_scale``.
    """
    if weighting.needs_marks:
        return torch.where(batch["noise"], -torch.inf, 0.0)
    if not weighting.needs_values:
        return None
    mean, std = scale["statistics"]
    tensors = (batch[name] for name in ("values", "reward", "keep", "doc"))
    return weighting.log_raw(*tensors, floor=scale["floor"], mean=mean, std=std)


def weight_scale(
    packs: PackedDataset,
    train: Responses,
    chosen: np.ndarray,
    weighting: CriticWeighting,
    *,
    n_heads: int,
    device: torch.device,
    watchdog: Watchdog,
    source: tuple[str | Path, dict] | None = None,
) -> dict:
    """What all rows that train say of the weights before any step; a collective.

    It is found once and kept beside the values that it was made from.

    Args:
        packs: of the ``chosen`` rows of ``train``; the ranks share the work.
        n_heads: K.
        source: folder of the values and their fingerprint; None if they are not needed.

    Returns:
        ``floor`` of relative; ``statistics``, mean and deviation of the advantages of td and gae;
        ``scale_K`` of ``solve_scale``, or None where weights are calibrated in each micro-batch.

    Raises:
        ValueError: if a response is not one contiguous run of tokens, no scale gives mean 1, or
            nothing is marked for ``oracle``.
        OSError: if the disk is full.
    """
    floor = FLOOR * float(train.good.mean()) if len(train.good) else 0.0
    scale: dict[str, Any] = {"floor": floor, "statistics": [0.0, 1.0], "scale_K": None}
    if weighting.needs_marks:
        check_marks(train.rows)
    if not weighting.needs_scores:
        return scale
    path, made_from = None, {}
    if weighting.needs_values:
        assert source is not None
        table_dir, values = source
        made_from = {
            "values": values,
            "advantage": weighting.advantage,
            "lam": weighting.lam if weighting.advantage == "gae" else None,
            "floor": floor,
            "bounds": [weighting.w_min, weighting.w_max] if weighting.is_scaled else None,
            "heads": n_heads,
            "rows": hashlib.sha256(chosen.tobytes()).hexdigest(),
            "good": hashlib.sha256(train.good[chosen].tobytes()).hexdigest(),
            "responses": watchdog.on_rank_zero(lambda: fingerprint_responses(train.rows)),
        }
        name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(table_dir) / f"scale-{name}.json"
        found = watchdog.on_rank_zero(lambda: _read_scale(path, made_from))
        if found is not None:
            return found
    if weighting.needs_values and weighting.advantage in STANDARDISED:
        scale["statistics"] = _statistics(packs, chosen, weighting, device)
    else:
        log_raw_N, first_K = _raw_of_targets(packs, chosen, weighting, scale, n_heads)

        def add_up(sums: torch.Tensor) -> torch.Tensor:
            return all_reduce_sum(sums.to(device))[0].cpu()

        bounds = weighting.w_min, weighting.w_max
        scale["scale_K"] = solve_scale(log_raw_N, first_K, *bounds, add_up=add_up)
    if path is not None and dist.get_rank() == 0:
        _write_scale(path, {"made_from": made_from, "scale": scale})
    return scale


def _sound_packs(packs: PackedDataset, chosen: np.ndarray):
    """This rank's packs, each as a batch, and its response tokens; every response is one run."""
    row_of = torch.from_numpy(np.append(chosen, -1))  # padding's row is -1
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = range(rank, len(packs), world)
    for index in progress_bar(mine, desc="scale of the weights", shown=rank == 0):
        pack: Any = collate([packs[index]])
        check_one_response(pack["keep"], pack["doc"], row_of[pack["row"]])
        yield pack, response_mask(pack["keep"], pack["doc"])


def _statistics(
    packs: PackedDataset, chosen: np.ndarray, weighting: CriticWeighting, device: torch.device
) -> list[float]:
    """Mean and population deviation of the advantage over all response tokens."""
    lam = 0.0 if weighting.advantage == "td" else weighting.lam
    sums = torch.zeros(3, dtype=torch.float64)
    for pack, y_BT in _sound_packs(packs, chosen):
        a_BT = advantages(pack["values"], pack["reward"], pack["keep"], pack["doc"], lam=lam)
        sums += torch.stack([y_BT.sum(), a_BT[y_BT].sum(), a_BT[y_BT].square().sum()])
    (sums,) = all_reduce_sum(sums.to(device))
    n, total, square = sums.tolist()
    return [total / n, max(square / n - (total / n) ** 2, 0.0) ** 0.5]


def _raw_of_targets(
    packs: PackedDataset,
    chosen: np.ndarray,
    weighting: CriticWeighting,
    scale: dict,
    n_heads: int,
) -> tuple[torch.Tensor, Sequence[int]]:
    """This rank's arguments of ``solve_scale``: head k predicts what is k + 1 or more tokens in."""
    parts: list[list[torch.Tensor]] = [[] for _ in range(n_heads)]
    for pack, y_BT in _sound_packs(packs, chosen):
        log_raw_BT = log_raw_of(pack, weighting, scale)
        assert log_raw_BT is not None
        log_raw_n, place_n = log_raw_BT[y_BT].float(), pack["input_pos"][y_BT].clamp(max=n_heads)
        for k, part in enumerate(parts):
            part.append(log_raw_n[place_n == k + 1])
    counts = [sum(map(len, part)) for part in parts]
    flat = [one for part in parts for one in part]
    return torch.cat([torch.zeros(0), *flat]), [sum(counts[:k]) for k in range(n_heads)]


def _read_scale(path: Path, made_from: dict) -> dict | None:
    """What ``_write_scale`` wrote; None if it is missing, damaged or of something else."""
    try:
        record = read_json(path)
        if record["made_from"] != made_from:
            return None
        scale = record["scale"]
        numbers = [scale["floor"], *scale["statistics"], *(scale["scale_K"] or [])]
        n_scales = made_from["heads"] if made_from["bounds"] else 0
        is_sound = len(numbers) == 3 + n_scales and all(map(math.isfinite, numbers))
        return scale if is_sound else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_scale(path: Path, record: dict) -> None:
    try:
        with new_file(path) as unfinished:
            unfinished.write_text(json.dumps(record, indent=1))
    except OSError as error:  # values that another user has made are of use all the same
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        log.warning("%s: the scale is found again by each run", error)
