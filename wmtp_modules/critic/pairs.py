"""The critic between its rewards and the policy: pairs, held-out figures, values, its folder.

Shapes: N rows of a data set, P pairs of rows, B rows of a batch, T positions. V[t] is the value
after token t; ``sums_N3`` holds ``value_sums`` of every row.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.data.packing import pad_rows
from wmtp_modules.files import new_file
from wmtp_modules.loss.mtp_loss import shift_to_heads
from wmtp_modules.loss.value_loss import response_mask, value_sums, values_before
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.reports.weights_page import token_texts, write_weights_page
from wmtp_modules.weighting.advantage import (
    CriticWeighting,
    advantages,
    critic_weights,
    standardise,
)

LENGTH_BIN = 1.25  # responses of a pair differ in length by less than a quarter
HEAD_FILE, RECORD_FILE = "value_head.safetensors", "critic.json"


# ------------------------------------------------------------------------------ pairs


def make_pairs(
    lengths_N: np.ndarray, rewards_N: np.ndarray, problem_ids: list[str | None], *, seed: int
) -> np.ndarray:
    """Pairs of responses to one problem, of like length and unlike reward.

    Responses to a problem are sorted into bins of length, so that length does not give the label
    away. Inside a bin the best response is paired with the worst, the second best with the second
    worst and so on, ties in random order, so that each response is in one pair at most.

    Args:
        lengths_N: response tokens of each row; rows without any are left out.
        rewards_N: reward of each row.
        problem_ids: problem of each row; rows without one are left out.
        seed: of the order of ties and pairs.

    Returns:
        int64 [P, 2], rows of the better and of the worse response.
    """
    rng = np.random.default_rng(seed)
    bins: dict[tuple, list[int]] = {}
    for row in rng.permutation(len(lengths_N)).tolist():
        if problem_ids[row] is not None and lengths_N[row] > 0:
            length_bin = int(np.log(lengths_N[row]) / np.log(LENGTH_BIN))
            bins.setdefault((problem_ids[row], length_bin), []).append(row)
    pairs = []
    for rows in bins.values():
        rows.sort(key=lambda row: -rewards_N[row])  # stable: ties stay in random order
        for better, worse in zip(rows, reversed(rows), strict=True):
            if rewards_N[better] <= rewards_N[worse]:
                break
            pairs.append((better, worse))
    return rng.permutation(np.array(pairs, np.int64).reshape(-1, 2))


def response_lengths(rows: Dataset) -> np.ndarray:
    """Response tokens of each row (those with a value before them), int64 [N]."""
    batches = rows.select_columns("keep").with_format("numpy").iter(batch_size=4096)
    lengths = [np.count_nonzero(keep[1:]) for batch in batches for keep in batch["keep"]]
    return np.array(lengths, np.int64)


def problem_ids(rows: Dataset) -> list[str | None]:
    """Problem of each row, None where it has none."""
    return rows["problem_id"][:] if "problem_id" in rows.column_names else [None] * len(rows)


def fingerprint_responses(rows: Dataset) -> str:
    """Hash of what the tokens do not show: how long each response is, and to which problem."""
    content = [response_lengths(rows).tolist(), problem_ids(rows)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def length_only_accuracy(lengths_N: np.ndarray, pairs_P2: np.ndarray) -> float:
    """Share of pairs that the better rule of "longer is better" and "shorter is better" gets right.

    Ties count one half. This is what a critic has to beat: it is read off the same pairs, so it is
    the best that length can do there.
    """
    difference_P = lengths_N[pairs_P2[:, 0]] - lengths_N[pairs_P2[:, 1]]
    longer = _share_right(difference_P)
    return max(longer, 1 - longer)


def _share_right(difference_P: np.ndarray) -> float:
    return float(((difference_P > 0) + 0.5 * (difference_P == 0)).mean())


# ---------------------------------------------------------------------------- figures


def row_means_of(sums_N3: np.ndarray) -> np.ndarray:
    """Mean value over the response tokens of each row, [N]."""
    return sums_N3[:, 1] / np.maximum(sums_N3[:, 0], 1)


def value_loss_of(sums_N3: np.ndarray, rewards_N: np.ndarray) -> float:
    """Mean over response tokens of 1/2 (V[u - 1] - R)^2."""
    count_N, total_N, square_N = sums_N3.T
    loss_N = 0.5 * (square_N - 2 * rewards_N * total_N + count_N * rewards_N**2)
    return float(loss_N.sum() / count_N.sum())


def constant_value_loss(count_N: np.ndarray, rewards_N: np.ndarray) -> float:
    """Value loss of the best constant: half the variance of the rewards over response tokens."""
    mean = (count_N * rewards_N).sum() / count_N.sum()
    return float(0.5 * (count_N * (rewards_N - mean) ** 2).sum() / count_N.sum())


def pairwise_loss_of(sums_N3: np.ndarray, pairs_P2: np.ndarray) -> float:
    """Mean over pairs of -log sigmoid(mean V of the better - mean V of the worse)."""
    means_N = row_means_of(sums_N3)
    return float(np.logaddexp(0, means_N[pairs_P2[:, 1]] - means_N[pairs_P2[:, 0]]).mean())


def fit_affine(sums_N3: np.ndarray, rewards_N: np.ndarray) -> tuple[float, float]:
    """Least squares R ~ a V + b over response tokens.

    A pairwise objective leaves offset and scale of V open, and the last step of a response compares
    V with R.

    Returns:
        (a, b); (0, mean reward) where V does not vary.
    """
    count_N, total_N, square_N = sums_N3.T
    n = count_N.sum()
    mean_v, mean_r = total_N.sum() / n, (count_N * rewards_N).sum() / n
    variance = square_N.sum() / n - mean_v**2
    covariance = (total_N * rewards_N).sum() / n - mean_v * mean_r
    slope = covariance / variance if variance > 1e-12 else 0.0
    return float(slope), float(mean_r - slope * mean_v)


def critic_report(sums_N3: np.ndarray, rewards_N: np.ndarray, pairs_P2: np.ndarray) -> dict:
    """Figures of a critic on held-out rows, each beside what it has to beat.

    Args:
        sums_N3: ``value_sums`` of every held-out row.
        rewards_N: standardised rewards.
        pairs_P2: from ``make_pairs``; may be empty.

    Returns:
        ``value_loss`` against ``constant_value_loss``; ``pair_accuracy`` within pairs of the same
        problem against ``length_only`` (None without pairs); ``auc`` of above-average responses
        across problems, which mixes in how hard the problems are (None if all or none are);
        ``pairs`` and ``rows``.
    """
    from sklearn.metrics import roc_auc_score  # three seconds that no other start has to wait

    means_N = row_means_of(sums_N3)
    used_N = sums_N3[:, 0] > 0
    good_N = rewards_N > 0
    both = 0 < good_N[used_N].sum() < used_N.sum()
    pairs = len(pairs_P2) > 0
    difference_P = means_N[pairs_P2[:, 0]] - means_N[pairs_P2[:, 1]]
    return {
        "pair_accuracy": _share_right(difference_P) if pairs else None,
        "length_only": length_only_accuracy(sums_N3[:, 0], pairs_P2) if pairs else None,
        "value_loss": value_loss_of(sums_N3, rewards_N),
        "constant_value_loss": constant_value_loss(sums_N3[:, 0], rewards_N),
        "auc": float(roc_auc_score(good_N[used_N], means_N[used_N])) if both else None,
        "pairs": len(pairs_P2),
        "rows": int(used_N.sum()),
    }


def print_report(report: dict, near: dict | None = None) -> None:
    """Print the figures of ``critic_report``, each beside its baseline.

    Args:
        report: from ``critic_report``.
        near: ``share``, ``chance`` and ``rows`` from ``near_marks``, where marks are known.
    """
    print(f"\nCritic on {report['rows']} held-out responses")
    if report["pairs"]:
        print(
            f"  accuracy within {report['pairs']} pairs of the same problem "
            f"{report['pair_accuracy']:.3f} (length alone {report['length_only']:.3f}, a constant "
            "0.500)"
        )
    if report["auc"] is not None:
        print(f"  AUC across problems {report['auc']:.3f}, which their difficulty blurs")
    print(
        f"  value loss {report['value_loss']:.4f} (best constant "
        f"{report['constant_value_loss']:.4f})"
    )
    if near:
        print(
            f"  largest |delta| within 3 tokens of the mutated one in {near['share']:.1%} of "
            f"{near['rows']} responses (chance {near['chance']:.1%})"
        )


def shortcomings(report: dict, objective: str) -> list[str]:
    """In what a critic is no better than knowing nothing; empty for one that is of use.

    Accuracy within pairs of the same problem has to beat length alone and a constant's one half.
    A regression critic also has to beat the best constant's value loss; a pairwise one is not asked
    to, for it never sees which problems are hard, and its scale is only fitted afterwards.

    Args:
        report: from ``critic_report``.
        objective: ``regression`` or ``pairwise``.
    """
    found = []
    if objective == "regression" and not report["value_loss"] < report["constant_value_loss"]:
        found.append(
            f"its held-out value loss {report['value_loss']:.4f} is not below the best constant's "
            f"{report['constant_value_loss']:.4f}"
        )
    baseline = max(report["length_only"] or 0.5, 0.5)
    if report["pairs"] and not report["pair_accuracy"] > baseline:
        found.append(
            f"its accuracy {report['pair_accuracy']:.3f} within {report['pairs']} held-out pairs "
            f"is not above {baseline:.3f}, which length alone or a guess reaches"
        )
    return found


def near_marks(
    delta_BT: torch.Tensor, y_BT: torch.Tensor, marks_BT: torch.Tensor, reach: int = 3
) -> np.ndarray:
    """Whether the largest |delta| of a response falls near a marked token.

    The last response token is left out: its delta pays out the reward wherever the mark is. Chance
    is the share of a response's other tokens that lie near a mark.

    Args:
        delta_BT: temporal differences, one response per row.
        y_BT: from ``response_mask``.
        marks_BT: bool, the tokens known to be wrong.
        reach: tokens to either side that count as near.

    Returns:
        fp64 [3]: rows whose largest |delta| is near, sum of the rows' chances, rows with a mark.
    """
    found = np.zeros(3)
    for delta_T, y_T, mark_T in zip(delta_BT, y_BT, marks_BT, strict=True):
        places = y_T.nonzero().flatten()[:-1]
        marks = (mark_T & y_T).nonzero().flatten()
        if len(places) and len(marks):
            near = (places[:, None] - marks[None]).abs().amin(1) <= reach
            found += float(near[delta_T[places].abs().argmax()]), float(near.double().mean()), 1
    return found


# ----------------------------------------------------------------------------- values


@torch.no_grad()
def row_values(model: MTPTransformer, head: ValueHead, rows: list[np.ndarray]) -> list[np.ndarray]:
    """V after every token of some rows, as ``compute_scores`` asks for them.

    Args:
        model: the critic's trunk, whole on this rank; its heads are not used.
        head: the value head.
        rows: token ids of each row, [len].

    Returns:
        fp32 values of each row, [len].

    Raises:
        ValueError: if a value is not finite.
    """
    tokens_BT, _ = pad_rows(rows)
    hidden_BTD = model.trunk(tokens_BT.to(head.shift.device))
    values_BT = head(hidden_BTD).cpu().numpy()
    values = [values_BT[b, : len(row)] for b, row in enumerate(rows)]
    for values_T in values:
        if not np.isfinite(values_T).all():
            raise ValueError(
                f"the critic's value is not finite somewhere in a row of {len(values_T)} tokens: "
                "check the trunk's checkpoint, its tokenizer and the dtype"
            )
    return values


def batch_of(rows: Dataset, indices: list[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Some rows side by side, padded on the right, each a document of its own.

    Returns:
        ``tokens``, ``doc`` int64 [B, T] and ``y``, ``noise`` bool [B, T].
    """
    picked = rows.select(indices).with_format("numpy")
    tokens_BT, doc_BT = pad_rows(list(picked["tokens"]))
    flags = {}
    for name in ("keep", "noise"):
        flags[name] = torch.zeros_like(doc_BT, dtype=torch.bool)
        if name in picked.column_names:
            for b, row in enumerate(picked[name]):
                flags[name][b, : len(row)] = torch.from_numpy(np.asarray(row, bool))
    batch = {
        "tokens": tokens_BT,
        "doc": doc_BT,
        "y": response_mask(flags["keep"], doc_BT),
        "noise": flags["noise"],
    }
    return {name: value.to(device) for name, value in batch.items()}


