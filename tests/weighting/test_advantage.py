"""Advantages against the plain loop and their identities; weights against their definition."""

import math

import pytest
import torch

from wmtp_modules.loss.mtp_loss import shift_to_heads
from wmtp_modules.loss.value_loss import response_mask
from wmtp_modules.weighting.advantage import (
    ADVANTAGES,
    SCALED,
    CriticWeighting,
    advantages,
    check_one_response,
    log_raw_weights,
    standardise,
    values_at_start,
)
from wmtp_modules.weighting.calibrate import solve_scale


@pytest.fixture
def packed():
    """Documents with prompts of different lengths, one without a response, one without a prompt
    but for its first token, and padding; values are random everywhere."""
    lengths = [(3, 5), (1, 4), (6, 0), (2, 1), (4, 9)]  # prompt, response
    B, T = 2, 40
    keep, doc = torch.zeros(B, T, dtype=torch.bool), torch.full((B, T), -1)
    for b, documents in enumerate((lengths, lengths[::-1])):
        at = 0
        for d, (prompt, response) in enumerate(documents):
            doc[b, at : at + prompt + response] = d
            keep[b, at + prompt : at + prompt + response] = True
            at += prompt + response
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(B, T, generator=generator)
    values[doc < 0] = torch.nan  # as packs have it
    good_of = torch.rand(B, len(lengths), generator=generator)
    return values, good_of.gather(1, doc.clamp(min=0)), keep, doc


