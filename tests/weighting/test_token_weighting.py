"""The dispatcher: every weighting has mean 1, no gradient, and refuses wrong arguments."""

import pytest
import torch

from wmtp_modules.weighting.token_weighting import (
    TokenWeighting,
    gather_rows,
    own_rows,
    weight_stats,
)

NAMES = TokenWeighting.NAMES

VARIANTS = [{"name": name} for name in NAMES] + [
    {"name": "rho1", "selection": "soft"},
    {"name": "rho1", "score": "abs_excess"},
    {"name": "rho1", "scope": "document"},
    {"name": "shuffled", "selection": "soft"},
    {"name": "rho1", "strength": 0.3},
]


@pytest.fixture
def inputs(packed_case):
    losses_BTK, mask_BTK, doc_BT = packed_case(seed=0)
    losses_BTK = (losses_BTK.exp() * mask_BTK).requires_grad_()
    reference_BTK = torch.where(mask_BTK, packed_case(seed=1)[0].exp(), torch.nan)
    return losses_BTK, mask_BTK, doc_BT, reference_BTK


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_mean_one_no_gradient_nothing_outside_the_mask(variant, inputs):
    weighting = TokenWeighting(**variant)
    losses_BTK, mask_BTK, doc_BT, reference_BTK = inputs
    weights_BTK, stats = weighting(losses_BTK, mask_BTK, doc_BT, reference_BTK, step=0)
    assert weights_BTK.dtype == torch.float32
    assert not weights_BTK.requires_grad
    assert (weights_BTK[~mask_BTK] == 0).all()
    means_K = weights_BTK.double().sum((0, 1)) / mask_BTK.sum((0, 1))
    assert (means_K - 1).abs().max() < 1e-6
    torch.testing.assert_close(stats["mean"], means_K.float())
    assert all(v.shape == (4,) and not v.requires_grad for v in stats.values())


@pytest.mark.parametrize("name", NAMES)
def test_strength_zero_is_bitwise_uniform_and_strength_mixes(name, inputs):
    losses_BTK, mask_BTK, doc_BT, reference_BTK = inputs

    def weights(strength):
        weighting = TokenWeighting(name, strength=strength)
        return weighting(losses_BTK, mask_BTK, doc_BT, reference_BTK, step=0)[0]

    assert torch.equal(weights(0), mask_BTK.float())
    torch.testing.assert_close(weights(0.25), 0.75 * mask_BTK.float() + 0.25 * weights(1.0))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_empty_mask_gives_zeros_and_no_figures(variant, inputs):
    losses_BTK, mask_BTK, doc_BT, reference_BTK = inputs
    weights_BTK, stats = TokenWeighting(**variant)(
        losses_BTK * 0, torch.zeros_like(mask_BTK), doc_BT, reference_BTK, step=0
    )
    assert (weights_BTK == 0).all()
    assert (stats.pop("count") == 0).all()
    assert all(v.isnan().all() for v in stats.values())


@pytest.mark.parametrize("name", ["uniform", "random_topk"])
def test_weights_known_before_the_forward(name, inputs):
    weighting = TokenWeighting(name)
    losses_BTK, mask_BTK, doc_BT, reference_BTK = inputs
    assert not weighting.needs_losses
    assert not weighting.needs_scores
    before_BTK, _ = weighting(None, mask_BTK, doc_BT, None, step=7)
    after_BTK, _ = weighting(losses_BTK, mask_BTK, doc_BT, reference_BTK, step=7)
    assert torch.equal(before_BTK, after_BTK)


def test_random_topk_draws_anew_at_each_step(inputs):
    weighting = TokenWeighting("random_topk")
    _, mask_BTK, doc_BT, _ = inputs
    first, second = (weighting(None, mask_BTK, doc_BT, None, step=s)[0] for s in (0, 1))
    assert not torch.equal(first, second)


def test_top_loss_and_rho1_select_what_they_say(inputs):
    losses_BTK, mask_BTK, doc_BT, reference_BTK = inputs
    top_BTK, _ = TokenWeighting("top_loss")(losses_BTK, mask_BTK, doc_BT, None, step=0)
    rho1_BTK, _ = TokenWeighting("rho1")(losses_BTK, mask_BTK, doc_BT, reference_BTK, step=0)
    for weights_BTK, scores_BTK in ((top_BTK, losses_BTK), (rho1_BTK, losses_BTK - reference_BTK)):
        for k in range(4):
            valid_BT = mask_BTK[..., k]
            s_N, chosen_N = scores_BTK[..., k][valid_BT], weights_BTK[..., k][valid_BT] > 0
            assert chosen_N.sum() == round(0.6 * len(s_N))
            assert s_N[chosen_N].min() >= s_N[~chosen_N].max()
    assert not torch.equal(top_BTK, rho1_BTK)


def test_shuffled_selects_as_many_in_other_places(inputs):
    losses_BTK, mask_BTK, doc_BT, reference_BTK = inputs
    args = losses_BTK, mask_BTK, doc_BT, reference_BTK
    real_BTK, _ = TokenWeighting("rho1")(*args, step=0)
    shuffled_BTK, _ = TokenWeighting("shuffled")(*args, step=0)
    assert torch.equal((real_BTK > 0).sum((0, 1)), (shuffled_BTK > 0).sum((0, 1)))
    assert not torch.equal(real_BTK, shuffled_BTK)


