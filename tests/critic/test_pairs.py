"""Pairs are of one problem, like length and unlike reward; joint batches cover an epoch."""

import numpy as np
import pytest
from datasets import Dataset

from wmtp_modules.critic.pairs import (
    LENGTH_BIN,
    heldout_pairs,
    hopeless_problems,
    joint_batch,
    make_pairs,
    training_items,
)
from wmtp_modules.critic.rewards import Responses


def test_pairs_are_of_one_problem_like_length_and_unlike_reward():
    rng = np.random.default_rng(0)
    n = 300
    lengths, rewards = rng.integers(10, 60, n), rng.integers(0, 2, n).astype(float)
    problems = [f"p{i}" for i in rng.integers(0, 20, n)]
    pairs = make_pairs(lengths, rewards, problems, seed=3)
    assert len(pairs) > 50
    assert len(np.unique(pairs)) == pairs.size  # each response in one pair at most
    for better, worse in pairs:
        assert problems[better] == problems[worse]
        assert rewards[better] > rewards[worse]
        longer, shorter = max(lengths[[better, worse]]), min(lengths[[better, worse]])
        assert longer / shorter < LENGTH_BIN
    again = make_pairs(lengths, rewards, problems, seed=3)
    np.testing.assert_array_equal(pairs, again)
    assert not np.array_equal(pairs, make_pairs(lengths, rewards, problems, seed=4))


def test_as_many_pairs_as_a_problem_has_of_the_rarer_kind():
    rewards = np.array([1.0, 1, 1, 0, 0, 1])
    pairs = make_pairs(np.full(6, 20), rewards, ["p"] * 5 + ["q"], seed=0)
    assert len(pairs) == 2
    graded = make_pairs(np.full(4, 20), np.array([0.1, 0.4, 0.2, 0.3]), ["p"] * 4, seed=0)
    assert sorted(map(tuple, graded.tolist())) == [(1, 0), (3, 2)]


@pytest.mark.parametrize(
    ("lengths", "problems"),
    [([20, 20], [None, None]), ([20, 60], ["p", "p"]), ([0, 0], ["p", "p"]), ([9, 9], ["p", "q"])],
)
def test_no_pair_without_problem_or_like_length_or_response(lengths, problems):
    pairs = make_pairs(np.array(lengths), np.array([1.0, 0.0]), problems, seed=0)
    assert pairs.shape == (0, 2)


def test_joint_batches_cover_an_epoch_in_any_world_size():
    seen = [joint_batch(10, 3, step, seed=1) for step in range(3)]
    assert len(set(np.concatenate(seen).tolist())) == 9
    assert not np.array_equal(joint_batch(10, 3, 3, seed=1), seen[0])
    np.testing.assert_array_equal(joint_batch(10, 3, 1, seed=1), seen[1])
    with pytest.raises(ValueError, match="there are 2 to train the critic on, fewer than"):
        joint_batch(2, 3, 0, seed=1)


def responses(problems, good, lengths=None):
    lengths = lengths or [10] * len(good)
    keep = [[False, False, *([True] * n)] for n in lengths]
    columns = {"keep": keep} | ({"problem_id": problems} if problems else {})
    return Responses(Dataset.from_dict(columns), good=np.array(good, float))


def test_what_each_objective_learns_from():
    train = responses(["p", "p", "q", "q"], [1, 0, 1, 1], [10, 10, 10, 0])
    heldout = responses(["p", "p"], [0, 1])
    items, pairs = training_items(train, objective="bce", seed=0), heldout_pairs(heldout, seed=0)
    assert items.tolist() == [[0], [1], [2]]  # row 3 has no response
    assert (pairs.rows_P2.tolist(), pairs.kind) == ([[1, 0]], "problem")
    assert training_items(train, objective="pairs", seed=0).tolist() == [[0, 1]]


def test_without_pairs_of_a_problem_they_are_of_like_length():
    train = responses(None, [1, 0, 0])
    heldout = responses(None, [0, 1, 0, 1, 0], [10, 11, 10, 60, 10])
    pairs = heldout_pairs(heldout, seed=0)
    ((better, worse),) = pairs.rows_P2
    assert (better, worse in (0, 2, 4), pairs.kind) == (1, True, "length")
    with pytest.raises(
        ValueError, match=r"^no two responses that the critic learns from are to one problem"
    ):
        training_items(train, objective="pairs", seed=0)


def test_problems_whose_responses_are_all_bad_are_named():
    train = responses(["p", "p", "q", "r", "r"], [1, 0, 0, 0.5, 0.2])
    assert hopeless_problems(train) == {"count": 2, "names": ["q", "r"]}
    assert hopeless_problems(responses(None, [0, 0])) == {"count": 0, "names": []}
