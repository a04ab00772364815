"""The critic's value head, against loops over its equations."""

import math

import pytest
import torch

from wmtp_modules.models.value_head import HEADS, ValueHead, turn_logits

D, T = 8, 9


@pytest.fixture
def inputs():
    """Hidden states and surprise of three rows: prompts of 3 and 1 tokens, and no response."""
    torch.manual_seed(0)
    hidden_BTD = torch.randn(3, T, D)
    surprise_BT3 = torch.randn(3, T, 3)
    surprise_BT3[:, 0] = torch.nan
    surprise_BT3[:, 1, 2] = torch.nan
    y_BT = torch.zeros(3, T, dtype=torch.bool)
    y_BT[0, 3:8] = True  # and one token of padding
    y_BT[1, 1:] = True
    return hidden_BTD, surprise_BT3, y_BT


def trained(kind: str) -> ValueHead:
    """A head with random weights, b and scales."""
    torch.manual_seed(1)
    head = ValueHead(D, kind)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    head.base.fill_(-0.7)
    head.mean.copy_(torch.randn(D + 3))
    head.std.copy_(torch.rand(D + 3) + 0.5)
    return head


def evidence(head, hidden_BTD, surprise_BT3):
    """d[u] of every token, by the definition."""
    x = hidden_BTD / (hidden_BTD.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    x = (torch.cat([x, surprise_BT3], -1) - head.mean) / head.std
    x = torch.where(x.isnan(), 0.0, x)
    return head.out(torch.nn.functional.silu(head.hidden(x))).squeeze(-1), x


@pytest.mark.parametrize("kind", HEADS)
def test_an_untrained_head_says_the_mean_everywhere(kind, inputs):
    head = ValueHead(D, kind)
    head.base.fill_(-1.3)
    logits_BT = head(*inputs)
    if kind == "turn":
        torch.testing.assert_close(logits_BT, torch.full_like(logits_BT, -1.3), rtol=0, atol=1e-6)
    else:
        assert (logits_BT == head.base).all()  # to the bit


def test_state_reads_the_state_and_the_surprise_there(inputs):
    head = trained("state")
    d_BT, _ = evidence(head, *inputs[:2])
    torch.testing.assert_close(head(*inputs), -0.7 + d_BT)


def test_sum_adds_up_over_the_response_only(inputs):
    head = trained("sum")
    head.kappa.fill_(1.5)
    d_BT, _ = evidence(head, *inputs[:2])
    logits_BT = head(*inputs)
    for b, (s, end) in enumerate(((3, 8), (1, T))):
        for u in range(T):
            total = d_BT[b, s : min(u + 1, end)].sum() if u >= s else 0.0
            assert logits_BT[b, u].item() == pytest.approx(
                -0.7 + 1.5 * torch.as_tensor(total).item(), abs=1e-5
            )
    assert (logits_BT[2] == head.base).all()


def test_turn_is_the_sum_over_the_place_of_the_turn(inputs):
    """The equation of docs/critic.md, in probabilities and by loops."""
    head = trained("turn")
    d_BT, x_BTE = evidence(head, *inputs[:2])
    logits_BT = head(*inputs)
    kappa = math.log1p(math.exp(head.hazard.item()))
    for b, (s, end) in enumerate(((3, 8), (1, T))):
        v0 = -0.7 + head.start(x_BTE[b, s - 1]).item()
        assert logits_BT[b, : s - 1].tolist() == pytest.approx([v0] * (s - 1), abs=1e-5)
        for u in range(s - 1, end):
            odds = math.exp(-kappa * (u - s + 1))  # no turn yet
            for m in range(s, u + 1):
                prior = (1 - math.exp(-kappa)) * math.exp(-kappa * (m - s))
                odds += prior * math.exp(-d_BT[b, m : u + 1].sum().item())
            assert logits_BT[b, u].item() == pytest.approx(v0 - math.log(odds), abs=1e-4), u
        assert logits_BT[b, end:].tolist() == pytest.approx(
            [logits_BT[b, end - 1].item()] * (T - end), abs=1e-4
        )
    assert logits_BT[2].isfinite().all()


def test_turn_is_causal_and_its_gradient_is_right():
    torch.manual_seed(2)
    d_BT = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    y_BT = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    v0_B1 = torch.tensor([[0.3], [-0.4]], dtype=torch.float64, requires_grad=True)
    kappa = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def logits(d_BT, v0_B1, kappa):
        return turn_logits(torch.where(y_BT, d_BT, 0.0), y_BT, v0_B1, kappa)

    assert torch.autograd.gradcheck(logits, (d_BT, v0_B1, kappa))
    before = logits(d_BT, v0_B1, kappa)
    later_BT = d_BT.detach().clone()
    later_BT[:, 5] += 1
    after = logits(later_BT, v0_B1, kappa)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=0)
    assert (before[:, 5] != after[:, 5]).all()


def test_turn_stays_finite_over_thousands_of_tokens():
    d_BT = torch.full((1, 4096), -3.0, dtype=torch.float64, requires_grad=True)
    y_BT = torch.ones(1, 4096, dtype=torch.bool)
    kappa = torch.tensor(1e-3, dtype=torch.float64, requires_grad=True)
    for sign in (1, -1):
        logits_BT = turn_logits(sign * d_BT, y_BT, torch.zeros(1, 1).double(), kappa)
        (gradient_BT,) = torch.autograd.grad(logits_BT.sum(), d_BT)
        assert logits_BT.isfinite().all()
        assert gradient_BT.isfinite().all()


@pytest.mark.parametrize("kind", HEADS)
def test_a_state_that_is_not_a_number_is_not_hidden(kind, inputs):
    """Only surprise may be missing: a broken trunk must not look like one that knows nothing."""
    hidden_BTD, surprise_BT3, y_BT = inputs
    hidden_BTD[0, 4] = torch.nan
    assert trained(kind)(hidden_BTD, surprise_BT3, y_BT)[0, 4].isnan()