def plain_loop(values, good, keep, doc, lam):
    """From the definition, token by token; also the temporal differences and the ends."""
    B, T = keep.shape
    a, delta = torch.zeros(B, T).double(), torch.zeros(B, T).double()
    for b in range(B):
        y = [bool(keep[b, u] and u >= 1 and doc[b, u] == doc[b, u - 1]) for u in range(T)]
        for u in reversed(range(T)):
            if not y[u]:
                continue
            end = u + 1 == T or not y[u + 1] or doc[b, u + 1] != doc[b, u]
            following = float(good[b, u]) if end else float(values[b, u])
            delta[b, u] = following - float(values[b, u - 1])
            a[b, u] = delta[b, u] + (0.0 if end else lam * float(a[b, u + 1]))
    return a, delta


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_advantages_equal_the_plain_loop(packed, lam):
    expected, delta = plain_loop(*packed, lam)
    torch.testing.assert_close(advantages(*packed, lam=lam), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(advantages(*packed, lam=0.0), delta, atol=1e-6, rtol=0)


def test_long_rows_equal_the_plain_loop():
    generator = torch.Generator().manual_seed(1)
    T = 1000  # no power of two
    doc = (torch.rand(3, T, generator=generator) < 0.004).long().cumsum(1)
    keep = torch.ones(3, T, dtype=torch.bool)
    case = (torch.randn(3, T, generator=generator), torch.randn(3, T, generator=generator))
    expected, _ = plain_loop(*case, keep, doc, 0.95)
    torch.testing.assert_close(advantages(*case, keep, doc, lam=0.95), expected, atol=1e-6, rtol=0)


def test_lambda_one_is_what_is_wanted_minus_value(packed):
    values, good, keep, doc = packed
    y = response_mask(keep, doc)
    before = torch.nn.functional.pad(values[:, :-1], (1, 0))
    a = advantages(*packed, lam=1.0)
    torch.testing.assert_close(a[y], (good - before)[y].double(), atol=1e-6, rtol=0)
    assert (a[~y] == 0).all()


def test_deltas_of_a_response_add_up_to_what_is_wanted_minus_the_first_value(packed):
    values, good, keep, doc = packed
    y, delta = response_mask(keep, doc), advantages(*packed, lam=0.0)
    checked = 0
    for b in range(2):
        for d in range(5):
            inside = y[b] & (doc[b] == d)
            if inside.any():
                first = int(inside.nonzero()[0])
                expected = good[b, first] - values[b, first - 1]
                assert delta[b, inside].sum().item() == pytest.approx(expected.item(), abs=1e-5)
                checked += 1
    assert checked == 8


def test_packed_equals_unpacked(packed):
    for advantage in ADVANTAGES:
        together = log_raw_weights(*packed, advantage=advantage, floor=0.2)
        for b in range(2):
            for d in range(5):
                inside = packed[3][b] == d
                alone = [x[b, inside][None] for x in packed]
                got = log_raw_weights(*alone, advantage=advantage, floor=0.2)[0]
                torch.testing.assert_close(got, together[b, inside], rtol=0, atol=1e-12)


def test_separate_runs_are_an_error(packed):
    _, _, keep, doc = packed
    row = torch.where(doc < 0, -1, doc + torch.tensor([[60], [70]]))
    check_one_response(keep, doc, row)
    keep[1, 3] = False  # in the middle of the first document's nine response tokens
    keep[1, 8] = False
    with pytest.raises(ValueError, match="row 70 of the data set has 2 separate runs"):
        check_one_response(keep, doc, row)


def raw_by_hand(advantage, values, keep, doc, b, u, floor):
    """From the definition, for a response token u of row b."""
    s = u
    while s - 1 >= 1 and keep[b, s - 1] and doc[b, s - 1] == doc[b, s - 2]:
        s -= 1
        if doc[b, s] != doc[b, u]:
            s += 1
            break
    v, before, start = (float(values[b, i]) for i in (u, u - 1, s - 1))
    return {
        "value": v,
        "relative": v / max(start, floor),
        "gated": v / max(before, start),
        "ratio": v / before,
    }[advantage]


@pytest.mark.parametrize("advantage", SCALED)
def test_raw_weights_follow_the_definition(packed, advantage):
    values, _, keep, doc = packed
    y = response_mask(keep, doc)
    got = log_raw_weights(*packed, advantage=advantage, floor=0.4)
    assert (got[~y] == -torch.inf).all()
    places = y.nonzero().tolist()
    assert len(places) == 38
    for b, u in places:
        want = raw_by_hand(advantage, values, keep, doc, b, u, floor=0.4)
        assert math.exp(got[b, u]) == pytest.approx(want, rel=1e-6), (b, u)


def test_the_value_at_the_start_is_of_the_last_prompt_token(packed):
    """Where there is no prompt it is of the first token, which no head predicts."""
    values, _, keep, doc = packed
    keep = keep.clone()
    keep[0, 8] = True  # document 1 of row 0 begins there: all of it is response
    start = values_at_start(values, keep, doc)
    assert (start[0, 3:8] == values[0, 2]).all()
    assert (start[0, 9:13] == values[0, 8]).all()
    assert (start[1, 4:13] == values[1, 3]).all()


@pytest.mark.parametrize("advantage", ["td", "gae"])
def test_standardised_advantages_become_weights(packed, advantage):
    y = response_mask(*packed[2:])
    a = advantages(*packed, lam=0.0 if advantage == "td" else 0.9)
    mean, std = a[y].mean().item(), a[y].std(correction=0).item()
    got = log_raw_weights(
        *packed, advantage=advantage, lam=0.9, temperature=0.7, mean=mean, std=std
    )
    z = ((a - mean) / (std + 1e-6)).clamp(-5, 5)
    torch.testing.assert_close(got[y], z[y] / 0.7)
    assert z[y].mean().abs() < 1e-6


def mask_of(keep, doc, K):
    mask = torch.zeros(*keep.shape, K, dtype=torch.bool)
    for k in range(K):
        mask[:, : -k - 1, k] = keep[:, k + 1 :] & (doc[:, k + 1 :] == doc[:, : -k - 1])
    return mask


def scale_of(log_raw, mask, w_min, w_max):
    """One scale per head, over all its targets."""
    K = mask.shape[-1]
    raw = shift_to_heads(log_raw.float(), K, 0.0)
    return [solve_scale(raw[..., k][mask[..., k]], [0], w_min, w_max)[0] for k in range(K)]


@pytest.mark.parametrize("advantage", SCALED)
def test_scaled_weights_follow_the_definition(packed, advantage):
    """raw[u] reaches head k at t = u - k - 1, whatever the head, times the head's scale."""
    mask = mask_of(*packed[2:], 4)
    log_raw = log_raw_weights(*packed, advantage=advantage, floor=0.1)
    scale = scale_of(log_raw, mask, 0.3, 2.0)
    weighting = CriticWeighting("critic", advantage=advantage, w_min=0.3, w_max=2.0)
    weights, stats = weighting(None, mask, packed[3], log_raw, step=0, scale_K=scale)
    at_bounds = 0
    for b, t, k in mask.nonzero().tolist():
        raw = raw_by_hand(advantage, packed[0], *packed[2:], b, t + k + 1, floor=0.1)
        want = min(max(scale[k] * raw, 0.3), 2.0)
        assert weights[b, t, k].item() == pytest.approx(want, rel=1e-5)
        at_bounds += want in (0.3, 2.0)
    assert at_bounds
    assert (weights[~mask] == 0).all()
    torch.testing.assert_close(stats["mean"], torch.ones(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.7])
@pytest.mark.parametrize("advantage", SCALED)
@pytest.mark.parametrize("value", [0.3, 0.2000001, 1e-6, 0.999, 1e-30])
def test_a_critic_that_knows_nothing_gives_weights_of_exactly_one(
    packed, advantage, value, strength
):
    """With whatever constant, floor and strength: the run is then the uniform one to the bit."""
    _, good, keep, doc = packed
    mask = mask_of(keep, doc, 4)
    values = torch.full(keep.shape, value)
    log_raw = log_raw_weights(values, good, keep, doc, advantage=advantage, floor=0.013)
    scale = scale_of(log_raw, mask, 0.0, 20.0)
    weighting = CriticWeighting(advantage=advantage, strength=strength)
    weights, _ = weighting(None, mask, doc, log_raw, step=0, scale_K=scale)
    assert torch.equal(weights, mask.float())


def test_equal_prefixes_weigh_alike_under_value(packed):
    """Also where the responses go on differently, and in other packs."""
    values, good, keep, doc = (x.clone() for x in packed)
    values[1, 27:33] = values[0, :6]  # the first document of row 0 is the last one of row 1
    assert (doc[1, 27:35] == 4).all()
    first = log_raw_weights(values, good, keep, doc)[0, 3:6]
    again = log_raw_weights(values, 1 - good, keep, doc)[1, 30:33]
    assert first.isfinite().all()
    assert torch.equal(first, again)


@pytest.mark.parametrize("advantage", SCALED)
def test_a_value_of_nothing_weighs_nothing_and_spoils_nothing(packed, advantage):
    """fp32 sigmoids reach 0; a quotient by it is finite, and 0 by 0 is 0."""
    values, good, keep, doc = (x.clone() for x in packed)
    values[0, 5:8], values[0, 10] = 0.0, 1e-45
    log_raw = log_raw_weights(values, good, keep, doc, advantage=advantage, floor=0.1)
    y = response_mask(keep, doc)
    assert not log_raw.isnan().any()
    assert (log_raw < torch.inf).all()
    assert (log_raw[0, 5:8] == -torch.inf).all()
    assert log_raw[y].exp().max() < 1e38


def test_z_is_clamped():
    z = standardise(torch.tensor([[-100.0, 0.0, 100.0]]), 0.0, 1.0)
    assert z.tolist() == [[-5.0, 0.0, 5.0]]


def test_a_low_temperature_is_sharp_and_not_uniform():
    """exp(z / 0.001) underflows for every z unless the largest is taken as zero."""
    log_raw = torch.tensor([[0.0, -2.0, -1.0, 1.0, 1.1]]) / 0.001
    mask = torch.ones(1, 5, 1).bool()
    mask[0, 4] = False
    weighting = CriticWeighting(advantage="gae", temperature=0.001, w_max=3.9)
    weights, _ = weighting(None, mask, torch.zeros(1, 5).long(), log_raw, step=0)
    assert weights[0, :, 0].tolist() == pytest.approx([0, 0, 0.1, 3.9, 0], abs=1e-4)


@pytest.mark.parametrize("advantage", ["value", "gae"])
def test_shuffled_permutes_inside_each_document_before_heads_gather(packed, advantage):
    """All heads see the same permuted raw weights, and each document keeps its own."""
    _, _, keep, doc = packed
    mask = mask_of(keep, doc, 2)
    y = response_mask(keep, doc)
    raw = torch.where(y, torch.rand(2, 40).double() + doc, 0.0)
    out_of_the_way = dict(advantage=advantage, w_min=0.0, w_max=1e6)
    known = {} if advantage == "gae" else {"scale_K": [0.7, 0.9]}
    real, _ = CriticWeighting("critic", **out_of_the_way)(None, mask, doc, raw, step=0, **known)
    shuffled, _ = CriticWeighting("shuffled", **out_of_the_way)(
        None, mask, doc, raw, step=0, **known
    )
    assert not torch.allclose(real, shuffled)
    for b in range(2):
        for d in range(5):
            positions = (doc[b] == d) & mask[b, :, 0]
            torch.testing.assert_close(
                shuffled[b, positions, 0].sort().values, real[b, positions, 0].sort().values
            )
            # Head 1 at t and head 0 at t + 1 predict the same token: same raw weight, another c.
            both = (doc[b, :-1] == d) & mask[b, :-1, 1] & mask[b, 1:, 0]
            if both.sum() > 1:
                ratio = shuffled[b, :-1, 1][both] / shuffled[b, 1:, 0][both]
                torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
                if advantage == "value":
                    assert ratio[0].item() == pytest.approx(0.9 / 0.7)


def test_the_oracle_weighs_no_marked_token(packed):
    _, _, keep, doc = packed
    mask = mask_of(keep, doc, 4)
    noise = torch.rand(2, 40) < 0.4
    log_raw = torch.where(noise, -torch.inf, 0.0)
    scale = scale_of(log_raw, mask, 0.0, 20.0)
    weighting = CriticWeighting("oracle", advantage="gae", w_min=0.5)
    assert weighting.w_min == 0
    assert weighting.is_scaled
    assert not weighting.needs_values
    weights, stats = weighting(None, mask, doc, log_raw, step=0, scale_K=scale)
    marked = shift_to_heads(noise, 4, False) & mask
    assert (weights[marked] == 0).all()
    for k in range(4):
        sound = weights[..., k][mask[..., k] & ~marked[..., k]]
        assert (sound == sound[0]).all()
    torch.testing.assert_close(stats["mean"], torch.ones(4), atol=1e-6, rtol=0)


def test_strength_zero_is_uniform(packed):
    _, _, keep, doc = packed
    mask = response_mask(keep, doc)[..., None]
    weighting = CriticWeighting("critic", strength=0.0)
    weights, _ = weighting(None, mask, doc, torch.randn(2, 40), step=0, scale_K=[0.3])
    assert torch.equal(weights, mask.float())


def test_what_a_call_needs(packed):
    mask = packed[2][..., None]
    with pytest.raises(ValueError, match="weighting 'critic' needs scores"):
        CriticWeighting()(None, mask, packed[3], None, step=0)
    for name in ("critic", "shuffled", "oracle"):
        with pytest.raises(ValueError, match=f"weighting '{name}' needs scale_K, one number per"):
            CriticWeighting(name)(None, mask, packed[3], packed[0], step=0)
    assert not CriticWeighting().needs_losses
    assert CriticWeighting("oracle").needs_scores
    assert not CriticWeighting("uniform").needs_scores
    assert not CriticWeighting("uniform").is_scaled
    assert not CriticWeighting(advantage="td").is_scaled
    assert CriticWeighting("dft").needs_losses


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (
            {"advantage": "mc"},
            "weighting.advantage 'mc' is not one of value, relative, gated, ratio, td, gae",
        ),
        ({"lam": 1.5}, "weighting.lam must be between 0 and 1, got 1.5"),
        ({"name": "rho1"}, "weighting.name 'rho1' is not one of critic"),
        ({"temperature": 0}, "weighting.temperature must be above 0, got 0"),
        ({"w_min": 2.0}, "w_min"),
    ],
)
def test_wrong_arguments(wrong, match):
    with pytest.raises(ValueError, match=match):
        CriticWeighting(**wrong)
