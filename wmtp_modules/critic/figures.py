"""Figures of a critic on held-out responses, each beside what it has to beat.

Shapes: N rows of a data set, P pairs of rows, M judged tokens: of each row with a response its last
prompt token, then its response tokens (``Judged``). ``good_N`` is f(R), in [0, 1].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

REACH = 3  # tokens from the first marked one that count as having found it


@dataclass(frozen=True)
class Judged:
    """The tokens after which a critic is asked, of all rows one after the other.

    Attributes:
        offsets: int64 [N + 1], where each row's tokens begin; none of a row without a response.
        first: int64 [N], position of the first response token in its row.
        token: int64 [M].
        marked: bool [M], token is known to be wrong; None if the rows mark nothing.
    """

    offsets: np.ndarray
    first: np.ndarray
    token: np.ndarray
    marked: np.ndarray | None

    @classmethod
    def of(cls, rows: Dataset, first: np.ndarray, lengths: np.ndarray) -> "Judged":
        """Of rows whose responses (``response_spans``) begin at ``first``, ``lengths`` tokens."""
        offsets = np.concatenate([[0], np.cumsum(np.where(lengths > 0, lengths + 1, 0))])

        def column(name: str) -> np.ndarray:
            batches = rows.select_columns(name).with_format("numpy").iter(batch_size=4096)
            found = (row for batch in batches for row in batch[name])
            parts = [
                row[u - 1 : u + n] for row, u, n in zip(found, first, lengths, strict=True) if n
            ]
            return np.concatenate(parts) if parts else np.zeros(0, np.int64)

        has_marks = "noise" in rows.column_names
        return cls(offsets, first, column("tokens"), column("noise") if has_marks else None)

    @property
    def has_response(self) -> np.ndarray:
        """bool [N]."""
        return np.diff(self.offsets) > 0

    @property
    def row(self) -> np.ndarray:
        """Row of each judged token, int64 [M]."""
        return np.repeat(np.arange(len(self.first)), np.diff(self.offsets))

    @property
    def place(self) -> np.ndarray:
        """Response tokens read so far: 0 at a prompt's last token, int64 [M]."""
        return np.arange(len(self.token)) - self.offsets[self.row]

    @property
    def last(self) -> np.ndarray:
        """Index of the last token of each row that has a response."""
        return self.offsets[1:][self.has_response] - 1


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def cross_entropy(logits_M: np.ndarray, good_M: np.ndarray) -> float:
    """Mean cross-entropy of V = sigmoid(logits) against f(R), nats per token."""
    return float((np.logaddexp(0, logits_M) - good_M * logits_M).mean())


def constant_cross_entropy(good_M: np.ndarray) -> float:
    """The same of the best constant, the mean of f(R) over tokens."""
    p = np.array([good_M.mean(), 1 - good_M.mean()])
    return float(-(p * np.log(p, where=p > 0, out=np.zeros(2))).sum())


def pairs_cross_entropy(
    scores_N: np.ndarray, steps_N: np.ndarray, pairs_P2: np.ndarray, rho: float = 1.0
) -> float:
    """``pairs_loss`` per pair; ``steps_N`` holds each row's sum of d^2 and its response tokens."""
    better_P, worse_P = scores_N[pairs_P2].T
    square_P, n_P = steps_N[pairs_P2].sum(1).T
    return float((np.logaddexp(0, worse_P - better_P) + rho * square_P / n_P).mean())


def token_table(judged: Judged, good_N: np.ndarray, vocab_size: int) -> np.ndarray:
    """What a token says that is looked at alone: log(rate in good / rate in bad responses), [V].

    Rates are of response tokens, each count plus one. Responses weigh by f(R) and 1 - f(R).
    """
    is_response = judged.place > 0
    token, good = judged.token[is_response], good_N[judged.row[is_response]]
    rates = []
    for weight in (good, 1 - good):
        count_V = np.bincount(token, weight, minlength=vocab_size) + 1
        rates.append(np.log(count_V / count_V.sum()))
    return rates[0] - rates[1]


