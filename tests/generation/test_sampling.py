import pytest
import torch

from wmtp_modules.generation.sampling import (
    check_sampling,
    draw_tokens,
    next_token_probs,
    request_uniforms,
)


def plain_probs(logits, temperature, top_k, top_p):
    """Ten lines of plain Python, one token after the other."""
    weights = [2.718281828459045 ** (x / temperature) for x in logits.tolist()]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    kept = order[:top_k] if top_k else order
    total = sum(weights[i] for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        if mass >= top_p:
            break
        nucleus.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 50])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_filters_equal_a_plain_computation(temperature, top_k, top_p):
    logits = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0)) * 2
    settings = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    probs = next_token_probs(logits, **settings)
    expected = [[plain_probs(x, **settings) for x in rows] for rows in logits]
    torch.testing.assert_close(probs, torch.tensor(expected, dtype=torch.float64))


def test_top_k_comes_before_top_p():
    """0.4, 0.3, 0.2, 0.1: the first two are 1 after top-k 2, and top-p 0.5 then needs only one."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    probs = next_token_probs(logits, temperature=1.0, top_k=2, top_p=0.5)
    torch.testing.assert_close(probs, torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))


def test_ties_keep_the_lowest_ids():
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0])
    half = torch.tensor([0, 0.5, 0.5, 0], dtype=torch.float64)
    torch.testing.assert_close(next_token_probs(logits, temperature=1.0, top_k=2, top_p=1.0), half)
    greedy = draw_tokens(logits, None, temperature=0.0, top_k=0, top_p=1.0)
    assert greedy.item() == 1


def test_a_uniform_number_picks_the_token_whose_interval_holds_it():
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log()
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-53], dtype=torch.float64)
    settings = dict(temperature=1.0, top_k=0, top_p=1.0)
    draws = draw_tokens(logits.expand(6, 4), uniforms, **settings)
    assert draws.tolist() == [0, 0, 2, 2, 3, 3]
    # Never a token of probability 0, at neither end.
    logits = torch.tensor([0.0, 0.3, 0.7, 0.0]).log()
    draws = draw_tokens(logits.expand(2, 4), uniforms[[0, -1]], **settings)
    assert draws.tolist() == [1, 2]


def test_tiny_temperatures_are_greedy():
    logits = torch.tensor([80.0, 90.0, 89.9])
    uniforms = torch.tensor(0.999, dtype=torch.float64)
    assert draw_tokens(logits, uniforms, temperature=1e-307, top_k=0, top_p=1.0).item() == 1


def test_uniforms_belong_to_the_seed():
    three = request_uniforms([5, 6, 7], 40)
    assert three.dtype == torch.float64
    assert torch.equal(request_uniforms([7], 40)[0], three[2])  # whatever the batch
    assert torch.equal(request_uniforms([6, 5], 9), three[[1, 0], :9])  # or the length
    assert len(three.unique()) == 120


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-0.1, 0, 1.0), r"temperature must be 0 .*, got -0.1"),
        ((float("nan"), 0, 1.0), r"temperature must be 0 .*, got nan"),
        ((float("inf"), 0, 1.0), r"temperature must be 0 .*, got inf"),
        ((1.0, -1, 1.0), r"top_k must be 0 .*, got -1"),
        ((1.0, 0, 0.0), r"top_p must be above 0 .*, got 0.0"),
        ((1.0, 0, 1.1), r"top_p must be above 0 .*, got 1.1"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(*values)
