"""Finds evaluation tasks (MBPP's test set, HumanEval) in training data, by content.

A task is its description as a list of lower-case alphanumeric words. A text contains the task if it
has these words in sequence, whatever the template, layout or file around them, even in a string
inside JSON. Code alone, without the description, is not found. ``eval_prompts.json`` holds hashes,
and the first two words; ``benchmarks/make_eval_prompts.py`` makes it.
"""

import hashlib
import json
import re
from itertools import compress, count
from pathlib import Path

HASHES = Path(__file__).with_name("eval_prompts.json")
ANCHOR = 4  # words: enough to be rare, fewer than the shortest description

# Of each byte what it is in a word, in lower case, or a space.
_FOLDED = bytes(ord(chr(b).lower()) if b < 128 and chr(b).isalnum() else 32 for b in range(256))
_JSON_ESCAPE = re.compile(r'\\[nrt"]')


def words_of(text: str) -> list[str]:
    """Lower-case alphanumeric words of a text; the letter of a JSON escape is not part of one."""
    return [word.decode() for word in _words(text)]


def _words(text: str) -> list[bytes]:
    if "\\" in text:
        text = _JSON_ESCAPE.sub(" ", text)
    if not text.isascii():  # whose lower case may be: of the Kelvin sign it is "k"
        text = text.lower()
    # Four times as fast as a regular expression for the words.
    return text.encode("ascii", "replace").translate(_FOLDED).split()


def _hash(words: list[bytes]) -> bytes:
    return hashlib.blake2b(b" ".join(words), digest_size=8).digest()


def hash_words(words: list[str]) -> str:
    """Short hash of a word sequence, equal on every machine."""
    return _hash([word.encode() for word in words]).hex()


class EvaluationGuard:
    """Finds evaluation tasks in texts, by the hashes in a file."""

    def __init__(self, path: Path = HASHES) -> None:
        content = json.loads(path.read_text())
        self._seconds: dict[bytes, set[bytes]] = {}
        for pair in content["first two words"]:
            first, second = pair.encode().split()
            self._seconds.setdefault(first, set()).add(second)
        self._by_anchor: dict[bytes, list[tuple[str, int, bytes]]] = {}
        for task_id, n_words, anchor, full in content["items"]:
            task = task_id, n_words, bytes.fromhex(full)
            self._by_anchor.setdefault(bytes.fromhex(anchor), []).append(task)

    def find(self, text: str) -> str | None:
        """The first evaluation task that ``text`` contains, by id ("MBPP/11"), or None."""
        words = _words(text)
        # Nearly no text has two such words; hashing every four would take as long as tokenising.
        seconds = self._seconds
        for i in compress(count(), map(seconds.__contains__, words[:-1])):
            if words[i + 1] not in seconds[words[i]]:
                continue
            for task_id, n_words, full in self._by_anchor.get(_hash(words[i : i + ANCHOR]), ()):
                if _hash(words[i : i + n_words]) == full:
                    return task_id
        return None
