"""What the weights of a critic are for, where V is exact and a model is a table of counts.

These hold the mathematics whatever a model can learn. The world is of benchmarks/tabular_critic.py,
the weights are the product's own. In the small world all responses are enumerated with their
probabilities, so that what holds in expectation holds to rounding.
"""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from wmtp_modules.loss.mtp_loss import shift_to_heads
from wmtp_modules.weighting.advantage import SCALED, log_raw_weights

HEADS = 3


@pytest.fixture(scope="module")
def tabular():
    """The benchmark's module; only what it measures is run there."""
    path = Path(__file__).parents[2] / "benchmarks" / "tabular_critic.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(tabular):
    """Every response of a world of three symbols: (world, tokens, probabilities, V)."""
    world = tabular.World(S=3, L=5, good=(0.4, 0.1), seed=3)
    x_NL = np.array(list(itertools.product(range(3), repeat=6)))
    return world, x_NL, world.probabilities(x_NL), world.values(x_NL)


def raw_of_heads(tabular, advantage, values_NL, K=HEADS):
    """The product's raw weights at the positions that predict, [N, L + 1, K]; 0 without target."""
    good_N = np.zeros(len(values_NL))
    log_raw_BT = log_raw_weights(*tabular.tensors(values_NL, good_N), advantage=advantage)
    return shift_to_heads(log_raw_BT, K, -torch.inf).exp().numpy()


def losses_of_heads(x_NL, K=HEADS, seed=0):
    """Some loss of every token for every head, which depends on the tokens up to it."""
    N, T = x_NL.shape
    rng, out = np.random.default_rng(seed), np.zeros((N, T, K))
    for k in range(K):
        table = rng.exponential(size=(3, 3, T))  # of context, target and place
        for t in range(T - k - 1):
            out[:, t, k] = table[x_NL[:, t], x_NL[:, t + k + 1], t]
    return out


def test_probabilities_and_the_value_of_a_whole_response(small):
    world, _, p_N, values_NL = small
    assert p_N.sum() == pytest.approx(1, abs=1e-12)
    assert (values_NL > 0).all()
    assert (values_NL < 1).all()
    assert np.unique(values_NL[:, 0]) == pytest.approx([0.1, 0.4])  # of the two kinds of prompts
    assert p_N @ values_NL[:, -1] == pytest.approx(world.good_share, abs=1e-12)


def test_the_value_is_a_martingale(small):
    """Its mean at any place is the share of good responses, and a step from any prefix has mean 0.

    At a response's end V is what is known of f(R), the chain's own or a label.
    """
    world, x_NL, p_N, values_NL = small
    np.testing.assert_allclose(p_N @ values_NL, world.good_share, atol=1e-12)
    for u in range(1, world.L + 1):
        prefix_N = (x_NL[:, :u] @ 3 ** np.arange(u)).astype(int)
        step_N = p_N * (values_NL[:, u] - values_NL[:, u - 1])
        assert np.abs(np.bincount(prefix_N, step_N)).max() < 1e-12


def test_value_has_the_filters_objective_for_every_head(tabular, small):
    """E[f(R) sum of losses] = E[sum of V[u] loss_u]: both seek the same model."""
    _, x_NL, p_N, values_NL = small
    losses_NTK, raw_NTK = losses_of_heads(x_NL), raw_of_heads(tabular, "value", values_NL)
    filtered_K = (p_N * values_NL[:, -1]) @ losses_NTK.sum(1)
    np.testing.assert_allclose(p_N @ (raw_NTK * losses_NTK).sum(1), filtered_K, rtol=1e-12)
    # A shift by one token, V before the token in the place of V after it, is noticed.
    before_NL = np.concatenate([values_NL[:, :1], values_NL[:, :-1]], 1)
    shifted_NTK = raw_of_heads(tabular, "value", before_NL)
    shifted_K = p_N @ (shifted_NTK * losses_NTK).sum(1)
    assert (np.abs(shifted_K / filtered_K - 1) > 0.005).all()


def test_value_weighs_what_is_known_and_nothing_later(tabular, small):
    """V after the next token has the same expectation, but equal prefixes would weigh unlike."""
    _, x_NL, _, values_NL = small
    raw_NT = raw_of_heads(tabular, "value", values_NL, 1)[..., 0]
    for u in range(1, 6):
        prefix_N = x_NL[:, : u + 1] @ 3 ** np.arange(u + 1)
        for prefix in np.unique(prefix_N):
            assert np.ptp(raw_NT[prefix_N == prefix, u - 1]) == 0
            if u < 5:
                assert np.ptp(raw_NT[prefix_N == prefix, u]) > 0


