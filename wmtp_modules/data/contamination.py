"""Finds evaluation tasks (MBPP's test set, HumanEval) in training data, by content.

A task is its description as a list of lower-case alphanumeric words. A text contains the task if it
has these words in sequence, whatever the template, layout or file around them, even in a string
inside JSON. Code alone, without the description, is not found. ``eval_prompts.json`` holds hashes
only; ``benchmarks/make_eval_prompts.py`` makes it.
"""

import hashlib
import json
import re
from itertools import compress, count
from pathlib import Path

HASHES = Path(__file__).with_name("eval_prompts.json")
ANCHOR = 4  # words: enough to be rare, fewer than the shortest description

MOST_KNOWN = 1 << 20  # distinct words that are remembered

_ALNUM = b"abcdefghijklmnopqrstuvwxyz0123456789"
_TO_SPACE = bytes(byte if byte in _ALNUM else 32 for byte in range(256))
_JSON_ESCAPE = re.compile(r'\\[nrt"]')


def words_of(text: str) -> list[str]:
    """Lower-case alphanumeric words of a text; the letter of a JSON escape is not part of one."""
    return [word.decode() for word in _words(text)]


def _words(text: str) -> list[bytes]:
    if "\\" in text:
        text = _JSON_ESCAPE.sub(" ", text)
    # Four times as fast as a regular expression for the words.
    return text.lower().encode("ascii", "replace").translate(_TO_SPACE).split()


def _hash(words: list[bytes]) -> bytes:
    return hashlib.blake2b(b" ".join(words), digest_size=8).digest()


def hash_words(words: list[str]) -> str:
    """Short hash of a word sequence, equal on every machine."""
    return _hash([word.encode() for word in words]).hex()


class EvaluationGuard:
    """Finds evaluation tasks in texts, by the hashes in a file."""

    def __init__(self, path: Path = HASHES) -> None:
        items = json.loads(path.read_text())["items"]
        self._firsts = {bytes.fromhex(first) for _, _, first, _, _ in items}
        self._by_anchor: dict[bytes, list[tuple[str, int, bytes]]] = {}
        for task_id, n_words, _, anchor, full in items:
            task = task_id, n_words, bytes.fromhex(full)
            self._by_anchor.setdefault(bytes.fromhex(anchor), []).append(task)
        # Hashing each distinct word once, and four words only after a known first word, makes the
        # scan a fraction of what tokenising takes.
        self._known: set[bytes] = set()
        self._known_firsts: set[bytes] = set()

    def find(self, text: str) -> str | None:
        """The first evaluation task that ``text`` contains, by id ("MBPP/11"), or None."""
        words = _words(text)
        if len(self._known) > MOST_KNOWN:
            self._known.clear()
        new = set(words) - self._known
        self._known |= new
        self._known_firsts.update(word for word in new if _hash([word]) in self._firsts)
        # In one go: nearly no text has an anchor, and a call for each would take as long again.
        blake2b, join, starts = hashlib.blake2b, b" ".join, self._known_firsts.__contains__
        places = list(compress(count(), map(starts, words)))
        anchors = [blake2b(join(words[i : i + ANCHOR]), digest_size=8).digest() for i in places]
        if self._by_anchor.keys().isdisjoint(anchors):
            return None
        for i, anchor in zip(places, anchors, strict=True):
            for task_id, n_words, full in self._by_anchor.get(anchor, ()):
                if _hash(words[i : i + n_words]) == full:
                    return task_id
        return None