def test_an_oracle_reads_the_mark_of_the_token_that_a_head_predicts(inputs):
    _, mask_BTK, doc_BT, _ = inputs
    marks_BT = torch.rand(doc_BT.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    weighting = TokenWeighting("oracle", w_max=1.1, ratio=0.1)
    assert weighting.needs_marks
    assert not weighting.needs_losses  # they are known before the forward
    weights_BTK, _ = weighting(None, mask_BTK, doc_BT, marks_BT, step=0)
    for b, t, k in mask_BTK.nonzero().tolist():
        assert (weights_BTK[b, t, k] == 0) == marks_BT[b, t + k + 1]
    for k in range(4):
        clean_N = weights_BTK[..., k][weights_BTK[..., k] > 0]
        assert (
            clean_N.min() == clean_N.max() == pytest.approx(mask_BTK[..., k].sum() / len(clean_N))
        )


def test_a_column_weighs_the_token_that_a_head_predicts(inputs):
    """Calibrated as every other: ratios as the data say them, mean 1, inside the bounds."""
    _, mask_BTK, doc_BT, _ = inputs
    generator = torch.Generator().manual_seed(3)
    raw_BT = torch.rand(doc_BT.shape, generator=generator) + 0.5
    weighting = TokenWeighting("column", w_min=0.0, w_max=50.0)
    assert weighting.needs_weights
    assert not weighting.needs_losses  # they are known before the forward
    weights_BTK, stats = weighting(None, mask_BTK, doc_BT, raw_BT, step=0)
    torch.testing.assert_close(stats["mean"], torch.ones(4))
    for k in range(4):
        mask_BT = mask_BTK[:, : -k - 1, k]
        ratio_N = (weights_BTK[:, : -k - 1, k] / raw_BT[:, k + 1 :])[mask_BT]
        torch.testing.assert_close(ratio_N, ratio_N[:1].expand_as(ratio_N))
    assert not weights_BTK[~mask_BTK].any()
    cut_BTK, _ = TokenWeighting("column", w_min=0.9, w_max=1.1)(
        None, mask_BTK, doc_BT, raw_BT, step=0
    )
    assert cut_BTK[mask_BTK].min() >= 0.9 - 1e-6
    assert cut_BTK.max() <= 1.1 + 1e-6
    equal_BTK, _ = TokenWeighting("column")(None, mask_BTK, doc_BT, raw_BT * 0 + 3, step=0)
    assert torch.equal(equal_BTK, mask_BTK.float())


def test_stats_by_hand():
    weights_BTK = torch.tensor([2.0, 2.0, 0.0, 0.0, 5.0, 0.0]).view(1, 6, 1)
    mask_BTK = torch.tensor([1, 1, 1, 1, 0, 0]).bool().view(1, 6, 1)
    stats = weight_stats(weights_BTK * mask_BTK, mask_BTK, 0.0, 2.0)
    assert {key: value.item() for key, value in stats.items()} == {
        "mean": 1.0,
        "ess": 0.5,
        "selected": 0.5,
        "low": 0.5,
        "high": 0.5,
        "at_min": 0.5,
        "at_max": 0.5,
        "count": 4.0,
    }


def test_one_process_gathers_nothing():
    x_BT = torch.randn(3, 4)
    assert gather_rows(x_BT) is x_BT
    assert torch.equal(own_rows(x_BT), x_BT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "rho"}, "weighting.name 'rho' is not one of uniform, random_topk"),
        ({"score": "ratio"}, "weighting.score 'ratio' is not one of excess, abs_excess"),
        ({"selection": "hard"}, "weighting.selection 'hard' is not one of topk, soft"),
        ({"scope": "world"}, "weighting.scope 'world' is not one of microbatch, rank, document"),
        ({"ratio": 0.0}, "weighting.ratio must be above 0 and at most 1, got 0.0"),
        ({"ratio": 1.5}, "weighting.ratio must be above 0 and at most 1, got 1.5"),
        ({"temperature": 0.0}, "weighting.temperature must be above 0, got 0.0"),
        ({"strength": 1.1}, "weighting.strength must be between 0 and 1, got 1.1"),
        ({"decay": 0.0}, "weighting.decay must be above 0, got 0.0"),
        ({"seed": -1}, "weighting.seed must be at least 0, got -1"),
        ({"w_min": 1.0}, "0 <= w_min < 1 < w_max"),
        ({"selection": "soft", "scope": "document"}, "set scope to 'microbatch'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenWeighting(**arguments)


@pytest.mark.parametrize(
    ("name", "what"),
    [("rho1", "scores"), ("oracle", "scores"), ("column", "scores"), ("dft", "losses")],
)
def test_missing_inputs_are_refused(name, what, inputs):
    losses_BTK, mask_BTK, doc_BT, _ = inputs
    with pytest.raises(ValueError, match=f"weighting '{name}' needs {what}"):
        TokenWeighting(name)(None if name == "dft" else losses_BTK, mask_BTK, doc_BT, None, step=0)


@pytest.mark.parametrize("name", TokenWeighting.NAMES)
@pytest.mark.parametrize(
    "how", [{}, {"selection": "soft"}, {"scope": "document"}, {"scope": "rank"}]
)
def test_no_weighting_waits_for_the_device(name, how, waits):
    weighting = TokenWeighting(name, **how)
    losses_BTK, scores_BTK = torch.rand(2, 8, 3), torch.rand(2, 8, 3)
    mask_BTK, doc_BT = torch.rand(2, 8, 3) > 0.3, torch.arange(8).expand(2, 8) // 3
    with waits() as found:
        weighting(losses_BTK, mask_BTK, doc_BT, scores_BTK, step=3)
    assert found == []


def test_what_waits_is_found(waits):
    """The test above can fail."""
    x = torch.rand(4)
    with waits() as found:
        if x.sum() > 9:
            x = x + 1
        float(x[0]), x[x > 0.5], x.tolist(), torch.where(x > 0.5)
    assert len(found) == 5
