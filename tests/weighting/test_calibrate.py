"""Calibrated weights: exact mean, bounds, order, and no token that poisons the others.

Of a micro-batch, and by one scale per head of a data set.
"""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_modules.weighting import calibrate as calibrate_module
from wmtp_modules.weighting.calibrate import calibrate, scaled_weights, solve_scale

BOUNDS = [(0.1, 5.0), (0.0, 3.0), (0.5, 1.2), (0.9, 50.0)]


def head_means(weights_BTK, mask_BTK):
    return weights_BTK.double().sum((0, 1)) / mask_BTK.sum((0, 1))


def random_case(seed, B=4, T=33, K=3, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    raw_BTK = torch.exp(scale * torch.randn(B, T, K, generator=generator))
    mask_BTK = torch.rand(B, T, K, generator=generator) < 0.7
    mask_BTK[0, 0] = True
    return raw_BTK, mask_BTK


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), bounds=st.sampled_from(BOUNDS), scale=st.floats(0.0, 20.0))
def test_mean_bounds_order_and_form(seed, bounds, scale):
    w_min, w_max = bounds
    raw_BTK, mask_BTK = random_case(seed, scale=scale)
    weights_BTK = calibrate(raw_BTK, mask_BTK, w_min, w_max)
    assert (head_means(weights_BTK, mask_BTK) - 1).abs().max() < 1e-6
    assert (weights_BTK[~mask_BTK] == 0).all()
    for k in range(raw_BTK.shape[2]):
        raw_N, w_N = (
            raw_BTK[..., k][mask_BTK[..., k]].double(),
            weights_BTK[..., k][mask_BTK[..., k]],
        )
        assert w_N.min() >= torch.tensor(w_min)
        assert w_N.max() <= torch.tensor(w_max)
        assert (w_N[raw_N.argsort()].diff() >= 0).all()
        inside_N = (w_N > w_min * 1.001) & (w_N < w_max * 0.999)
        if inside_N.any():  # one scalar c for the whole head
            c_N = w_N[inside_N].double() / raw_N[inside_N]
            assert (c_N / c_N[0] - 1).abs().max() < 1e-5


def test_equals_bisection():
    raw_BTK, mask_BTK = random_case(0)
    for w_min, w_max in BOUNDS:
        weights_BTK = calibrate(raw_BTK, mask_BTK, w_min, w_max)
        for k in range(raw_BTK.shape[2]):
            raw_N = raw_BTK[..., k][mask_BTK[..., k]].double()
            low, high = -50.0, 50.0
            for _ in range(80):
                middle = (low + high) / 2
                mean = (raw_N * torch.tensor(middle).double().exp()).clamp(w_min, w_max).mean()
                low, high = (low, middle) if mean > 1 else (middle, high)
            expected_N = (raw_N * torch.tensor(low).double().exp()).clamp(w_min, w_max)
            torch.testing.assert_close(
                weights_BTK[..., k][mask_BTK[..., k]], expected_N.float(), rtol=1e-6, atol=1e-7
            )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_permutation_equivariance_and_scale_invariance(seed):
    raw_BTK, mask_BTK = random_case(seed)
    weights_BTK = calibrate(raw_BTK, mask_BTK, 0.1, 5.0)
    order_T = torch.randperm(raw_BTK.shape[1], generator=torch.Generator().manual_seed(seed))
    permuted_BTK = calibrate(raw_BTK[:, order_T], mask_BTK[:, order_T], 0.1, 5.0)
    torch.testing.assert_close(permuted_BTK, weights_BTK[:, order_T], rtol=1e-6, atol=1e-7)
    scaled_BTK = calibrate(raw_BTK * torch.tensor([1e-9, 1.0, 1e9]), mask_BTK, 0.1, 5.0)
    torch.testing.assert_close(scaled_BTK, weights_BTK, rtol=1e-5, atol=1e-6)


