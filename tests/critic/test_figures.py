"""Figures of a critic, against loops over their definition."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from wmtp_modules.critic.figures import (
    Judged,
    auc_standard_error,
    constant_cross_entropy,
    critic_report,
    cross_entropy,
    mean_values,
    pair_figures,
    pairs_cross_entropy,
    print_report,
    shortcomings,
    sigmoid,
    token_table,
)
from wmtp_modules.critic.judge import fit_kappa
from wmtp_modules.critic.pairs import response_spans
from wmtp_modules.loss.value_loss import pairs_loss

VOCAB = 20


@pytest.fixture
def rows():
    """60 rows: prompts of 1 to 3 tokens, responses of 0 to 9, of which the bad ones turn."""
    rng = np.random.default_rng(1)
    found = {"tokens": [], "keep": [], "noise": []}
    for i in range(60):
        prompt, n = rng.integers(1, 4), 0 if i % 20 == 7 else rng.integers(3, 10)
        turn = rng.integers(0, n) if n and i % 3 else n
        found["tokens"].append(rng.integers(0, VOCAB, prompt + n).tolist())
        found["keep"].append([False] * prompt + [True] * n)
        found["noise"].append([False] * (prompt + turn) + [True] * (n - turn))
    return Dataset.from_dict(found)


@pytest.fixture
def case(rows):
    """The judged tokens, logits of V, losses, f(R): two thirds are bad."""
    judged = Judged.of(rows, *response_spans(rows))
    rng = np.random.default_rng(2)
    good_N = (np.arange(60) % 3 == 0).astype(float)
    logits_M = rng.normal(size=len(judged.token)) + 0.5 * good_N[judged.row]
    return judged, logits_M, rng.random(len(judged.token)), good_N


def test_judged_tokens_are_those_of_a_response_and_the_one_before(rows, case):
    judged, *_ = case
    want = [(i, u, rows["tokens"][i][u], rows["noise"][i][u]) for i, u in asked_of(rows)]
    first = judged.first[judged.row]
    got = zip(judged.row, first - 1 + judged.place, judged.token, judged.marked, strict=True)
    assert [tuple(map(int, x)) for x in got] == [tuple(map(int, x)) for x in want]
    assert judged.has_response.sum() == 57


def asked_of(rows):
    for i, keep in enumerate(rows["keep"]):
        tokens = [u for u in range(1, len(keep)) if keep[u]]
        if tokens:
            yield from ((i, u) for u in [tokens[0] - 1, *tokens])


def test_two_runs_of_supervised_tokens_are_refused_by_name():
    rows = Dataset.from_dict({"keep": [[False, True, True], [False, True, False, True]]})
    with pytest.raises(ValueError, match=r"row 1 of the data set has separate runs"):
        response_spans(rows)
    kept = Dataset.from_dict({"keep": [[True, True, True], [False, False], [True]]})
    first, lengths = response_spans(kept)
    assert (first.tolist(), lengths.tolist()) == ([1, 0, 0], [2, 0, 0])


def test_cross_entropies(case):
    judged, logits_M, _, good_N = case
    v, f = sigmoid(logits_M), good_N[judged.row]
    want = -(f * np.log(v) + (1 - f) * np.log(1 - v)).mean()
    assert cross_entropy(logits_M, f) == pytest.approx(want)
    best = min(cross_entropy(np.full(len(f), x), f) for x in np.linspace(-3, 3, 6001))
    assert constant_cross_entropy(f) == pytest.approx(best, abs=1e-6)
    assert constant_cross_entropy(np.ones(3)) == 0


def test_pairs_cross_entropy_is_that_of_training():
    torch.manual_seed(0)
    y = torch.zeros(4, 6, dtype=torch.bool)
    for b, n in enumerate((3, 5, 2, 4)):
        y[b, 1 : 1 + n] = True
    d = torch.where(y, torch.randn(4, 6).double(), 0.0)
    logits = 0.3 + d.cumsum(1)
    steps = torch.stack([d.square().sum(1), y.sum(1).double()], 1).numpy()
    got = pairs_cross_entropy(logits[:, -1].numpy(), steps, np.array([[0, 2], [1, 3]]))
    assert got == pytest.approx(pairs_loss(logits, y).item() / 2)


def test_token_table_counts_responses_by_kind(case):
    judged, _, _, good_N = case
    counts = np.ones((2, VOCAB))
    for m in range(len(judged.token)):
        if judged.place[m] > 0:
            counts[int(1 - good_N[judged.row[m]]), judged.token[m]] += 1
    want = np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum())
    np.testing.assert_allclose(token_table(judged, good_N, VOCAB), want)


def test_mean_values_stop_with_the_response(case):
    judged, logits_M, _, good_N = case
    values = [
        sigmoid(logits_M[a:b])
        for a, b in zip(judged.offsets[:-1], judged.offsets[1:], strict=True)
        if a < b
    ]
    half = int(np.median([len(v) - 1 for v in values])) // 2
    assert mean_values(logits_M, judged, good_N) == pytest.approx(
        {
            "start": np.mean([v[0] for v in values]),
            "middle": np.mean([v[min(half, len(v) - 1)] for v in values]),
            "end": np.mean([v[-1] for v in values]),
            "good_share": np.mean(good_N[judged.has_response]),
        }
    )


def test_accuracy_beside_the_better_direction_of_length_and_with_its_error():
    scores = np.array([3.0, 1.0, 2.0, 2.0, 5.0, 4.0, 0.0, 1.0])
    lengths = np.array([10, 12, 11, 11, 9, 14, 8, 9.0])
    table = np.zeros(8)
    pairs = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])
    found = pair_figures(scores, lengths, table, pairs)
    assert found["pair_accuracy"] == 2.5 / 4
    assert found["length_only"] == 3.5 / 4  # shorter is better, one tie
    assert pair_figures(scores, lengths, table, pairs[:, ::-1])["length_only"] == 3.5 / 4
    assert found["token_table"] == 0.5
    assert found["standard_error"]["length_only"] == pytest.approx(np.std([0, 0, 0, 1]) / 2)
    assert pair_figures(scores, lengths, table, np.zeros((0, 2), int))["pair_accuracy"] is None


def test_report_of_a_critic_that_knows_the_turn(rows, case):
    judged, _, losses_M, good_N = case
    marked = np.asarray(judged.marked, bool)
    logits_M = np.where(marked, -6.0, 0.0) + np.linspace(0, 0.01, len(marked))
    table_V = token_table(judged, good_N, VOCAB)
    report = critic_report(judged, logits_M, losses_M, good_N, table_V, np.array([[0, 1], [3, 4]]))
    assert report["auc_spoiled"]["critic"] == 1
    assert report["turn"]["critic"] > report["turn"]["chance"]
    assert report["turn"]["rows"] == sum(
        1
        for a, b in zip(judged.offsets[:-1], judged.offsets[1:], strict=True)
        if b - a > 2 and marked[a:b].any()
    )
    assert (report["pair_accuracy"], report["auc"]) == (1, 1)
    assert report["rows"] == 57
    unmarked = Judged(judged.offsets, judged.first, judged.token, None)
    plain = critic_report(unmarked, logits_M, losses_M, good_N, table_V, np.zeros((0, 2), int))
    assert "auc_spoiled" not in plain
    assert plain["auc"] == 1


def test_what_a_useless_critic_lacks():
    good = {
        "cross_entropy": 0.5,
        "constant": 0.6,
        "pairs": 100,
        "pair_accuracy": 0.8,
        "length_only": 0.6,
        "token_table": 0.65,
        "standard_error": {"length_only": 0.05, "token_table": 0.05},
        "auc": 0.8,
        "auc_length": 0.6,
        "auc_token_table": 0.65,
        "rows": 400,
        "good_rows": 100,
    }
    assert shortcomings(good) == []
    (found,) = shortcomings(good | {"cross_entropy": 0.6})
    assert "is not below the best constant" in found
    (found,) = shortcomings(good | {"token_table": 0.701})  # by less than two standard errors
    assert "a table of token counts" in found
    (found,) = shortcomings(good | {"length_only": 0.75})
    assert "length alone" in found
    alone = good | {"pairs": 0, "pair_accuracy": None}
    assert shortcomings(alone) == []
    (found,) = shortcomings(alone | {"auc_token_table": 0.78})
    assert "AUC over 400 held-out responses" in found
    (found,) = shortcomings(alone | {"auc": None})
    assert "all good or all bad" in found


def test_auc_standard_error_is_hanley_and_mcneils():
    """Their example: AUC 0.893 with 51 abnormal and 58 normal cases has 0.0325."""
    assert auc_standard_error(0.893, 51, 58) == pytest.approx(0.0325, abs=1e-4)


def test_kappa_has_the_least_cross_entropy_and_is_not_negative():
    rng = np.random.default_rng(3)
    sums = rng.normal(size=5000) * 3
    good = (rng.random(5000) < sigmoid(-0.5 + 0.4 * sums)).astype(float)
    kappa = fit_kappa(sums, -0.5, good)
    assert kappa == pytest.approx(0.4, abs=0.03)
    for other in (kappa - 0.02, kappa + 0.02):
        assert cross_entropy(-0.5 + kappa * sums, good) < cross_entropy(-0.5 + other * sums, good)
    assert fit_kappa(-sums, -0.5, good) == 0
    assert np.isfinite(fit_kappa(np.sign(good - 0.5), 0.0, good))


def test_everything_is_printed(rows, case, capsys):
    judged, logits_M, losses_M, good_N = case
    table_V = token_table(judged, good_N, VOCAB)
    pairs = np.array([[0, 1], [3, 4]])
    report = critic_report(judged, logits_M, losses_M, good_N, table_V, pairs)
    hopeless = {"count": 4, "names": ["p1", "p2", "p3", "p4"]}
    print_report(report | {"pair_kind": "length", "hopeless_problems": hopeless})
    said = capsys.readouterr().out
    for words in (
        "57 held-out responses, 19 of them good",
        "2 pairs of like length",
        "token counts",
        "the largest fall of V hits",
        "4 problems of the policy have no good response (p1, p2, p3, ...)",
    ):
        assert words in said
    assert shortcomings(report)  # of random logits
    assert said.count("not enough for the gate") == len(shortcomings(report))
