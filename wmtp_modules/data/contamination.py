"""Finds evaluation tasks (MBPP's test set, HumanEval) in training data, by content.

A task is its description as a list of lower-case alphanumeric words. A text contains the task if it
has these words in sequence, whatever the template, layout or file around them, even in a string
inside JSON. Code alone, without the description, is not found. ``eval_prompts.json`` holds hashes,
and the first two words; ``benchmarks/make_eval_prompts.py`` makes it.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HASHES = Path(__file__).with_name("eval_prompts.json")
ANCHOR = 4  # words: enough to be rare, fewer than the shortest description
NEAR = 128  # bytes in which they nearly always are
TOGETHER = 16  # texts: with their words as numbers they fit a processor's cache

# Of each byte what it is in a word, in lower case, or a space.
_FOLDED = bytes(ord(chr(b).lower()) if b < 128 and chr(b).isalnum() else 32 for b in range(256))
_SPACE = 32
_MASKS = np.array([2 ** (8 * n) - 1 for n in range(9)], np.uint64)  # the first n of 8 bytes
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # odd: a product loses nothing
_JSON_ESCAPE = re.compile(r'\\[nrt"]')


def words_of(text: str) -> list[str]:
    """Lower-case alphanumeric words of a text; the letter of a JSON escape is not part of one."""
    return [word.decode() for word in _folded(text).split()]


def _folded(text: str) -> bytes:
    """Its words in lower case, and spaces."""
    if "\\" in text:
        text = _JSON_ESCAPE.sub(" ", text)
    if not text.isascii():  # whose lower case may be: of the Kelvin sign it is "k"
        text = text.lower()
    return text.encode("ascii", "replace").translate(_FOLDED)


def _hash(words: list[bytes]) -> bytes:
    return hashlib.blake2b(b" ".join(words), digest_size=8).digest()


def hash_words(words: list[str]) -> str:
    """Short hash of a word sequence, equal on every machine."""
    return _hash([word.encode() for word in words]).hex()


class EvaluationGuard:
    """Finds evaluation tasks in texts, by the hashes in a file."""

    def __init__(self, path: Path = HASHES) -> None:
        content = json.loads(path.read_text())
        self._may_begin = np.zeros(2**16, bool)  # by a hash of two words, whether a task may
        for pair in content["first two words"]:
            _, pairs = _pairs_of(f" {pair} ".encode())
            self._may_begin[pairs] = True
        self._by_anchor: dict[bytes, list[tuple[str, int, bytes]]] = {}
        for task_id, n_words, anchor, full in content["items"]:
            task = task_id, n_words, bytes.fromhex(full)
            self._by_anchor.setdefault(bytes.fromhex(anchor), []).append(task)

    def find(self, text: str) -> str | None:
        """The first evaluation task that ``text`` contains, by id ("MBPP/11"), or None."""
        return self.find_each([text])[0]

    def find_each(self, texts: Sequence[str]) -> list[str | None]:
        """``find`` of each text. Some are searched together, which takes a third of the time."""
        found: list[str | None] = []
        for at in range(0, len(texts), TOGETHER):
            folded = [b" %b " % _folded(text) for text in texts[at : at + TOGETHER]]
            starts, pairs = _pairs_of(b"".join(folded))
            starts = starts[self._may_begin[pairs]]  # of nearly no other words
            ends = np.cumsum([len(one) for one in folded])
            first = np.searchsorted(starts, ends - [len(one) for one in folded])
            last = np.searchsorted(starts, ends)
            for one, end, i, j in zip(folded, ends, first, last, strict=True):
                found.append(self._at(one, starts[i:j] - (end - len(one))))
        return found

    def _at(self, folded: bytes, starts: np.ndarray) -> str | None:
        """The first task that begins at one of these places."""
        for start in starts.tolist():
            words = folded[start : start + NEAR].split(None, ANCHOR)
            if len(words) <= ANCHOR:  # the last of them may be cut
                words = folded[start:].split(None, ANCHOR)
            for task_id, n_words, full in self._by_anchor.get(_hash(words[:ANCHOR]), ()):
                if _hash(folded[start:].split(None, n_words)[:n_words]) == full:
                    return task_id
        return None


def _pairs_of(folded: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where each word but the last begins, and 16 bits of what it and the next one begin with.

    ``folded`` begins and ends with a space.
    """
    is_word = np.frombuffer(folded, np.uint8) != _SPACE
    starts = np.flatnonzero(is_word[1:] > is_word[:-1]) + 1
    ends = np.flatnonzero(is_word[1:] < is_word[:-1]) + 1
    # The first eight bytes of each word as one number, without those that are not part of it.
    eight = np.ndarray(len(folded), "<u8", folded + bytes(8), strides=(1,))
    words = eight[starts] & _MASKS[np.minimum(ends - starts, 8)]
    return starts[:-1], (words[:-1] * _MIX[0] + words[1:] * _MIX[1]) >> np.uint64(48)
