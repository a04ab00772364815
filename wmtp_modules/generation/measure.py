"""Compares plain with self-speculative decoding: the tokens, and the speed."""

import time
from collections.abc import Sequence
from statistics import median

import torch
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.generation.generate import DECODINGS, Decoding, Generation, Request, generate
from wmtp_modules.models.mtp_transformer import MTPTransformer


@torch.inference_mode()
def compare_decodings(
    model: MTPTransformer,
    requests: list[Request],
    plain: list[Generation],
    self_speculative: list[Generation],
) -> dict:
    """Where two decodings of the same requests part.

    In fp32 they do not. In bf16 the logits of one position depend in their last bits on how many
    positions are computed together, so tokens whose logits all but tie may change places: the gap
    says whether that is all.

    Returns:
        ``identical`` and ``differences``, at most one for each request: ``request`` (its index),
        ``position`` (index of the first new token that differs), ``plain`` and
        ``self_speculative`` (the two tokens, None if the completion had ended), ``logit_gap``
        (absolute difference of head 0's logits for the two, in a forward without caches; None if
        a completion had ended).
    """
    differences = []
    for i, (request, one, other) in enumerate(zip(requests, plain, self_speculative, strict=True)):
        if one.tokens == other.tokens:
            continue
        shorter = min(len(one.tokens), len(other.tokens))
        pairs = zip(one.tokens, other.tokens, strict=False)
        at = next((j for j, (a, b) in enumerate(pairs) if a != b), shorter)
        a, b = (tokens[at] if at < len(tokens) else None for tokens in (one.tokens, other.tokens))
        gap = None
        if a is not None and b is not None:
            device = model.tok_embeddings.weight.device
            tokens_BT = torch.tensor([[*request.prompt, *one.tokens[:at]]], device=device)
            logits_V = model(tokens_BT)[0, -1, 0]
            gap = (logits_V[a] - logits_V[b]).abs().item()
        differences.append(
            {"request": i, "position": at, "plain": a, "self_speculative": b, "logit_gap": gap}
        )
    return {"identical": not differences, "differences": differences}


def requests_from_texts(
    tokenizer: Llama2Tokenizer, texts: Sequence[str], *, n_requests: int, prompt_tokens: int
) -> list[Request]:
    """Use the beginnings of at most ``n_requests`` texts as prompts, none over half of its text."""
    requests = []
    for text in texts:
        tokens = tokenizer.encode(text, add_eos=False)
        prompt = tokens[: min(prompt_tokens, len(tokens) // 2)]
        if prompt and len(requests) < n_requests:
            requests.append(Request(tuple(prompt), seed=0))
    return requests


def measure_decoding(
    model: MTPTransformer,
    tokenizer: Llama2Tokenizer,
    requests: list[Request],
    *,
    batch_size: int,
    repeats: int = 3,
    **settings,
) -> dict:
    """Time both decodings on the same requests, batch by batch in one run.

    Times are wall-clock seconds of ``generate``, including prefill, caches and decoding of text.

    Args:
        requests: decoded in one call of ``generate``.
        batch_size: of that call.
        repeats: how often all requests are decoded in both ways, after one batch to warm up.
        settings: the other arguments of ``generate``, without ``decoding``.

    Returns:
        ``identical`` and ``differences`` as ``compare_decodings`` gives them;
        ``tokens_per_forward``: new tokens of a row per forward pass in self-speculative decoding,
        without the prefill and its token, None if nothing followed the prefill;
        ``acceptance_per_head``: for heads 1..K - 1 the share of forwards that kept the guesses of
        all heads up to this one, so tokens_per_forward is 1 + their sum; for each decoding its
        ``_seconds`` of each repeat and ``_tokens_per_s``, new tokens per median second.
    """
    if not requests:
        raise ValueError("there are no requests to measure decoding with")
    if batch_size < 1 or repeats < 1:
        raise ValueError(
            f"batch_size and repeats must be at least 1, got {batch_size} and {repeats}"
        )
    settings["batch_size"] = batch_size
    on_cuda = model.tok_embeddings.weight.is_cuda

    def decode(decoding: Decoding, requests: list[Request]) -> tuple[list[Generation], float]:
        start = time.perf_counter()
        done = generate(model, tokenizer, requests, decoding=decoding, **settings)
        if on_cuda:
            torch.cuda.synchronize()
        return done, time.perf_counter() - start

    for decoding in DECODINGS:
        decode(decoding, requests[:batch_size])
    seconds: dict[str, list[float]] = {decoding: [] for decoding in DECODINGS}
    done: dict[str, list[Generation]] = {}  # of the last repeat
    for turn in range(repeats):
        # In turn, and each first in turn, so that a machine that slows down favours neither.
        for decoding in reversed(DECODINGS) if turn % 2 else DECODINGS:
            done[decoding], elapsed = decode(decoding, requests)
            seconds[decoding].append(elapsed)
    speed = {d: sum(len(g.tokens) for g in done[d]) / median(seconds[d]) for d in DECODINGS}
    fast = done["self_speculative"]
    forwards = sum(g.forwards for g in fast)
    tokens = sum(len(g.tokens) - 1 for g in fast)
    accepted = [sum(counts) for counts in zip(*(g.accepted for g in fast), strict=True)]
    return {
        **compare_decodings(model, requests, done["plain"], fast),
        "tokens_per_forward": tokens / forwards if forwards else None,
        "acceptance_per_head": [n / forwards if forwards else None for n in accepted],
        **{f"{decoding}_seconds": seconds[decoding] for decoding in DECODINGS},
        **{f"{decoding}_tokens_per_s": speed[decoding] for decoding in DECODINGS},
        "speedup": speed["self_speculative"] / speed["plain"],
    }
