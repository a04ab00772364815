"""The critic's objectives against loops over their definition, and the value head."""

import pytest
import torch

from wmtp_modules.loss.value_loss import (
    pairwise_loss,
    regression_loss,
    response_mask,
    row_means,
    value_sums,
    values_before,
)
from wmtp_modules.models.value_head import ValueHead


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


def test_regression_equals_its_definition(case):
    values, rewards, keep, doc = case
    loss = regression_loss(values, rewards, response_mask(keep, doc))
    expected = sum(0.5 * (values[b, u - 1] - rewards[b, u]) ** 2 for b, u in loop(keep, doc))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, values, retain_graph=True)
    (expected_grad,) = torch.autograd.grad(expected, values)
    torch.testing.assert_close(grad, expected_grad)


def test_pairwise_equals_its_definition(case):
    values, _, keep, doc = case
    means = row_means(values, response_mask(keep, doc))
    by_row = [[values[b, u - 1] for c, u in loop(keep, doc) if c == b] for b in range(3)]
    expected = [sum(row) / len(row) if row else 0.0 for row in by_row]
    torch.testing.assert_close(means, torch.stack([torch.as_tensor(x) for x in expected]))
    loss = pairwise_loss(means[:1], means[1:2])
    assert loss.item() == pytest.approx(
        -torch.log(torch.sigmoid(expected[0] - expected[1])).item(), rel=1e-5
    )


def test_a_batch_without_responses_gives_zero_with_a_gradient(case):
    values, rewards, keep, _ = case
    loss = regression_loss(values, rewards, torch.zeros_like(keep))
    loss.backward()
    assert loss.item() == 0
    assert (values.grad == 0).all()


def test_nan_rewards_outside_responses_do_no_harm(case):
    values, rewards, keep, doc = case
    y = response_mask(keep, doc)
    loss = regression_loss(values, torch.where(y, rewards, torch.nan), y)
    loss.backward()
    assert torch.isfinite(values.grad).all()


def test_value_sums_hold_count_sum_and_square(case):
    values, _, keep, doc = case
    sums = value_sums(values, response_mask(keep, doc))
    for b in range(3):
        row = [values[b, u - 1].double() for c, u in loop(keep, doc) if c == b]
        expected = [len(row), float(sum(row)), float(sum(x**2 for x in row))]
        assert sums[b].tolist() == pytest.approx(expected)


def test_value_head_starts_at_zero_and_computes_in_fp32():
    head = ValueHead(16)
    hidden = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    assert head(hidden).dtype == torch.float32
    assert (head(hidden) == 0).all()
    torch.nn.init.normal_(head.out.weight)
    raw = head(hidden)
    assert raw.shape == (2, 5)
    head.scale.fill_(2.0), head.shift.fill_(-1.0)
    torch.testing.assert_close(head(hidden), 2 * raw - 1)
    assert {"scale", "shift"} <= head.state_dict().keys()
    torch.testing.assert_close(values_before(raw)[:, 1:], raw[:, :-1])