def test_heads_are_independent():
    raw_BTK, mask_BTK = random_case(1)
    together_BTK = calibrate(raw_BTK, mask_BTK, 0.1, 5.0)
    for k in range(raw_BTK.shape[2]):
        alone_BT1 = calibrate(raw_BTK[..., k : k + 1], mask_BTK[..., k : k + 1], 0.1, 5.0)
        assert torch.equal(together_BTK[..., k : k + 1], alone_BT1)


def test_values_outside_the_mask_do_not_matter():
    raw_BTK, mask_BTK = random_case(2)
    weights_BTK = calibrate(raw_BTK, mask_BTK, 0.1, 5.0)
    for junk in (torch.nan, torch.inf, 1e30, -1.0):
        junk_BTK = torch.where(mask_BTK, raw_BTK, junk)
        assert torch.equal(calibrate(junk_BTK, mask_BTK, 0.1, 5.0), weights_BTK)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -1.0])
def test_a_bad_raw_weight_counts_as_zero(bad):
    raw_BTK, mask_BTK = random_case(3)
    raw_BTK[0, 0, 1] = 0.0
    weights_BTK = calibrate(raw_BTK, mask_BTK, 0.1, 5.0)
    assert weights_BTK[0, 0, 1] == torch.tensor(0.1)
    raw_BTK[0, 0, 1] = bad
    assert torch.equal(calibrate(raw_BTK, mask_BTK, 0.1, 5.0), weights_BTK)


def test_zeros_and_extreme_ratios_stay_feasible():
    mask_BTK = torch.ones(1, 100, 1, dtype=torch.bool)
    mostly_zero_BTK = torch.zeros(1, 100, 1)
    mostly_zero_BTK[0, :3, 0] = torch.tensor([1.0, 2.0, 3.0])
    # Three tokens at w_max = 5 give 15; the 97 zeros tie and share the rest.
    weights_T = calibrate(mostly_zero_BTK, mask_BTK, 0.1, 5.0)[0, :, 0]
    torch.testing.assert_close(weights_T[:3], torch.full((3,), 5.0))
    torch.testing.assert_close(weights_T[3:], torch.full((97,), 85 / 97))
    assert torch.equal(calibrate(torch.zeros(1, 100, 1), mask_BTK, 0.1, 5.0), mask_BTK.float())
    extreme_BTK = torch.logspace(-300, 300, 100, dtype=torch.float64).view(1, 100, 1)
    for w_min, w_max in BOUNDS:
        weights_BTK = calibrate(extreme_BTK, mask_BTK, w_min, w_max)
        assert (head_means(weights_BTK, mask_BTK) - 1).abs().max() < 1e-6


def test_empty_and_single_token_heads():
    raw_BTK, mask_BTK = random_case(4)
    mask_BTK[..., 1] = False
    mask_BTK[..., 2] = False
    mask_BTK[1, 2, 2] = True
    weights_BTK = calibrate(raw_BTK, mask_BTK, 0.1, 5.0)
    assert (weights_BTK[..., 1] == 0).all()
    assert weights_BTK[1, 2, 2] == 1
    assert weights_BTK[..., 2].sum() == 1


@pytest.mark.parametrize("bounds", [(-0.1, 5.0), (1.0, 5.0), (0.1, 1.0), (0.1, float("inf"))])
def test_bounds_without_solution_are_refused(bounds):
    raw_BTK, mask_BTK = random_case(5)
    with pytest.raises(ValueError, match="0 <= w_min < 1 < w_max"):
        calibrate(raw_BTK, mask_BTK, *bounds)


# --------------------------------------------------------------- one scale for a data set


