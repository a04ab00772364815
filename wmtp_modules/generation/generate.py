"""Generates completions of prompts, a number of them at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.generation.sampling import check_sampling
from wmtp_modules.generation.self_speculative import Decoder, FinishReason, Row
from wmtp_modules.models.mtp_transformer import MTPTransformer

Decoding = Literal["plain", "self_speculative"]
DECODINGS: tuple[Decoding, ...] = get_args(Decoding)


@dataclass(frozen=True)
class Request:
    """One completion to make.

    Attributes:
        prompt: token ids, BOS included.
        seed: of this sample's uniform numbers; only the lowest 32 bits count.
    """

    prompt: tuple[int, ...]
    seed: int


@dataclass
class Generation:
    """One completion.

    Attributes:
        tokens: every token drawn, including the one that ended the row.
        text: what the tokens add to the prompt's text, with leading spaces and newlines, up to the
            first stop string, without EOS.
        finish_reason: "eos", "stop" (a stop string) or "length" (``max_new_tokens``).
        forwards: forward passes of the row after the prefill, which gives the first token:
            ``len(tokens) == 1 + forwards + sum(accepted)``.
        accepted: for heads 1..K - 1, the forwards that kept the guesses of all heads up to this
            one and a token after them. Guesses beyond the end of the row are not counted.
    """

    tokens: list[int]
    text: str
    finish_reason: FinishReason
    forwards: int
    accepted: list[int]


def generate(
    model: MTPTransformer,
    tokenizer: Llama2Tokenizer,
    requests: Sequence[Request],
    **settings: Any,
) -> list[Generation]:
    """Complete prompts; settings are those of ``generate_as_completed``, order the requests'."""
    done = dict(generate_as_completed(model, tokenizer, requests, **settings))
    return [done[i] for i in range(len(requests))]


@torch.inference_mode()
def generate_as_completed(
    model: MTPTransformer,
    tokenizer: Llama2Tokenizer,
    requests: Sequence[Request],
    *,
    batch_size: int,
    decoding: Decoding,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    stop: tuple[str, ...],
    dtype: torch.dtype,
    static_shapes: bool = False,
) -> Iterator[tuple[int, Generation]]:
    """Complete any number of prompts, and yield each request's index and completion as it ends.

    Completions that end leave the batch and waiting requests enter, in their order. A completion
    depends only on its request and the settings: not on the other requests, their order or number,
    nor on ``batch_size``, ``decoding`` or ``static_shapes``, up to the rounding of the logits.

    Args:
        model: not sharded. Existing KV caches are dropped. Leave it alone until the last completion
            or until the iterator is closed: it is in eval mode and has caches meanwhile.
        requests: a prompt that lies in the caches is not run again, so equal ones belong together.
        batch_size: completions made at a time. The caches are as long as the longest prompt and
            ``max_new_tokens`` together, for each of them.
        decoding: "plain" runs the trunk and head 0 for each token; "self_speculative" gives the
            same tokens in fewer forwards.
        max_new_tokens: most tokens of a completion.
        temperature: 0 is greedy; for top_p (1 is off) and top_k (0 is off) see
            ``next_token_probs``.
        stop: strings that end a completion.
        dtype: of the parameters, and therefore of the keys and values.
        static_shapes: give every forward the same shapes, whatever has ended, and replay a CUDA
            graph of it on a GPU. Off by default: not measured on a GPU, and slower without one.

    Raises:
        ValueError: if a value is out of range, a prompt does not suit the model, its parameters
            have another dtype, or its logits are not finite.
    """
    _check(model, requests, batch_size, decoding, max_new_tokens, stop, dtype)
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    check_sampling(**sampling)
    if not requests:
        return
    n_heads = model.n_future_tokens
    n_drafts = n_heads - 1 if decoding == "self_speculative" else 0
    rows = [
        Row(i, request.seed, request.prompt, tokenizer, stop, max_new_tokens, n_drafts)
        for i, request in enumerate(requests)
    ]
    n_slots = min(batch_size, len(rows))
    longest = max(len(request.prompt) for request in requests) + max_new_tokens
    was_training = model.training
    model.eval()
    try:
        model.setup_caches(n_slots, dtype, cache_len=longest)
        decoder = Decoder(
            model,
            rows,
            n_slots=n_slots,
            n_drafts=n_drafts,
            max_new_tokens=max_new_tokens,
            static_shapes=static_shapes,
            **sampling,
        )
        del rows  # each is dropped as it ends
        for row in decoder.run():
            yield (
                row.index,
                Generation(
                    tokens=row.tokens,
                    text=row.text.text,
                    finish_reason=row.ended_by,
                    forwards=row.forwards,
                    accepted=row.accepted + [0] * (n_heads - 1 - n_drafts),
                ),
            )
    finally:
        model.delete_caches()
        model.train(was_training)


def _check(
    model: MTPTransformer,
    requests: Sequence[Request],
    batch_size: int,
    decoding: str,
    max_new_tokens: int,
    stop: tuple[str, ...],
    dtype: torch.dtype,
) -> None:
    if decoding not in DECODINGS:
        raise ValueError(f"decoding must be one of {', '.join(DECODINGS)}, got {decoding!r}")
    if decoding == "self_speculative" and model.n_future_tokens == 1:
        raise ValueError(
            "self_speculative decoding needs more than one head, and this model has only one: set "
            "decoding to plain"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if isinstance(stop, str) or "" in stop:
        raise ValueError(f"stop must be a tuple of non-empty strings, got {stop!r}")
    of_model = model.tok_embeddings.weight.dtype
    if dtype != of_model:
        raise ValueError(
            f"dtype is {dtype}, but the model's parameters are {of_model}: convert the "
            "model first with model.to(dtype)"
        )
    for i, request in enumerate(requests):
        if not request.prompt:
            raise ValueError(f"the prompt of request {i} is empty: start it with BOS")
        if len(request.prompt) + max_new_tokens > model.max_seq_len:
            raise ValueError(
                f"the prompt of request {i} has {len(request.prompt)} tokens, and with "
                f"max_new_tokens {max_new_tokens} that exceeds the model's max_seq_len "
                f"{model.max_seq_len}: lower max_new_tokens, shorten the prompt or raise "
                "model.max_seq_len"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < model.args["vocab_size"]:
            raise ValueError(
                f"the prompt of request {i} has ids outside the model's vocabulary of "
                f"{model.args['vocab_size']}: encode it with the model's tokenizer"
            )
