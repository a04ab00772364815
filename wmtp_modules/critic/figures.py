"""Figures of a critic on held-out rows, each beside the baseline that it has to beat.

Shapes: N rows of a data set, P pairs of rows, B rows of a batch, T positions. ``sums_N3`` holds
``value_sums`` of every row.
"""

import numpy as np
import torch


def length_only_accuracy(lengths_N: np.ndarray, pairs_P2: np.ndarray) -> float:
    """Share of pairs that the better rule of "longer is better" and "shorter is better" gets right.

    Ties count one half. It is read off the same pairs, so it is the best that length can do there.
    """
    difference_P = lengths_N[pairs_P2[:, 0]] - lengths_N[pairs_P2[:, 1]]
    longer = _share_right(difference_P)
    return max(longer, 1 - longer)


def _share_right(difference_P: np.ndarray) -> float:
    return float(((difference_P > 0) + 0.5 * (difference_P == 0)).mean())


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
    """Least squares R ~ a V + b over response tokens; (0, mean reward) if V does not vary.

    A pairwise objective leaves offset and scale of V open, and the last step of a response compares
    V with R.
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
        across problems, which mixes in how hard the problems are (None if all or none are).
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
    """Print ``critic_report``; ``near`` has ``share``, ``chance`` and ``rows`` of marked rows."""
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
    A regression critic must also beat the best constant's value loss; a pairwise one need not, for
    it never sees which problems are hard, and its scale is only fitted afterwards.
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
    """Whether the largest |delta| of a response falls within ``reach`` tokens of a marked one.

    The last response token is left out: its delta pays out the reward wherever the mark is. Chance
    is the share of a response's other tokens that lie near a mark.

    Args:
        delta_BT: temporal differences, one response per row.
        y_BT, marks_BT: bool, from ``response_mask``, and the tokens known to be wrong.

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
