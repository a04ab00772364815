"""Turns text into token ids, with the supervision and noise flag of every token.

ids = BOS + encode(prompt + response) + EOS, encoded as ONE string: encoded separately, the pieces
at the boundary would differ from what the model sees when it continues a prompt.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from sentencepiece import sentencepiece_model_pb2
from torchtune.models.llama2 import Llama2Tokenizer

_SPACE = "\u2581"
_BYTE = 6  # ModelProto.SentencePiece.Type

# One number for all tokens of a response, or [start, end, weight] in characters of it.
Weight = float | Sequence[tuple[int, int, float]] | None


class TokenRow(NamedTuple):
    """One tokenised row; four arrays of equal length."""

    tokens: np.ndarray  # int32, token ids
    keep: np.ndarray  # bool, token is supervised
    noise: np.ndarray  # bool, token overlaps a span declared corrupted
    weight: np.ndarray  # fp32, what the data say of the token, 1 where they say nothing


def encode_with_offsets(
    tokenizer: Llama2Tokenizer, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Encode without BOS and EOS, and return each token's [begin, end) in characters of ``text``.

    A character outside the vocabulary becomes one byte token per UTF-8 byte; all of them get the
    character. The space that Llama-2's tokenizer puts before a text is not part of it: on its own
    it has the empty span (0, 0).
    """
    ids, begins, ends = _encode(tokenizer, text)
    return ids.tolist(), list(zip(begins.tolist(), ends.tolist(), strict=True))