def mean_values(logits_M: np.ndarray, judged: Judged, good_N: np.ndarray) -> dict[str, float]:
    """Mean V of all responses at their start, after half of the median length, and at their end.

    V is a martingale: each should be the share of good, which stands beside them. A response that
    has ended keeps its last V.
    """
    values_M, start = sigmoid(logits_M), judged.offsets[:-1][judged.has_response]
    lengths = judged.last - start
    middle = start + np.minimum(lengths, int(np.median(lengths)) // 2)
    found = {"start": start, "middle": middle, "end": judged.last}
    means = {name: float(values_M[where].mean()) for name, where in found.items()}
    return means | {"good_share": float(good_N[judged.has_response].mean())}


def right(scores_N: np.ndarray, pairs_P2: np.ndarray) -> np.ndarray:
    """1 for each pair whose better response scores higher, one half for a tie, else 0."""
    difference_P = scores_N[pairs_P2[:, 0]] - scores_N[pairs_P2[:, 1]]
    return (difference_P > 0) + 0.5 * (difference_P == 0)


def pair_figures(
    scores_N: np.ndarray, lengths_N: np.ndarray, table_N: np.ndarray, pairs_P2: np.ndarray
) -> dict:
    """Accuracy within pairs beside that of length and of the token table; None without pairs.

    ``length_only`` is the better rule of "longer is better" and "shorter is better", read off the
    same pairs: the best that length can do there. ``standard_error`` is that of the difference to
    each baseline, pair by pair.
    """
    if not len(pairs_P2):
        return dict.fromkeys(("pair_accuracy", "length_only", "token_table")) | {"pairs": 0}
    ours_P, longer_P = right(scores_N, pairs_P2), right(lengths_N, pairs_P2)
    baselines = {
        "length_only": longer_P if longer_P.mean() >= 0.5 else 1 - longer_P,
        "token_table": right(table_N, pairs_P2),
    }
    return {
        "pair_accuracy": float(ours_P.mean()),
        **{name: float(theirs_P.mean()) for name, theirs_P in baselines.items()},
        "standard_error": {
            name: float((ours_P - theirs_P).std() / len(pairs_P2) ** 0.5)
            for name, theirs_P in baselines.items()
        },
        "pairs": len(pairs_P2),
    }


def auc(scores: np.ndarray, is_one: np.ndarray) -> float | None:
    """Chance that a score of the one kind is above the other's, ties half; None if one lacks."""
    from sklearn.metrics import roc_auc_score  # three seconds that no other start has to wait

    return float(roc_auc_score(is_one, scores)) if 0 < is_one.sum() < len(is_one) else None


def auc_standard_error(value: float, n_one: int, n_other: int) -> float:
    """Of an AUC, after Hanley and McNeil 1982, doi 10.1148/radiology.143.1.7063747."""
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value) + (n_one - 1) * (q1 - value**2) + (n_other - 1) * (q2 - value**2)
    return float((variance / (n_one * n_other)) ** 0.5)


def critic_report(
    judged: Judged,
    logits_M: np.ndarray,
    losses_M: np.ndarray,
    good_N: np.ndarray,
    table_V: np.ndarray,
    pairs_P2: np.ndarray,
) -> dict:
    """Figures of a critic on held-out rows, each beside what it has to beat.

    Args:
        logits_M, losses_M: of V, and head 0's loss, at every judged token.
        table_V: ``token_table`` of the training rows.
        pairs_P2: better and worse rows; may be empty.

    Returns:
        ``cross_entropy`` against ``constant``; ``pair_figures``; ``auc`` of V at the last token,
        between good and bad responses, beside that of length and table; ``mean_value``;
        ``mean_weight``, mean V over mean f(R) of the response tokens, 1 for a critic that is
        right on average. Where rows mark what is wrong: ``auc_spoiled`` of single tokens, and
        ``turn``, how often the largest fall of log V hits the first marked one.
    """
    row_M, n_N = judged.row, np.maximum(np.diff(judged.offsets) - 1, 0)
    is_response = judged.place > 0
    table_M = np.where(is_response, table_V[judged.token], 0.0)
    table_N = np.bincount(row_M, table_M, minlength=len(n_N))
    scores_N = np.zeros(len(n_N))
    scores_N[judged.has_response] = logits_M[judged.last]
    used, is_good = judged.has_response, good_N > 0.5
    values_M, good_M = sigmoid(logits_M), good_N[row_M]

    def auc_of(scores: np.ndarray) -> float | None:
        return auc(scores[used], is_good[used])

    longer = auc_of(n_N.astype(float))
    report = {
        "cross_entropy": cross_entropy(logits_M, good_M),
        "constant": constant_cross_entropy(good_M),
        **pair_figures(scores_N, n_N.astype(float), table_N, pairs_P2),
        "auc": auc_of(scores_N),
        "auc_length": None if longer is None else max(longer, 1 - longer),
        "auc_token_table": auc_of(table_N),
        "mean_value": mean_values(logits_M, judged, good_N),
        "mean_weight": float(values_M[is_response].mean() / good_M[is_response].mean()),
        "rows": int(used.sum()),
        "good_rows": int(is_good[used].sum()),
    }
    if judged.marked is not None and judged.marked[is_response].any():
        scores = {
            "critic": -values_M,
            "token_table": -table_M,
            "lm_loss": losses_M,
            "position": judged.place.astype(float),
        }
        marked = judged.marked[is_response]
        report["auc_spoiled"] = {k: auc(x[is_response], marked) for k, x in scores.items()}
        fall_M = np.diff(-np.logaddexp(0, -logits_M), prepend=0.0)  # of log V, used where place > 0
        report["turn"] = turn_hits(
            judged, {"critic": fall_M, "token_table": table_M, "lm_loss": -losses_M}
        )
    return report


