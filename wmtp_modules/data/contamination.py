"""Finds evaluation tasks (MBPP's test set, HumanEval) in training data, by content.

A task is its description as a list of lower-case alphanumeric words. A text contains the task if it
has these words in sequence, whatever the template, layout or file around them, even in a string
inside JSON. Code alone, without the description, is not found. ``eval_prompts.json`` holds hashes
only; ``benchmarks/make_eval_prompts.py`` makes it.
"""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

HASHES = Path(__file__).with_name("eval_prompts.json")
ANCHOR = 4  # words: enough to be rare, fewer than the shortest description

_WORD = re.compile(r"[a-z0-9]+")
_JSON_ESCAPE = re.compile(r'\\[nrt"]')


def words_of(text: str) -> list[str]:
    """Lower-case alphanumeric words of a text; the letter of a JSON escape is not part of one."""
    return _WORD.findall(_JSON_ESCAPE.sub(" ", text).lower())


def hash_words(words: list[str]) -> str:
    """Short hash of a word sequence, equal on every machine."""
    return hashlib.blake2b(" ".join(words).encode(), digest_size=8).hexdigest()


class EvaluationGuard:
    """Finds evaluation tasks in texts, by the hashes in a file."""

    def __init__(self, path: Path = HASHES) -> None:
        items = json.loads(path.read_text())["items"]
        firsts = {first for _, _, first, _, _ in items}
        self._by_anchor: dict[str, list[tuple[str, int, str]]] = {}
        for task_id, n_words, _, anchor, full in items:
            self._by_anchor.setdefault(anchor, []).append((task_id, n_words, full))
        # Hashing each distinct word once, and four words only after a known first word, makes the
        # scan as fast as a loop over words.
        self._is_first = lru_cache(1 << 20)(lambda word: hash_words([word]) in firsts)

    def find(self, text: str) -> str | None:
        """The first evaluation task that ``text`` contains, by id ("MBPP/11"), or None."""
        words = words_of(text)
        for i, is_first in enumerate(map(self._is_first, words)):
            if not is_first:
                continue
            for task_id, n_words, full in self._by_anchor.get(
                hash_words(words[i : i + ANCHOR]), ()
            ):
                if hash_words(words[i : i + n_words]) == full:
                    return task_id
        return None