def conditionals(x_NL, weights_N, t, k):
    """Law of token t + k + 1 given tokens 0 to t, and weight of each: [prefixes, 3], [prefixes]."""
    prefix_N = x_NL[:, : t + 1] @ 3 ** np.arange(t + 1)
    joint = np.bincount(prefix_N * 3 + x_NL[:, t + k + 1], weights_N, minlength=3 ** (t + 2))
    joint = joint.reshape(-1, 3)
    return joint / joint.sum(1, keepdims=True), joint.sum(1)


@pytest.mark.parametrize("advantage", SCALED)
def test_what_each_advantage_teaches_each_head(tabular, small, advantage):
    """Head 0 learns the good responses' law at every prefix under all of them, later heads only
    under V[u], since V[u] / V[u - 1] reweighs the tokens between.

    relative is V[u] by a number of the prompt, which every head has seen.
    """
    _, x_NL, p_N, values_NL = small
    raw_NTK = raw_of_heads(tabular, advantage, values_NL)
    errors_K = np.zeros(HEADS)
    for k in range(HEADS):
        for t in range(5 - k):
            want, _ = conditionals(x_NL, p_N * values_NL[:, -1], t, k)
            got, _ = conditionals(x_NL, p_N * raw_NTK[:, t, k], t, k)
            errors_K[k] = max(errors_K[k], np.abs(got - want).max())
    assert errors_K[0] < 1e-12
    if advantage in ("value", "relative"):
        assert (errors_K < 1e-12).all()
    else:
        assert (errors_K[1:] > 0.01).all()


def test_prompts_weigh_alike_under_relative(tabular, small):
    """While value weighs them as the filter does, by how often they are answered well."""
    world, x_NL, p_N, values_NL = small
    for advantage, ratio in (("relative", 1.0), ("value", 4.0)):
        raw_NT = raw_of_heads(tabular, advantage, values_NL, 1)[..., 0]
        of_prompt = np.bincount(x_NL[:, 0], p_N * raw_NT.sum(1))
        assert of_prompt[[0, 2]] / of_prompt[1] == pytest.approx([ratio, ratio])
    assert world.good_S.tolist() == [0.4, 0.1, 0.4]


def test_a_sample_of_both_objectives_agrees_within_its_standard_error(tabular):
    """And the bound is tight enough that V before the token would fail by far."""
    world = tabular.World()
    rng = np.random.default_rng(0)
    x_NL, spoiled_NL = world.sample(20_000, rng)
    values_NL, good_N = world.values(x_NL), ~spoiled_NL[:, -1]
    losses_NL = -np.log(world.chain_SS[x_NL[:, :-1], x_NL[:, 1:]])

    def z(weights_NL):
        difference_N = ((good_N[:, None] - weights_NL) * losses_NL).sum(1)
        return difference_N.mean() / (difference_N.std() / len(difference_N) ** 0.5)

    raw_NT = raw_of_heads(tabular, "value", values_NL, 1)[:, :-1, 0]
    assert abs(z(raw_NT)) < 3
    assert abs(z(values_NL[:, :-1])) > 10
    filtered_N, weighted_N = (good_N[:, None] * losses_NL).sum(1), (raw_NT * losses_NL).sum(1)
    assert weighted_N.std() < 0.8 * filtered_N.std()  # what the critic is for


@pytest.mark.parametrize(("N", "seeds"), [(100, 24), (1000, 8), (5000, 3)])
def test_value_beats_the_filter_and_both_beat_uniform(tabular, N, seeds):
    """At every size, each by more than four standard errors of the paired difference."""
    names = ("uniform", "good only", "value", "gae", "old formula on good")
    if N == 5000:
        names = names[:3]
    found = tabular.excesses(tabular.World(), N, seeds, names)

    def is_below(low, high):
        difference = found[high] - found[low]
        return difference.mean() > 4 * difference.std(ddof=1) / seeds**0.5

    assert is_below("value", "good only")
    assert found["value"].mean() < 0.6 * found["good only"].mean()
    assert is_below("value", "uniform")
    assert is_below("good only", "uniform") or N == 100
    assert found["good only"].mean() < found["uniform"].mean()
    if N == 1000:  # what was wrong before, and what stays for comparison
        assert is_below("good only", "old formula on good")
        assert is_below("good only", "gae")