def turn_hits(judged: Judged, scores: dict[str, np.ndarray]) -> dict:
    """How often the lowest score of a response falls within ``REACH`` of the first marked token.

    The last token is left out: what is left to learn comes out there, wherever the mark is. Chance
    is the share of a response's other tokens that lie near the mark.
    """
    assert judged.marked is not None
    hits, chance, n_rows = dict.fromkeys(scores, 0), 0.0, 0
    for begin, end in zip(judged.offsets[:-1] + 1, judged.offsets[1:] - 1, strict=True):
        marks = np.flatnonzero(judged.marked[begin : end + 1]) if begin < end else np.zeros(0)
        if not len(marks):
            continue
        near = np.abs(np.arange(end - begin) - marks[0]) <= REACH
        n_rows, chance = n_rows + 1, chance + near.mean()
        for name, score_M in scores.items():
            hits[name] += bool(near[score_M[begin:end].argmin()])
    rates: dict[str, Any] = {name: n / max(n_rows, 1) for name, n in hits.items()}
    return rates | {"chance": float(chance / max(n_rows, 1)), "rows": n_rows}


def shortcomings(report: dict) -> list[str]:
    """In what a critic is no better than knowing nothing; empty for one that is of use.

    Its token cross-entropy must be below the best constant's. Its accuracy within pairs, or
    without any pairs its AUC between good and bad responses, must be above length's and the token
    table's by more than two standard errors.
    """
    found = []
    if not report["cross_entropy"] < report["constant"]:
        found.append(
            f"its held-out cross-entropy {report['cross_entropy']:.4f} is not below the best "
            f"constant's {report['constant']:.4f}"
        )
    names = {"length_only": "length alone", "token_table": "a table of token counts"}
    if report["pairs"]:
        ours, what = report["pair_accuracy"], f"accuracy within {report['pairs']} held-out pairs"
        theirs = {name: report[name] for name in names}
        errors = report["standard_error"]
    elif report["auc"] is not None:
        ours, what = report["auc"], f"AUC over {report['rows']} held-out responses"
        theirs = {"length_only": report["auc_length"], "token_table": report["auc_token_table"]}
        n_good = report["good_rows"]
        errors = dict.fromkeys(names, auc_standard_error(ours, n_good, report["rows"] - n_good))
    else:
        return [*found, "its held-out responses are all good or all bad, so nothing shows"]
    found += [
        f"its {what}, {ours:.3f}, is not above {theirs[name]:.3f} of {said} by two standard errors "
        f"of {errors[name]:.3f}"
        for name, said in names.items()
        if not ours - theirs[name] > 2 * errors[name]
    ]
    return found


def print_report(report: dict) -> None:
    """Print ``critic_report``, as it stands in a critic's record."""
    print(f"\nCritic on {report['rows']} held-out responses, {report['good_rows']} of them good")
    print(
        f"  cross-entropy of V {report['cross_entropy']:.4f} per token (best constant "
        f"{report['constant']:.4f})"
    )
    if report["pairs"]:
        kind = {"problem": "of one problem", "length": "of like length, each of another problem"}
        print(
            f"  accuracy within {report['pairs']} pairs {kind[report['pair_kind']]} "
            f"{report['pair_accuracy']:.3f} (length alone {report['length_only']:.3f}, token "
            f"counts {report['token_table']:.3f})"
        )
    if report["auc"] is not None:
        print(
            f"  AUC between good and bad {report['auc']:.3f} (length {report['auc_length']:.3f}, "
            f"token counts {report['auc_token_table']:.3f})"
        )
    mean = report["mean_value"]
    print(
        f"  mean V {mean['start']:.3f} before, {mean['middle']:.3f} in the middle and "
        f"{mean['end']:.3f} at the end of a response; {mean['good_share']:.3f} of them are good"
    )
    if spoiled := report.get("auc_spoiled"):
        print(
            f"  AUC between sound and spoiled tokens {spoiled['critic']:.3f} (token counts "
            f"{spoiled['token_table']:.3f}, the model's loss {spoiled['lm_loss']:.3f}, position "
            f"{spoiled['position']:.3f})"
        )
        turn = report["turn"]
        print(
            f"  the largest fall of V hits the first spoiled token in {turn['critic']:.1%} of "
            f"{turn['rows']} responses (chance {turn['chance']:.1%}, token counts "
            f"{turn['token_table']:.1%}, the model's loss {turn['lm_loss']:.1%})"
        )
    for lack in shortcomings(report):  # with allow_uninformative_critic: true, else it is an error
        print(f"  not enough for the gate: {lack}")
    hopeless = report.get("hopeless_problems", {"count": 0})
    if hopeless["count"]:
        named = ", ".join(hopeless["names"][:3]) + (", ..." if hopeless["count"] > 3 else "")
        print(f"  {hopeless['count']} problems of the policy have no good response ({named})")
