"""Advantages against the plain loop and their identities; weights against their definition."""

import pytest
import torch

from wmtp_modules.loss.value_loss import response_mask
from wmtp_modules.weighting.advantage import (
    CriticWeighting,
    advantages,
    check_one_response,
    critic_weights,
    standardise,
)


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
    values = torch.randn(B, T, generator=generator)
    reward_of = torch.randn(B, len(lengths), generator=generator)
    return values, reward_of.gather(1, doc.clamp(min=0)), keep, doc


def plain_loop(values, rewards, keep, doc, lam):
    """From the definition, token by token; also the temporal differences and the ends."""
    B, T = keep.shape
    a, delta = torch.zeros(B, T).double(), torch.zeros(B, T).double()
    for b in range(B):
        y = [bool(keep[b, u] and u >= 1 and doc[b, u] == doc[b, u - 1]) for u in range(T)]
        for u in reversed(range(T)):
            if not y[u]:
                continue
            end = u + 1 == T or not y[u + 1] or doc[b, u + 1] != doc[b, u]
            following = float(rewards[b, u]) if end else float(values[b, u])
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


def test_lambda_one_is_reward_minus_value(packed):
    values, rewards, keep, doc = packed
    y = response_mask(keep, doc)
    before = torch.nn.functional.pad(values[:, :-1], (1, 0))
    a = advantages(*packed, lam=1.0)
    torch.testing.assert_close(a[y], (rewards - before)[y].double(), atol=1e-6, rtol=0)
    assert (a[~y] == 0).all()


def test_deltas_of_a_response_add_up_to_reward_minus_first_value(packed):
    values, rewards, keep, doc = packed
    y, delta = response_mask(keep, doc), advantages(*packed, lam=0.0)
    checked = 0
    for b in range(2):
        for d in range(5):
            inside = y[b] & (doc[b] == d)
            if inside.any():
                first = int(inside.nonzero()[0])
                expected = rewards[b, first] - values[b, first - 1]
                assert delta[b, inside].sum().item() == pytest.approx(expected.item(), abs=1e-5)
                checked += 1
    assert checked == 8


def test_packed_equals_unpacked(packed):
    values, rewards, keep, doc = packed
    a = advantages(*packed, lam=0.95)
    for b in range(2):
        for d in range(5):
            inside = doc[b] == d
            alone = [x[b, inside][None] for x in (values, rewards, keep, doc)]
            torch.testing.assert_close(advantages(*alone, lam=0.95)[0], a[b, inside])


def test_separate_runs_are_an_error(packed):
    _, _, keep, doc = packed
    row = torch.where(doc < 0, -1, doc + torch.tensor([[60], [70]]))
    check_one_response(keep, doc, row)
    keep[1, 3] = False  # in the middle of the first document's nine response tokens
    keep[1, 8] = False
    with pytest.raises(ValueError, match="row 70 of the data set has 2 separate runs"):
        check_one_response(keep, doc, row)


def test_weights_follow_the_definition(packed):
    """raw[u] reaches head k at t = u - k - 1, whatever the head."""
    _, _, keep, doc = packed
    y = response_mask(keep, doc)
    a = advantages(*packed, lam=0.95)
    mean, std = a[y].mean().item(), a[y].std(unbiased=False).item()
    z = standardise(a, mean, std)
    assert z[y].mean().abs() < 1e-6
    mask = torch.zeros(2, 40, 4, dtype=torch.bool)
    raw = torch.zeros(2, 40, 4).double()
    for b in range(2):
        for t in range(40):
            for k in range(4):
                u = t + k + 1
                if u < 40 and keep[b, u] and doc[b, u] == doc[b, t]:
                    mask[b, t, k] = True
                    raw[b, t, k] = (z[b, u] / 0.7).exp()
    weighting = CriticWeighting("critic", temperature=0.7, w_min=0.2, w_max=3.0)
    weights, stats = weighting(None, mask, doc, z, step=0)
    for k in range(4):
        w, r = weights[..., k][mask[..., k]].double(), raw[..., k][mask[..., k]]
        assert w.mean().item() == pytest.approx(1, abs=1e-4)
        assert w.min() >= 0.2 - 1e-6
        assert w.max() <= 3.0 + 1e-6
        inside = (w > 0.2 + 1e-4) & (w < 3.0 - 1e-4)
        ratio = w[inside] / r[inside]  # one scalar per head
        assert inside.sum() > 3
        assert (ratio / ratio[0] - 1).abs().max() < 1e-5
    assert (weights[~mask] == 0).all()
    torch.testing.assert_close(stats["mean"], torch.ones(4), atol=1e-4, rtol=0)


