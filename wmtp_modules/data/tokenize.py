"""Turns text into token ids, with the supervision and noise flag of every token.

ids = BOS + encode(prompt + response) + EOS, encoded as ONE string: encoded separately, the pieces
at the boundary would differ from what the model sees when it continues a prompt.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torchtune.models.llama2 import Llama2Tokenizer


class TokenRow(NamedTuple):
    """One tokenised row; three arrays of equal length."""

    tokens: np.ndarray  # int32, token ids
    keep: np.ndarray  # bool, token is supervised
    noise: np.ndarray  # bool, token overlaps a span declared corrupted


def encode_with_offsets(
    tokenizer: Llama2Tokenizer, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Encode without BOS and EOS, and return each token's [begin, end) in characters of ``text``.

    A character outside the vocabulary becomes one byte token per UTF-8 byte; SentencePiece assigns
    the character only to the last of them, here all of them get it. The space that Llama-2's
    tokenizer puts before a text is not part of it: on its own it has the empty span (0, 0).
    """
    processor = tokenizer._spm_model.spm_model
    encoded = processor.encode(text, out_type="offset_mapping")
    spans = [
        (begin, begin + 1) if begin == end and processor.is_byte(token) else (begin, end)
        for token, (begin, end) in zip(encoded["ids"], encoded["offsets"], strict=True)
    ]
    return encoded["ids"], spans


def encode_pair(
    tokenizer: Llama2Tokenizer, prompt: str, response: str, noise: Sequence[Sequence[int]] = ()
) -> TokenRow:
    """Tokenise prompt + response; a token with a character of the response is supervised.

    BOS and the prompt are not supervised, the EOS after the response is. ``noise`` has corrupted
    spans, [start, end) in characters of ``response``. The row may have any length.
    """
    ids, spans = encode_with_offsets(tokenizer, prompt + response)
    tokens = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], np.int32)
    keep = np.array([False, *(end > len(prompt) for _, end in spans), True])
    shifted = [(start + len(prompt), end + len(prompt)) for start, end in noise]
    return TokenRow(tokens, keep, _overlaps(spans, shifted, len(prompt) + len(response)))


def encode_text(
    tokenizer: Llama2Tokenizer, text: str, noise: Sequence[Sequence[int]] = ()
) -> TokenRow:
    """Tokenise plain text: every token is supervised. See ``encode_pair`` for ``noise``."""
    if not noise:  # three times as fast as with offsets
        tokens = np.array(tokenizer.encode(text), np.int32)
        return TokenRow(tokens, np.ones(len(tokens), bool), np.zeros(len(tokens), bool))
    ids, spans = encode_with_offsets(tokenizer, text)
    tokens = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], np.int32)
    return TokenRow(tokens, np.ones(len(tokens), bool), _overlaps(spans, noise, len(text)))


def _overlaps(
    spans: Sequence[tuple[int, int]], noise: Sequence[Sequence[int]], length: int
) -> np.ndarray:
    """Which tokens, BOS and EOS included, contain a character of a corrupted span."""
    corrupted = np.zeros(length, np.int64)
    for start, end in noise:
        corrupted[start:end] = 1
    before = np.concatenate([[0], np.cumsum(corrupted)])  # corrupted characters before each one
    begins, ends = np.array(spans, np.int64).reshape(-1, 2).T
    return np.array([False, *(before[ends] > before[begins]), False])


def split_row(row: TokenRow, max_seq_len: int) -> Iterator[TokenRow]:
    """Split a plain-text row into consecutive pieces of at most ``max_seq_len`` tokens.

    A last piece of one token is dropped because it predicts nothing.
    """
    for start in range(0, len(row.tokens), max_seq_len):
        piece = TokenRow(*(column[start : start + max_seq_len] for column in row))
        if len(piece.tokens) > 1:
            yield piece