@torch.no_grad()
def sums_of_rows(
    model: MTPTransformer,
    head: ValueHead,
    rows: Dataset,
    batches: Iterable[np.ndarray],
) -> np.ndarray:
    """``value_sums`` of some rows; 0 for the others, so that ranks can add theirs up.

    Args:
        model: the critic's trunk, whole on this rank.
        head: the value head.
        rows: tokenised rows, N of them.
        batches: indices of the rows to value, some at a time.

    Returns:
        fp64 sums_N3.
    """
    sums_N3 = np.zeros((len(rows), 3))
    for indices in batches:
        batch = batch_of(rows, indices.tolist(), head.shift.device)
        values_BT = head(model.trunk(batch["tokens"]))
        sums_N3[indices] = value_sums(values_BT, batch["y"]).cpu().numpy()
    return sums_N3


@torch.no_grad()
def row_advantages(
    model: MTPTransformer,
    head: ValueHead,
    rows: Dataset,
    indices: np.ndarray,
    rewards_N: np.ndarray,
    *,
    lam: float,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A padded batch of some rows and their advantages, straight from the critic.

    Args:
        model: the critic's trunk, whole on this rank.
        head: the value head.
        rows: tokenised rows, N of them.
        indices: the rows to take.
        rewards_N: standardised rewards of all rows.
        lam: see ``advantages``.

    Returns:
        (``batch_of`` these rows, fp64 advantages_BT).
    """
    batch = batch_of(rows, indices.tolist(), head.shift.device)
    values_BT = head(model.trunk(batch["tokens"]))
    rewards_BT = torch.from_numpy(rewards_N[indices]).to(values_BT)[:, None].expand_as(values_BT)
    return batch, advantages(values_BT, rewards_BT, batch["y"], batch["doc"], lam=lam)


def near_marks_of_rows(
    model: MTPTransformer,
    head: ValueHead,
    rows: Dataset,
    batches: Iterable[np.ndarray],
    rewards_N: np.ndarray,
) -> np.ndarray:
    """``near_marks`` of some rows whose column ``noise`` marks what is wrong with them.

    Args:
        model: the critic's trunk, whole on this rank.
        head: the value head.
        rows: tokenised rows, N of them.
        batches: indices of the rows to take, some at a time.
        rewards_N: standardised rewards of all rows.

    Returns:
        fp64 [3], so that ranks can add theirs up.
    """
    found = np.zeros(3)
    for indices in batches:
        batch, delta_BT = row_advantages(model, head, rows, indices, rewards_N, lam=0.0)
        found += near_marks(delta_BT, batch["y"], batch["noise"])
    return found


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
        path: the page.
        model: the critic's trunk, whole on this rank.
        head: the value head.
        rows: tokenised rows that the pairs are of.
        pairs_P2: better and worse responses to show.
        rewards_N: standardised rewards of all rows.
        weighting: of the run; its temperature, bounds and lambda are used.
        statistics: mean and standard deviation of the policy's advantages.
        tokenizer: turns ids back to text.
        caption: from ``page_caption``.
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
    write_weights_page(
        path,
        functions,
        title="Weights of held-out responses",
        caption=caption,
    )


def page_caption(weighting: CriticWeighting, of: str) -> str:
    """What the page shows; a page with another caption is of another weighting or critic.

    Args:
        weighting: of the run.
        of: names the critic and the responses that standardise its advantages.
    """
    return (
        "The weight that the critic gives each token of a response; the mean over all shown is 1. "
        f"Advantages with lambda {weighting.lam}, temperature {weighting.temperature}, weights "
        f"from {weighting.w_min} to {weighting.w_max}; {of}. Outlined: what makes a response "
        "worse, where it is known."
    )


def joint_batch(n_items: int, size: int, step: int, seed: int) -> np.ndarray:
    """Items of one training step of all ranks: epoch after epoch, each in an order of its own.

    Args:
        n_items: rows or pairs to train on.
        size: of the joint batch.
        step: optimizer step, from 0.
        seed: of the order.

    Raises:
        ValueError: if there are fewer items than a joint batch.
    """
    if n_items < size:
        raise ValueError(
            f"there are {n_items} to train the critic on, fewer than a joint batch of {size}: "
            "lower critic.batch_size or add data"
        )
    epoch, place = divmod(step, n_items // size)
    order = np.random.default_rng([seed, epoch]).permutation(n_items)
    return order[place * size : (place + 1) * size]


# ----------------------------------------------------------------------------- folder


class TrainingState:
    """Progress of a critic's training, written after every evaluation so that a kill loses little.

    Args:
        folder: of the critic.
        fingerprint: what the critic is made from; a state of something else is not resumed.

    Attributes:
        step: optimizer steps done.
        heldout_losses: held-out loss of every evaluation.
        evaluations_since_best: without a lower held-out loss.
        best_head: state of the value head with the lowest held-out loss.
    """

    def __init__(self, folder: Path, fingerprint: dict) -> None:
        self._path = folder / "state.pt"
        self._fingerprint = fingerprint
        self.step = 0
        self.heldout_losses: list[float] = []
        self.evaluations_since_best = 0
        self.best_head: dict[str, torch.Tensor] = {}

    def resume(self, head: ValueHead, optimizer: torch.optim.Optimizer) -> None:
        """Go on with a state of the same fingerprint, if there is one.

        Raises:
            ValueError: if the file is damaged or carries code, which is not run.
        """
        if not self._path.exists():
            return
        try:
            state = torch.load(self._path, map_location="cpu", weights_only=True)
            if state["fingerprint"] != self._fingerprint:
                return
            head.load_state_dict(state["head"])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.heldout_losses = state["step"], state["heldout_losses"]
            self.evaluations_since_best = state["evaluations_since_best"]
            self.best_head = state["best_head"]
        except Exception as error:  # of a pickle with flipped bits, there is no telling which
            raise ValueError(
                f"{self._path} is damaged or no state of a critic's training: delete it, and the "
                "critic is trained from its start"
            ) from error

    def evaluated(
        self, heldout_loss: float, head: ValueHead, optimizer: torch.optim.Optimizer
    ) -> None:
        """Record an evaluation; rank 0 writes the state. Equal on all ranks."""
        if heldout_loss < min(self.heldout_losses, default=float("inf")):
            self.evaluations_since_best = 0
            self.best_head = {key: value.clone() for key, value in head.state_dict().items()}
        else:
            self.evaluations_since_best += 1
        self.heldout_losses.append(heldout_loss)
        if dist.get_rank() == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            state = {
                "fingerprint": self._fingerprint,
                "step": self.step,
                "heldout_losses": self.heldout_losses,
                "evaluations_since_best": self.evaluations_since_best,
                "head": head.state_dict(),
                "best_head": self.best_head,
                "optimizer": optimizer.state_dict(),
            }
            with new_file(self._path) as unfinished, unfinished.open("wb") as file:
                torch.save(state, file)


def save_critic(folder: Path, head: ValueHead, record: dict) -> None:
    """Write the value head, then the record that marks the folder as complete.

    Args:
        folder: of the critic.
        head: the value head.
        record: ``fingerprint`` of what it was trained from, ``settings`` of the training,
            ``report`` and what else to keep.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.cpu().contiguous() for key, value in head.state_dict().items()}
    with new_file(folder / HEAD_FILE) as unfinished:
        save_file(state, unfinished)
    with new_file(folder / RECORD_FILE) as unfinished:
        unfinished.write_text(json.dumps(record, indent=1))