def test_z_is_clamped():
    z = standardise(torch.tensor([[-100.0, 0.0, 100.0]]), 0.0, 1.0)
    assert z.tolist() == [[-5.0, 0.0, 5.0]]
    assert torch.isfinite(
        critic_weights(z[..., None], torch.ones(1, 3, 1).bool(), 0.01, 0.1, 5.0)
    ).all()


def test_a_low_temperature_is_sharp_and_not_uniform():
    """exp(z / 0.001) underflows for every z unless the largest is taken as zero."""
    z = torch.tensor([[-2.0, -1.0, 1.0, 1.1]])[..., None]
    mask = torch.ones(1, 4, 1).bool()
    weights = critic_weights(z, mask, 0.001, 0.0, 3.9)
    assert weights[0, :, 0].tolist() == pytest.approx([0, 0, 0.1, 3.9], abs=1e-4)


def test_shuffled_permutes_inside_each_document_before_heads_gather(packed):
    """All heads see the same permuted advantages, and each document keeps its own."""
    _, _, keep, doc = packed
    mask = torch.zeros(2, 40, 2, dtype=torch.bool)
    mask[:, :-1, 0] = response_mask(keep, doc)[:, 1:]
    mask[:, :-2, 1] = keep[:, 2:] & (doc[:, 2:] == doc[:, :-2])
    z = torch.where(response_mask(keep, doc), torch.rand(2, 40).double() + doc, 0.0)
    kwargs = dict(w_min=0.0, w_max=1e6)  # out of the way, so that weights are proportional to raw
    real, _ = CriticWeighting("critic", **kwargs)(None, mask, doc, z, step=0)
    shuffled, _ = CriticWeighting("shuffled", **kwargs)(None, mask, doc, z, step=0)
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


def test_strength_zero_is_uniform_and_td_is_lambda_zero(packed):
    _, _, keep, doc = packed
    mask = response_mask(keep, doc)[..., None]
    z = torch.randn(2, 40)
    weights, _ = CriticWeighting("critic", strength=0.0)(None, mask, doc, z, step=0)
    assert torch.equal(weights, mask.float())
    assert CriticWeighting(advantage="td").lam == 0
    assert CriticWeighting(lam=0.9).lam == 0.9


def test_advantages_are_needed_and_losses_are_not(packed):
    mask = packed[2][..., None]
    with pytest.raises(ValueError, match="weighting 'critic' needs scores"):
        CriticWeighting()(None, mask, packed[3], None, step=0)
    assert not CriticWeighting().needs_losses
    assert not CriticWeighting("uniform").needs_scores
    assert CriticWeighting("dft").needs_losses


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"advantage": "mc"}, "weighting.advantage 'mc' is not one of td, gae"),
        ({"lam": 1.5}, "weighting.lam must be between 0 and 1, got 1.5"),
        ({"name": "rho1"}, "weighting.name 'rho1' is not one of critic"),
        ({"temperature": 0}, "weighting.temperature must be above 0, got 0"),
        ({"w_min": 2.0}, "w_min"),
    ],
)
def test_wrong_arguments(wrong, match):
    with pytest.raises(ValueError, match=match):
        CriticWeighting(**wrong)
