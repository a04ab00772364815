"""The critic's objectives against loops over their definition."""

import math

import pytest
import torch

from wmtp_modules.loss.value_loss import (
    judged_mask,
    pairs_loss,
    response_mask,
    token_cross_entropy,
    values_before,
)


@pytest.fixture
def case():
    """Two documents in each row; row 2 has no response at all."""
    doc = (torch.arange(12) >= 5).long().expand(3, -1).clone()
    doc[:, -2:] = -1
    keep = torch.zeros(3, 12, dtype=torch.bool)
    keep[0, 2:5] = keep[0, 5:10] = True  # the second document is supervised from its first token
    keep[1, 8:10] = True
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 12, generator=generator, requires_grad=True)
    return values, torch.randn(3, 12, generator=generator), keep, doc


def loop(keep, doc):
    return [
        (b, u) for b in range(3) for u in range(1, 12) if keep[b, u] and doc[b, u] == doc[b, u - 1]
    ]


def test_response_tokens_have_a_value_before_them(case):
    _, _, keep, doc = case
    y = response_mask(keep, doc)
    assert [tuple(x) for x in y.nonzero().tolist()] == loop(keep, doc)
    assert not y[0, 5]  # first of its document: the value before belongs to another one
    assert keep[0, 5]  # and the caller's mask is left alone


def test_values_before_are_shifted_by_one(case):
    values, *_ = case
    assert (values_before(values)[:, 1:] == values[:, :-1]).all()
    assert (values_before(values)[:, 0] == 0).all()


def one_document_rows():
    """Three rows of 7: prompts of 2 and of 1 token, and no response; logits and f(R)."""
    y_BT = torch.zeros(3, 7, dtype=torch.bool)
    y_BT[0, 2:6] = True
    y_BT[1, 1:] = True
    torch.manual_seed(3)
    logits_BT = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    return y_BT, logits_BT, torch.tensor([1.0, 0.25, 0.0])


def test_a_critic_is_asked_after_the_last_prompt_token_and_every_response_token():
    y_BT, *_ = one_document_rows()
    found = [row.nonzero().flatten().tolist() for row in judged_mask(y_BT)]
    assert found == [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6], []]


def test_token_cross_entropy_is_a_sum_over_the_tokens_asked():
    y_BT, logits_BT, good_B = one_document_rows()
    total = 0.0
    for b, tokens in enumerate((range(1, 6), range(7))):
        for u in tokens:
            v, f = 1 / (1 + math.exp(-logits_BT[b, u].item())), good_B[b].item()
            total -= f * math.log(v) + (1 - f) * math.log(1 - v)
    loss = token_cross_entropy(logits_BT, good_B, y_BT)
    assert loss.item() == pytest.approx(total, rel=1e-9)
    (gradient_BT,) = torch.autograd.grad(loss, logits_BT)
    v_BT = logits_BT.detach().sigmoid()
    want_BT = torch.where(judged_mask(y_BT), v_BT - good_B[:, None], 0.0)
    torch.testing.assert_close(gradient_BT, want_BT)


def test_a_batch_without_responses_has_loss_0_and_a_gradient():
    y_BT, logits_BT, good_B = one_document_rows()
    loss = token_cross_entropy(logits_BT, good_B, torch.zeros_like(y_BT))
    loss.backward()
    assert loss == 0
    assert (logits_BT.grad == 0).all()


def test_pairs_compare_the_ends_and_hold_the_steps_back():
    torch.manual_seed(4)
    y_BT = torch.zeros(4, 8, dtype=torch.bool)
    for b, (s, end) in enumerate(((2, 7), (1, 8), (2, 5), (3, 8))):  # better, better, worse, worse
        y_BT[b, s:end] = True
    d_BT = torch.where(y_BT, torch.randn(4, 8, dtype=torch.float64), 0.0)
    logits_BT = 0.4 + d_BT.cumsum(1)  # as a ``sum`` head gives them
    total = 0.0
    for better, worse in ((0, 2), (1, 3)):
        margin = d_BT[better].sum() - d_BT[worse].sum()
        steps = torch.cat([d_BT[better][y_BT[better]], d_BT[worse][y_BT[worse]]])
        total += math.log1p(math.exp(-margin)) + 0.5 * steps.square().mean().item()
    assert pairs_loss(logits_BT, y_BT, rho=0.5).item() == pytest.approx(total, rel=1e-9)
