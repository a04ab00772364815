"""Draws tokens from logits: temperature, top-k, top-p, and one uniform number per token.

Shapes: B rows, S positions, V vocabulary, N new tokens.

A token is drawn by inverting the cumulative distribution at a uniform number that depends only on
the request's seed and the token's index. A sample therefore does not depend on batch, device or
decoding mode, up to the rounding of the logits: a token changes only if its number lies within that
rounding of the boundary between two tokens.
"""

import math
from collections.abc import Sequence

import torch


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """ValueError if a sampling setting is out of range."""
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or the number of tokens to keep, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (off), got {top_p}")


def request_uniforms(seeds: Sequence[int], n_tokens: int) -> torch.Tensor:
    """Uniform numbers for each request, from its own generator: fp64 in [0, 1) on the CPU.

    torch's generator uses only the lowest 32 bits of a seed. Asking for fewer gives the same first
    numbers.
    """
    uniforms_BN = torch.empty(len(seeds), n_tokens, dtype=torch.float64)
    for row, seed in zip(uniforms_BN, seeds, strict=True):
        row.uniform_(generator=torch.Generator(device="cpu").manual_seed(seed))
    return uniforms_BN


def next_token_probs(
    logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """The distribution that a token is drawn from, fp64 [..., V].

    The temperature, above 0, is applied first, then top-k (0 keeps all), then top-p to what top-k
    left (the smallest set of most likely tokens with at least this probability; 1 keeps all), as in
    Hugging Face transformers. Of equal logits the lower ids are kept.
    """
    logits = logits.double()
    # Subtracted first: logits / temperature overflows where the temperature is tiny.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k == 0 and top_p == 1:
        return scaled.softmax(-1)
    scaled, ids = scaled.sort(dim=-1, descending=True, stable=True)
    if top_k:
        scaled[..., top_k:] = -math.inf
    probs = scaled.softmax(-1)
    if top_p < 1:
        above = probs.cumsum(-1) - probs  # of all more likely tokens; 0 for the first, which stays
        probs = probs.masked_fill(above >= top_p, 0)
        probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, ids, probs)


def draw_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor | None,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> torch.Tensor:
    """Draw one token from each distribution, int64 [...].

    Args:
        logits: [..., V].
        uniforms: fp64 [...], in [0, 1); not read at temperature 0.
        temperature: 0 takes the most likely token, the lowest id in a tie; see
            ``next_token_probs`` for the others.
    """
    if temperature == 0:
        return logits.argmax(-1)
    assert uniforms is not None, "a draw above temperature 0 needs uniform numbers"
    probs = next_token_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    cdf = probs.cumsum(-1)
    # The first id whose cumulative probability exceeds the number, so never one of probability 0.
    # Scaled by the last value, which is 1 only up to rounding; the product stays below it.
    target = uniforms[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, target, right=True)[..., 0]
