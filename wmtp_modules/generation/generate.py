"""Completions of a batch of prompts."""

from dataclasses import dataclass
from typing import Literal

import torch
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.generation.sampling import check_sampling, request_uniforms
from wmtp_modules.generation.self_speculative import Decoder, Row
from wmtp_modules.models.mtp_transformer import MTPTransformer

DECODINGS = ("plain", "self_speculative")


@dataclass(frozen=True)
class Request:
    """One completion to make.

    Attributes:
        prompt: token ids, BOS included.
        seed: of this sample's uniform numbers, of which the lowest 32 bits count.
    """

    prompt: tuple[int, ...]
    seed: int


@dataclass
class Generation:
    """One completion.

    Attributes:
        tokens: every token drawn, the one that ended the row included.
        text: what the tokens add to the prompt's text: leading spaces and newlines kept, cut
            before the first stop string, without EOS.
        finish_reason: "eos", "stop" (a stop string) or "length" (``max_new_tokens``).
        forwards: forwards that the row took part in after the prefill, which gives the first
            token: ``len(tokens) == 1 + forwards + sum(accepted)``.
        accepted: for heads 1..K - 1, the forwards that kept the head's guess, those of the heads
            before it too, and a token behind it. Where the row ended earlier it is not counted.
    """

    tokens: list[int]
    text: str
    finish_reason: Literal["eos", "stop", "length"]
    forwards: int
    accepted: list[int]


@torch.inference_mode()
def generate(
    model: MTPTransformer,
    tokenizer: Llama2Tokenizer,
    requests: list[Request],
    *,
    decoding: Literal["plain", "self_speculative"],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    stop: tuple[str, ...],
    dtype: torch.dtype,
) -> list[Generation]:
    """Complete some prompts together.

    A completion depends on its request and the settings only: not on the other requests, their
    order or number, nor on ``decoding``, up to the rounding of the logits.

    Args:
        model: not sharded. Caches that it has are dropped.
        tokenizer: gives the EOS id and decodes.
        requests: all of them form one batch; equal prompts are run once.
        decoding: "plain" runs the trunk and head 0 for each token; "self_speculative" gives the
            same tokens in fewer forwards.
        max_new_tokens: tokens after which a completion ends.
        temperature: 0 is greedy.
        top_p: see ``next_token_probs``; 1 is off.
        top_k: see ``next_token_probs``; 0 is off.
        stop: strings that end a completion.
        dtype: of the parameters, and so of the keys and values.

    Returns:
        One completion for each request, in order.

    Raises:
        ValueError: if a value is out of range, a prompt is empty, too long for the model or has
            tokens that it does not know, the model's parameters are of another dtype, or its
            logits are not finite.
    """
    _check(model, requests, decoding, max_new_tokens, stop, dtype)
    check_sampling(temperature, top_k, top_p)
    if not requests:
        return []
    n_heads = model.n_future_tokens
    n_drafts = n_heads - 1 if decoding == "self_speculative" else 0
    rows = [Row(r.prompt, tokenizer, stop, max_new_tokens, n_drafts) for r in requests]
    uniforms_BN = None
    if temperature > 0:
        uniforms_BN = request_uniforms([r.seed for r in requests], max_new_tokens)
        uniforms_BN = uniforms_BN.to(model.tok_embeddings.weight.device)
    prompts = {r.prompt for r in requests}
    was_training = model.training
    model.eval()
    try:
        model.setup_caches(len(prompts), dtype, cache_len=max(map(len, prompts)) + max_new_tokens)
        Decoder(
            model,
            list(rows),
            uniforms_BN,
            n_drafts=n_drafts,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        ).run()
    finally:
        model.delete_caches()
        model.train(was_training)
    return [
        Generation(
            tokens=row.tokens,
            text=row.text.text,
            finish_reason=row.finish_reason,
            forwards=row.forwards,
            accepted=row.accepted + [0] * (n_heads - 1 - n_drafts),
        )
        for row in rows
    ]


def _check(
    model: MTPTransformer,
    requests: list[Request],
    decoding: str,
    max_new_tokens: int,
    stop: tuple[str, ...],
    dtype: torch.dtype,
) -> None:
    if decoding not in DECODINGS:
        raise ValueError(f"decoding is {decoding!r}: choose one of {', '.join(DECODINGS)}")
    if decoding == "self_speculative" and model.n_future_tokens == 1:
        raise ValueError(
            "self_speculative decoding needs heads that guess, and this model has one head only: "
            "use decoding plain"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1")
    if isinstance(stop, str) or "" in stop:
        raise ValueError(f"stop is {stop!r}: it must be a tuple of strings, none of them empty")
    of_model = model.tok_embeddings.weight.dtype
    if dtype != of_model:
        raise ValueError(
            f"dtype is {dtype} and the model's parameters are {of_model}: convert the model first, "
            "model.to(dtype)"
        )
    for i, request in enumerate(requests):
        if not request.prompt:
            raise ValueError(f"the prompt of request {i} has no tokens: begin it with BOS")
        if len(request.prompt) + max_new_tokens > model.max_seq_len:
            raise ValueError(
                f"the prompt of request {i} has {len(request.prompt)} tokens, and with "
                f"max_new_tokens {max_new_tokens} that exceeds the model's max_seq_len "
                f"{model.max_seq_len}: lower max_new_tokens, shorten the prompt or raise "
                "model.max_seq_len"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < model.args["vocab_size"]:
            raise ValueError(
                f"the prompt of request {i} has ids outside of the model's vocabulary of "
                f"{model.args['vocab_size']}: it was made with another tokenizer"
            )