def read_critic(folder: Path) -> dict | None:
    """The record of a complete critic, or None where there is none.

    Raises:
        ValueError: if the record is damaged.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError):
        record = None
    blocks = ("fingerprint", "settings", "report")
    if not isinstance(record, dict) or not all(isinstance(record.get(b), dict) for b in blocks):
        raise ValueError(f"{path} is damaged: train the critic again in another folder")
    return record


def check_critic(folder: Path, fingerprint: dict, settings: dict | None = None) -> dict:
    """The record of the critic in a folder, proven to be made from what this run uses.

    Args:
        folder: of the critic.
        fingerprint: what this run expects it to be made from.
        settings: how this run would train it; None where any will do.

    Raises:
        ValueError: if there is none, or it was trained on another trunk, data set or reward, or
            with other settings.
    """
    record = read_critic(folder)
    if record is None:
        raise ValueError(f"{folder} holds no trained critic: add 'critic' to stages")
    found, fingerprint = record["fingerprint"], dict(fingerprint)
    if settings is not None:
        found, fingerprint = found | record["settings"], fingerprint | settings
    differences = [
        f"{key}: the critic has {found.get(key)!r}, this run {fingerprint.get(key)!r}"
        for key in sorted(found.keys() | fingerprint.keys())
        if found.get(key) != fingerprint.get(key)
    ]
    if differences:
        raise ValueError(
            f"the critic in {folder} was made from something else ({'; '.join(differences)}): "
            "delete that folder to train again, or name another critic.checkpoint_dir"
        )
    return record


def load_value_head(folder: Path, embed_dim: int) -> ValueHead:
    """The value head of a critic, on the CPU.

    Raises:
        ValueError: if the file is missing, damaged, or of another width.
    """
    head = ValueHead(embed_dim)
    path = folder / HEAD_FILE
    try:
        head.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} is missing, damaged, or no value head of width {embed_dim}: train the critic "
            f"again ({error})"
        ) from error
    return head