def mean_of(c, log_raw_N, w_min, w_max):
    return (c * log_raw_N.double().exp()).clamp(w_min, w_max).mean().item()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bounds=st.sampled_from([*BOUNDS, (0.0, 20.0)]),
    scale=st.floats(0.0, 20.0),
    zeros=st.floats(0.0, 0.6),
)
def test_one_scale_gives_mean_one_over_a_data_set(seed, bounds, scale, zeros):
    generator = torch.Generator().manual_seed(seed)
    log_raw_N = scale * torch.randn(301, generator=generator)
    log_raw_N[torch.rand(301, generator=generator) < zeros] = -torch.inf
    first_K, (w_min, w_max) = [0, 40, 41, 300, 301], bounds
    if (log_raw_N[300:].isinf()).any() or w_max * (1 - zeros) < 1.3:
        return  # a mean of 1 is out of reach, see below
    calls = []
    got_K = solve_scale(
        log_raw_N, first_K, w_min, w_max, add_up=lambda sums: calls.append(1) or sums
    )
    for first, c in zip(first_K[:4], got_K, strict=False):
        assert mean_of(c, log_raw_N[first:], w_min, w_max) == pytest.approx(1, abs=1e-11)
    assert got_K[4] == 1  # a head without targets
    assert len(calls) < 150


def test_ranks_and_chunks_make_no_difference(monkeypatch):
    log_raw_N = torch.randn(90, generator=torch.Generator().manual_seed(1))
    log_raw_N[::7] = -torch.inf
    whole = solve_scale(log_raw_N, [0, 30], 0.0, 1.5)
    monkeypatch.setattr(calibrate_module, "CHUNK", 7)
    assert solve_scale(log_raw_N, [0, 30], 0.0, 1.5) == pytest.approx(whole, rel=1e-12)
    # Three ranks in step: a barrier adds up what each has, the last of them nothing.
    parts = [(log_raw_N[::2], [0, 15]), (log_raw_N[1::2], [0, 15]), (log_raw_N[:0], [0, 0])]
    assert solve_in_threads(parts, 0.0, 1.5) == [pytest.approx(whole, rel=1e-12)] * 3


def solve_in_threads(parts, w_min, w_max):
    barrier, given, results = threading.Barrier(len(parts)), {}, {}

    def rank(r):
        def add_up(sums):
            given[r] = sums
            barrier.wait(30)
            total = sum(given.values())
            barrier.wait(30)
            return total

        results[r] = solve_scale(*parts[r], w_min, w_max, add_up=add_up)

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[r] for r in range(len(parts))]


def test_a_scale_takes_few_passes():
    """A pass over 500 million tokens takes seconds."""
    log_raw_N = torch.rand(10_000, generator=torch.Generator().manual_seed(0)).log()
    calls = []
    for w_min, w_max in BOUNDS:
        solve_scale(log_raw_N, [0, 1, 2, 3], w_min, w_max, add_up=lambda s: calls.append(1) or s)
    assert len(calls) <= 10 * len(BOUNDS)


def test_too_many_zeros_are_an_error_with_a_way_out():
    log_raw_N = torch.full((100,), -torch.inf)
    log_raw_N[:4] = 0.0
    with pytest.raises(
        ValueError,
        match=r"96\.00% of head 0's 100 target tokens have a raw weight of 0.*w_max 20 .*"
        r"raise weighting\.w_max above 25, or train on more good responses",
    ):
        solve_scale(log_raw_N, [0], 0.0, 20.0)
    (c,) = solve_scale(log_raw_N, [0], 0.0, 25.5)
    assert c == pytest.approx(25)
    with pytest.raises(ValueError, match=r"100\.00% of head 1's 90 .*: train on more good"):
        solve_scale(log_raw_N, [0, 10], 0.0, 26.0)


def test_weights_of_a_scale():
    log_raw_BTK = torch.tensor([0.5, 2.0, 0.0, 9.0, 1.0]).log().view(1, 5, 1)
    mask_BTK = torch.tensor([1, 1, 1, 1, 0]).bool().view(1, 5, 1)
    weights_BTK = scaled_weights(log_raw_BTK, mask_BTK, [0.5], 0.0, 4.0)
    assert weights_BTK.flatten().tolist() == pytest.approx([0.25, 1.0, 0.0, 4.0, 0.0])
    assert weights_BTK.dtype == torch.float32
