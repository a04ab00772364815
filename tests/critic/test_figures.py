"""Figures of a critic, against loops over their definition."""

import numpy as np
import pytest
import torch

from wmtp_modules.critic.figures import (
    constant_value_loss,
    critic_report,
    fit_affine,
    length_only_accuracy,
    near_marks,
    pairwise_loss_of,
    shortcomings,
    value_loss_of,
)
from wmtp_modules.loss.value_loss import (
    response_mask,
    value_sums,
)


def test_length_only_takes_the_better_direction_and_halves_ties():
    lengths = np.array([10, 12, 11, 11, 9, 14, 8, 9])
    pairs = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])  # shorter is better thrice, one tie
    assert length_only_accuracy(lengths, pairs) == 3.5 / 4
    assert length_only_accuracy(lengths, pairs[:, ::-1]) == 3.5 / 4


@pytest.fixture
def valued():
    """Values of 40 rows of up to 12 tokens, their masks, sums and rewards."""
    rng = np.random.default_rng(1)
    values = torch.from_numpy(rng.normal(size=(40, 12)))
    keep = torch.from_numpy(rng.random((40, 12)) < 0.7)
    keep[5] = False
    y = response_mask(keep, torch.zeros(40, 12))
    rewards = rng.normal(size=40)
    return values, y, value_sums(values, y).numpy(), rewards


def tokens_of(values, y, rewards):
    pairs = [(float(values[b, u - 1]), rewards[b]) for b, u in y.nonzero().tolist()]
    return np.array(pairs).T


def test_value_loss_and_best_constant(valued):
    values, y, sums, rewards = valued
    v, r = tokens_of(values, y, rewards)
    assert value_loss_of(sums, rewards) == pytest.approx((0.5 * (v - r) ** 2).mean())
    constant = min((0.5 * (c - r) ** 2).mean() for c in np.linspace(-1, 1, 2001))
    assert constant_value_loss(sums[:, 0], rewards) == pytest.approx(constant, abs=1e-6)


def test_affine_fit_is_least_squares(valued):
    values, y, sums, rewards = valued
    v, r = tokens_of(values, y, rewards)
    slope, shift = fit_affine(sums, rewards)
    assert (slope, shift) == pytest.approx(np.polyfit(v, r, 1), rel=1e-6)
    flat = sums * [1, 0, 0]
    assert fit_affine(flat, rewards)[0] == 0


def test_pairwise_loss_of_sums(valued):
    values, y, sums, _ = valued
    pairs = np.array([[0, 1], [2, 3]])
    means = [float(values[b, :-1][y[b, 1:]].mean()) for b in range(4)]
    expected = np.mean(
        [np.log1p(np.exp(means[1] - means[0])), np.log1p(np.exp(means[3] - means[2]))]
    )
    assert pairwise_loss_of(sums, pairs) == pytest.approx(expected)


def perfect(n=60):
    """Rows of ten tokens whose value is the reward itself, in pairs."""
    rewards = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    sums = np.stack([np.full(n, 10.0), 10 * rewards, 10 * rewards**2], 1)
    return sums, rewards, np.arange(n).reshape(-1, 2)


def test_report_of_a_perfect_and_of_an_ignorant_critic():
    sums, rewards, pairs = perfect()
    report = critic_report(sums, rewards, pairs)
    assert report["pair_accuracy"] == 1
    assert report["auc"] == 1
    assert report["length_only"] == 0.5
    assert report["value_loss"] == pytest.approx(0)
    assert report["constant_value_loss"] == pytest.approx(0.5)
    assert shortcomings(report, "regression") == []
    ignorant = critic_report(sums * [1, 0, 0], rewards, pairs)
    assert ignorant["pair_accuracy"] == 0.5
    found = shortcomings(ignorant, "regression")
    assert len(found) == 2
    assert "not below the best constant's 0.5000" in found[0]
    assert "within 30 held-out pairs is not above 0.500" in found[1]
    assert shortcomings(ignorant, "pairwise") == found[1:]


def test_a_critic_that_only_knows_length_is_of_no_use():
    """Its accuracy equals that of length; values otherwise fit."""
    sums, rewards, pairs = perfect()
    sums[::2] *= 1.1  # better responses are longer
    report = critic_report(sums, rewards, pairs)
    assert report["length_only"] == 1
    (found,) = shortcomings(report, "pairwise")
    assert "length alone" in found


def test_without_pairs_value_loss_decides():
    sums, rewards, _ = perfect()
    report = critic_report(sums, rewards, np.zeros((0, 2), np.int64))
    assert report["pair_accuracy"] is None
    assert report["length_only"] is None
    assert shortcomings(report, "regression") == []


def test_near_marks_leaves_the_last_token_out():
    y = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]).bool().expand(3, -1)
    marks = torch.zeros(3, 12, dtype=torch.bool)
    marks[0, 3] = marks[1, 3] = True  # row 2 has no mark
    delta = torch.zeros(3, 12)
    delta[:, 11] = 100  # the reward is paid out there
    delta[0, 6], delta[1, 7] = -1, -1
    hits, chance, rows = near_marks(delta, y, marks)
    assert (hits, rows) == (1, 2)
    # places 1..10; near 3 are 1..6
    assert chance == pytest.approx(2 * 6 / 10)
