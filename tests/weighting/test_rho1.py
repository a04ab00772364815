"""Top-k and soft selection against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_modules.weighting.rho1 import (
    _sum_K,
    excess_scores,
    scope_ids,
    soft_weights,
    topk_weights,
)


def random_case(seed, B=4, T=17, K=3, ties=False):
    generator = torch.Generator().manual_seed(seed)
    scores_BTK = torch.randn(B, T, K, generator=generator)
    if ties:
        scores_BTK = scores_BTK.round()
    mask_BTK = torch.rand(B, T, K, generator=generator) < 0.6
    doc_BT = torch.randint(0, 2, (B, T), generator=generator).cumsum(1).clamp(max=4)
    doc_BT[:, -2:] = -1
    mask_BTK &= (doc_BT >= 0)[..., None]
    return scores_BTK, mask_BTK, doc_BT


def group_of(scope, doc_BT, world, b, t):
    return {"microbatch": 0, "rank": b % world, "document": (b, int(doc_BT[b, t]))}[scope]


def topk_by_loop(scores_BTK, mask_BTK, ratio, scope, doc_BT, world):
    weights_BTK = torch.zeros_like(scores_BTK)
    B, T, K = scores_BTK.shape
    for k in range(K):
        groups = {}
        for b in range(B):
            for t in range(T):
                if mask_BTK[b, t, k]:
                    groups.setdefault(group_of(scope, doc_BT, world, b, t), []).append((b, t))
        for places in groups.values():
            n = len(places)
            m = min(n, max(1, round(ratio * n)))
            best = sorted(places, key=lambda bt: (-float(scores_BTK[bt[0], bt[1], k]), bt))[:m]
            for b, t in best:
                weights_BTK[b, t, k] = n / m
    return weights_BTK


@pytest.mark.parametrize("scope", ["microbatch", "rank", "document"])
@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.6, 1.0])
def test_topk_equals_loop(scope, ratio):
    for seed in range(3):
        scores_BTK, mask_BTK, doc_BT = random_case(seed, ties=seed > 0)
        weights_BTK = topk_weights(scores_BTK, mask_BTK, ratio, scope_ids(scope, doc_BT, 2))
        expected_BTK = topk_by_loop(scores_BTK, mask_BTK, ratio, scope, doc_BT, 2)
        assert torch.equal(weights_BTK, expected_BTK)


def test_topk_ties_go_to_the_first():
    mask_BTK = torch.ones(2, 5, 1, dtype=torch.bool)
    mask_BTK[0, 0] = False
    weights_BTK = topk_weights(
        torch.zeros(2, 5, 1), mask_BTK, 0.5, torch.zeros(2, 5, dtype=torch.int64)
    )
    # 9 valid, round(4.5) = 4 selected: the four of the first row
    assert torch.equal(weights_BTK.squeeze(-1)[0], torch.tensor([0, 1, 1, 1, 1]) * 9 / 4)
    assert (weights_BTK[1] == 0).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), ratio=st.floats(0.01, 1.0))
def test_topk_mean_is_one_in_every_scope(seed, ratio):
    scores_BTK, mask_BTK, doc_BT = random_case(seed)
    for scope in ("microbatch", "rank", "document"):
        scope_BT = scope_ids(scope, doc_BT, 2)
        weights_BTK = topk_weights(scores_BTK, mask_BTK, ratio, scope_BT)
        for s in scope_BT.unique():
            for k in range(3):
                valid_N = mask_BTK[..., k] & (scope_BT == s)
                if valid_N.any():
                    assert abs(weights_BTK[..., k][valid_N].double().mean() - 1) < 1e-6
        assert (weights_BTK[~mask_BTK] == 0).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_permutation_equivariance(seed):
    scores_BTK, mask_BTK, doc_BT = random_case(seed)
    scope_BT = scope_ids("microbatch", doc_BT, 1)
    order_T = torch.randperm(17, generator=torch.Generator().manual_seed(seed))
    permuted = scores_BTK[:, order_T], mask_BTK[:, order_T]
    assert torch.equal(
        topk_weights(*permuted, 0.6, scope_BT),
        topk_weights(scores_BTK, mask_BTK, 0.6, scope_BT)[:, order_T],
    )
    torch.testing.assert_close(
        soft_weights(*permuted, 1.0, 0.1, 5.0),
        soft_weights(scores_BTK, mask_BTK, 1.0, 0.1, 5.0)[:, order_T],
        rtol=1e-6,
        atol=1e-7,
    )


def test_bad_scores_rank_last_and_masked_ones_do_not_matter():
    scores_BTK, mask_BTK, doc_BT = random_case(1)
    scope_BT = scope_ids("microbatch", doc_BT, 1)
    junk_BTK = torch.where(mask_BTK, scores_BTK, torch.nan)
    assert torch.equal(
        topk_weights(junk_BTK, mask_BTK, 0.6, scope_BT),
        topk_weights(scores_BTK, mask_BTK, 0.6, scope_BT),
    )
    assert torch.equal(
        soft_weights(junk_BTK, mask_BTK, 1.0, 0.1, 5.0),
        soft_weights(scores_BTK, mask_BTK, 1.0, 0.1, 5.0),
    )
    b, t, _ = mask_BTK.nonzero()[0]
    mask_BTK[b, t] = True
    scores_BTK[b, t] = torch.nan
    assert (topk_weights(scores_BTK, mask_BTK, 0.9, scope_BT)[b, t] == 0).all()
    soft_BTK = soft_weights(scores_BTK, mask_BTK, 1.0, 0.1, 5.0)
    assert (soft_BTK[b, t] == torch.tensor(0.1)).all()
    assert soft_BTK.isfinite().all()
    # the others' relative weights are those they have without it
    mask_BTK[b, t] = False
    without_BTK = soft_weights(scores_BTK, mask_BTK, 1.0, 0.1, 5.0)
    inside_BTK = mask_BTK & (soft_BTK > 0.101) & (soft_BTK < 4.9) & (without_BTK < 4.9)
    ratio_N = (soft_BTK / without_BTK)[..., 0][inside_BTK[..., 0]]
    torch.testing.assert_close(ratio_N, ratio_N[:1].expand_as(ratio_N), rtol=1e-5, atol=0)


def test_soft_follows_its_formula():
    scores_BTK, mask_BTK, _ = random_case(2)
    scores_BTK[0, 0, 0] = 40.0
    mask_BTK[0, 0, 0] = True
    weights_BTK = soft_weights(scores_BTK, mask_BTK, 2.0, 0.0, 1000.0)
    for k in range(3):
        s_N = scores_BTK[..., k][mask_BTK[..., k]].double()
        z_N = ((s_N - s_N.mean()) / (s_N.std(correction=0) + 1e-6)).clamp(-5, 5)
        raw_N = (z_N / 2.0).exp()
        torch.testing.assert_close(
            weights_BTK[..., k][mask_BTK[..., k]], (raw_N / raw_N.mean()).float()
        )
    assert weights_BTK[0, 0, 0] == weights_BTK[..., 0].max()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50), temperature=st.floats(0.01, 10))
def test_soft_ignores_a_shift_of_a_head_and_keeps_order(seed, shift, temperature):
    scores_BTK, mask_BTK, _ = random_case(seed)
    weights_BTK = soft_weights(scores_BTK.double(), mask_BTK, temperature, 0.1, 5.0)
    shifted_BTK = scores_BTK.double() + shift * torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(
        soft_weights(shifted_BTK, mask_BTK, temperature, 0.1, 5.0),
        weights_BTK,
        rtol=1e-5,
        atol=1e-6,
    )
    for k in range(3):
        valid_BT = mask_BTK[..., k]
        w_N = weights_BTK[..., k][valid_BT][scores_BTK[..., k][valid_BT].argsort()]
        assert (w_N.diff() >= 0).all()
        assert abs(w_N.double().mean() - 1) < 1e-6


def test_excess_is_signed_and_without_gradient():
    losses_BTK = torch.tensor([[[1.0, 3.0]]], requires_grad=True)
    reference_BTK = torch.tensor([[[2.0, 0.5]]])
    assert excess_scores(losses_BTK, reference_BTK).tolist() == [[[-1.0, 2.5]]]
    assert excess_scores(losses_BTK, reference_BTK, "abs_excess").tolist() == [[[1.0, 2.5]]]
    assert not excess_scores(losses_BTK, reference_BTK).requires_grad


@pytest.mark.parametrize("temperature", [0.01, 0.003, 1e-6])
def test_soft_at_a_low_temperature_goes_to_the_largest_scores(temperature):
    """The second largest gets what is left of the sum, not a tenth of it, nor everyone 1."""
    scores_BTK = torch.stack([torch.arange(10.0), -1000 * torch.arange(10.0)], -1)[None]
    mask_BTK = torch.ones(1, 10, 2, dtype=torch.bool)
    weights_BTK = soft_weights(scores_BTK, mask_BTK, temperature, 0.1, 5.0)
    expected_T = torch.tensor([0.1] * 8 + [4.2, 5.0])
    torch.testing.assert_close(weights_BTK[0, :, 0], expected_T)
    torch.testing.assert_close(weights_BTK[0, :, 1], expected_T.flip(0))


def test_soft_at_a_low_temperature_keeps_order_far_below_the_largest():
    """Ten standard deviations at temperature 0.001 are 10,000 nats, more than fp64 can hold."""
    scores_BTK = torch.randn(1, 1000, 1, generator=torch.Generator().manual_seed(0))
    mask_BTK = torch.ones(1, 1000, 1, dtype=torch.bool)
    weights_N = soft_weights(scores_BTK, mask_BTK, 0.001, 0.0, 5.0).flatten()
    largest_N = scores_BTK.flatten().argsort(descending=True)
    torch.testing.assert_close(weights_N[largest_N[:199]], torch.full((199,), 5.0))
    torch.testing.assert_close(weights_N[largest_N[199:210]].sum(), torch.tensor(5.0))


def test_statistics_of_a_head_do_not_depend_on_how_many_there_are():
    """To the bit, as ``extra_heads: isolated`` promises; rounding would hide it in weights."""
    x_BTK = torch.randn(7, 333, 5, generator=torch.Generator().manual_seed(0)).double() / 3
    for k in range(1, 5):
        assert torch.equal(_sum_K(x_BTK)[:k], _sum_K(x_BTK[..., :k].clone()))
