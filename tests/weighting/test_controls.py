"""The controls differ from Rho-1 in one thing only."""

import pytest
import torch

from wmtp_modules.weighting.calibrate import calibrate
from wmtp_modules.weighting.controls import dft_weights, oracle_weights, random_keys, shuffle_scores


def keys(step=0, seed=0, B=3, T=40):
    return random_keys(B, T, seed=seed, step=step, device=torch.device("cpu"))


def test_shuffle_keeps_each_documents_scores_and_moves_them(packed_case):
    scores_BTK, mask_BTK, doc_BT = packed_case()
    shuffled_BTK = shuffle_scores(scores_BTK, mask_BTK, doc_BT, keys())
    for b in range(3):
        for d in doc_BT[b].unique():
            for k in range(4):
                valid_T = mask_BTK[b, :, k] & (doc_BT[b] == d)
                before, after = scores_BTK[b, valid_T, k], shuffled_BTK[b, valid_T, k]
                assert torch.equal(before.sort().values, after.sort().values)
    moved = (shuffled_BTK != scores_BTK)[mask_BTK].float().mean()
    assert moved > 0.6


def test_shuffle_is_one_permutation_of_target_tokens():
    B, T, K = 1, 30, 4
    doc_BT = torch.zeros(B, T, dtype=torch.int64)
    mask_BTK = torch.zeros(B, T, K, dtype=torch.bool)
    target_T = torch.arange(T)
    scores_BTK = torch.stack([(target_T + k + 1).float() for k in range(K)], -1)[None]
    supervised = torch.arange(T) >= 10  # behind a prompt every head has the same targets
    for k in range(K):
        mask_BTK[0, : T - k - 1, k] = supervised[k + 1 :]
    keys_BT = keys(B=B, T=T)
    shuffled_BTK = shuffle_scores(scores_BTK, mask_BTK, doc_BT, keys_BT)
    # A score names its target: each head must see the targets in the order of their keys.
    expected = (keys_BT[0, 10:].argsort() + 10).tolist()
    for k in range(K):
        assert shuffled_BTK[0, mask_BTK[0, :, k], k].tolist() == expected


def test_shuffle_ignores_what_is_masked(packed_case):
    scores_BTK, mask_BTK, doc_BT = packed_case()
    shuffled_BTK = shuffle_scores(scores_BTK, mask_BTK, doc_BT, keys())
    junk_BTK = torch.where(mask_BTK, scores_BTK, torch.nan)
    again_BTK = shuffle_scores(junk_BTK, mask_BTK, doc_BT, keys())
    assert torch.equal(again_BTK[mask_BTK], shuffled_BTK[mask_BTK])


def test_random_keys_depend_on_seed_and_step_only():
    assert torch.equal(keys(step=3, seed=1), keys(step=3, seed=1))
    assert not torch.equal(keys(step=3, seed=1), keys(step=1, seed=3))
    assert not torch.equal(keys(step=3, seed=1), keys(step=4, seed=1))


def test_dft_is_the_calibrated_probability_also_where_fp32_underflows(packed_case):
    losses_BTK, mask_BTK, _ = packed_case()
    losses_BTK = losses_BTK.abs()
    assert torch.allclose(
        dft_weights(losses_BTK, mask_BTK, 0.1, 5.0),
        calibrate((-losses_BTK).exp(), mask_BTK, 0.1, 5.0),
        atol=1e-6,
    )
    # exp(-200) is 0 in fp32; only differences of the losses may matter
    torch.testing.assert_close(
        dft_weights(losses_BTK + 200, mask_BTK, 0.1, 5.0),
        dft_weights(losses_BTK, mask_BTK, 0.1, 5.0),
        rtol=1e-3,
        atol=1e-4,
    )


def test_dft_weights_where_no_probability_fits_a_float():
    losses_BTK = torch.tensor([800.0, 801.0, 802.0, 900.0]).view(1, 4, 1)
    mask_BTK = torch.ones(1, 4, 1, dtype=torch.bool)
    weights_BTK = dft_weights(losses_BTK, mask_BTK, 0.0, 100.0)
    expected_BTK = dft_weights(losses_BTK - 800, mask_BTK, 0.0, 100.0)
    torch.testing.assert_close(weights_BTK, expected_BTK)
    assert weights_BTK[0, 0] > 2 * weights_BTK[0, 1] > weights_BTK[0, 2]


@pytest.mark.parametrize("share", [0.0, 0.4, 0.95])
def test_an_oracle_gives_marked_targets_nothing_and_all_others_the_same(packed_case, share):
    """At 95 % they weigh 20, far above the bounds of a weighting by scores."""
    _, mask_BTK, _ = packed_case(B=8)
    generator = torch.Generator().manual_seed(1)
    marks_BTK = torch.rand(mask_BTK.shape, generator=generator) < share
    weights_BTK = oracle_weights(marks_BTK, mask_BTK)
    n_K = mask_BTK.sum((0, 1))
    clean_K = (mask_BTK & ~marks_BTK).sum((0, 1))
    expected_BTK = (n_K / clean_K) * (mask_BTK & ~marks_BTK)
    torch.testing.assert_close(weights_BTK, expected_BTK, rtol=1e-6, atol=0)


def test_an_oracle_of_a_head_whose_targets_are_all_marked_is_uniform(packed_case):
    _, mask_BTK, _ = packed_case()
    marks_BTK = torch.zeros_like(mask_BTK)
    marks_BTK[..., 2] = True
    weights_BTK = oracle_weights(marks_BTK, mask_BTK)
    assert torch.equal(weights_BTK, mask_BTK.float())