def _encode(tokenizer: Llama2Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``encode_with_offsets``, in arrays: int32 ids, int64 begins and ends.

    Where tokens are follows from the bytes of their pieces, which is three times as fast as asking
    SentencePiece. What does not add up to the text, a character that it rewrites, is asked.
    """
    ids, ends = _encode_to_bytes(tokenizer, text)
    if ends is None:
        return _encode_slowly(tokenizer, text)
    begins = np.maximum(np.concatenate([[0], ends[:-1]]), 0)
    bytes_ = text.encode()
    if not text.isascii():
        # The character of each byte: one begins wherever no byte continues another.
        char_of = np.cumsum((np.frombuffer(bytes_, np.uint8) & 0xC0) != 0x80) - 1
        begins = char_of[begins]
        ends = np.where(ends > 0, char_of[ends - 1] + 1, 0)
    return ids, begins, ends


def _encode_to_bytes(tokenizer: Llama2Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Int32 ids, and where each ends in bytes of ``text``; None if the pieces do not tell."""
    processor = tokenizer._spm_model.spm_model
    ids = processor.encode(text, return_type="numpy")
    sizes, n_dummy = _piece_sizes(processor)
    if sizes is None or not len(ids):
        return ids, None
    ends = np.cumsum(sizes.take(ids)) - n_dummy
    return ids, ends if ends[-1] == len(text.encode()) else None


def _encode_slowly(
    tokenizer: Llama2Tokenizer, text: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    processor = tokenizer._spm_model.spm_model
    encoded = processor.encode(text, out_type="offset_mapping")
    # SentencePiece assigns a character of several byte tokens only to the last of them.
    spans = [
        (begin, begin + 1) if begin == end and processor.is_byte(token) else (begin, end)
        for token, (begin, end) in zip(encoded["ids"], encoded["offsets"], strict=True)
    ]
    begins, ends = np.array(spans, np.int64).reshape(-1, 2).T
    return np.array(encoded["ids"], np.int32), begins, ends


@lru_cache(maxsize=4)
def _piece_sizes(processor: Any) -> tuple[np.ndarray | None, int]:
    """UTF-8 bytes of text that each id stands for, and those of the space put before a text.

    None if the model rewrites text before it encodes it.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(processor.serialized_model_proto())
    how = proto.normalizer_spec
    rewrites = how.precompiled_charsmap or how.remove_extra_whitespaces
    if rewrites or not how.escape_whitespaces or proto.trainer_spec.treat_whitespace_as_suffix:
        return None, 0
    sizes = [
        1 if p.type == _BYTE else len(p.piece.replace(_SPACE, " ").encode()) for p in proto.pieces
    ]
    sizes[processor.unk_id()] = 0  # whatever it stands for does not add up
    return np.array(sizes, np.int64), int(how.add_dummy_prefix)


def encode_pair(
    tokenizer: Llama2Tokenizer,
    prompt: str,
    response: str,
    noise: Sequence[Sequence[int]] = (),
    weight: Weight = None,
) -> TokenRow:
    """Tokenise prompt + response; a token with a character of the response is supervised.

    BOS and the prompt are not supervised, the EOS after the response is. The row may have any
    length.

    Args:
        noise: corrupted spans, [start, end) in characters of ``response``.
        weight: one number for all, or weights of spans [start, end, weight) in characters of
            ``response``, 1 outside of them. A token has the mean over its characters of the
            response, EOS what the last character has.
    """
    text, n = prompt + response, len(prompt)
    if not noise and not isinstance(weight, Sequence):  # nothing asks for characters
        ids, ends = _encode_to_bytes(tokenizer, text)
        if ends is not None:
            keep = np.ones(len(ids) + 2, bool)
            keep[0], keep[1:-1] = False, ends > len(prompt.encode())
            row = _evenly(tokenizer, ids, weight)
            if weight is not None:
                row.weight[~keep] = 1
            return row._replace(keep=keep)
    ids, begins, ends = _encode(tokenizer, text)
    tokens = _between(tokenizer, ids)
    keep = np.ones(len(tokens), bool)
    keep[0], keep[1:-1] = False, ends > n
    marks = _overlaps(begins, ends, [(s + n, e + n) for s, e in noise], len(text))
    weights = np.ones(len(tokens), np.float32)
    if weight is not None:
        weights[1:] = _weights(np.maximum(begins, n) - n, ends - n, weight, len(response))
    return TokenRow(tokens, keep, marks, np.where(keep, weights, np.float32(1)))


def encode_text(
    tokenizer: Llama2Tokenizer,
    text: str,
    noise: Sequence[Sequence[int]] = (),
    weight: Weight = None,
) -> TokenRow:
    """Tokenise plain text: every token is supervised. See ``encode_pair`` for the others."""
    if not noise and not isinstance(weight, Sequence):  # nothing asks where the tokens are
        ids = tokenizer._spm_model.spm_model.encode(text, return_type="numpy")
        return _evenly(tokenizer, ids, weight)
    ids, begins, ends = _encode(tokenizer, text)
    tokens = _between(tokenizer, ids)
    weights = np.ones(len(tokens), np.float32)
    if weight is not None:
        weights[1:] = _weights(begins, ends, weight, len(text))
    marks = _overlaps(begins, ends, noise, len(text))
    return TokenRow(tokens, np.ones(len(tokens), bool), marks, weights)


def _between(tokenizer: Llama2Tokenizer, ids: np.ndarray) -> np.ndarray:
    """The ids between BOS and EOS."""
    tokens = np.empty(len(ids) + 2, np.int32)
    tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
    return tokens


def _evenly(tokenizer: Llama2Tokenizer, ids: np.ndarray, weight: float | None) -> TokenRow:
    """A row that is supervised throughout, of one weight, without noise."""
    n = len(ids) + 2
    weights = np.full(n, 1 if weight is None else weight, np.float32)
    return TokenRow(_between(tokenizer, ids), np.ones(n, bool), np.zeros(n, bool), weights)


def encode_turns(
    tokenizer: Llama2Tokenizer, turns: Sequence[tuple[str, str]], weight: float | None = None
) -> TokenRow:
    """Tokenise prompts and responses that follow each other, each pair between BOS and EOS."""
    rows = [encode_pair(tokenizer, *turn, weight=weight) for turn in turns]
    return TokenRow(*map(np.concatenate, zip(*rows, strict=True)))


def _weights(begins: np.ndarray, ends: np.ndarray, weight: Any, length: int) -> np.ndarray:
    """Weights of tokens and of the EOS after them; begins and ends in characters, fp32.

    What has no character has the weight of the one it stands before.
    """
    if not isinstance(weight, Sequence):
        return np.full(len(begins) + 1, weight, np.float32)
    of_character = np.ones(length + 1)
    for start, end, value in weight:
        of_character[start:end] = value
    of_character[length] = of_character[length - 1]
    begins, ends = np.append(begins, length - 1), np.append(np.maximum(ends, 0), length)
    ends = np.maximum(begins, ends)
    # Sums of each [begin, end) by itself: differences of running sums would round.
    sums = np.add.reduceat(of_character, np.stack([begins, ends], 1).ravel())[::2]
    return (sums / np.maximum(ends - begins, 1)).astype(np.float32)


def _overlaps(
    begins: np.ndarray, ends: np.ndarray, noise: Sequence[Sequence[int]], length: int
) -> np.ndarray:
    """Which tokens, BOS and EOS included, contain a character of a corrupted span."""
    marks = np.zeros(len(begins) + 2, bool)
    if noise:
        corrupted = np.zeros(length, np.int64)
        for start, end in noise:
            corrupted[start:end] = 1
        before = np.concatenate([[0], np.cumsum(corrupted)])  # corrupted characters before each one
        marks[1:-1] = before[ends] > before[begins]
    return marks


def split_row(row: TokenRow, max_seq_len: int) -> Iterator[TokenRow]:
    """Split a plain-text row into consecutive pieces of at most ``max_seq_len`` tokens.

    A last piece of one token is dropped because it predicts nothing.
    """
    if 1 < len(row.tokens) <= max_seq_len:
        yield row
        return
    for start in range(0, len(row.tokens), max_seq_len):
        piece = TokenRow(*(column[start : start + max_seq_len] for column in row))
        if len(piece.tokens) > 1:
            yield piece
