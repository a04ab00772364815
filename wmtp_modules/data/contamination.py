"""Keep evaluation tasks out of training data: MBPP's test tasks and HumanEval, found by content.

A task is its description as a list of lower-case alphanumeric words. A text contains the task when
these words stand in it one after the other, whatever the template, layout or file around them,
also when the text is a string inside JSON. Code alone, without the description, is not found.
``eval_prompts.json`` holds hashes only; ``make_eval_prompts`` makes it.
"""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

HASHES = Path(__file__).with_name("eval_prompts.json")
ANCHOR = 4  # words; long enough to be rare, shorter than the shortest description

_WORD = re.compile(r"[a-z0-9]+")
_JSON_ESCAPE = re.compile(r'\\[nrt"]')


def words_of(text: str) -> list[str]:
    """Lower-case alphanumeric words of a text; the letter of a JSON escape is none of a word."""
    return _WORD.findall(_JSON_ESCAPE.sub(" ", text).lower())


def hash_words(words: list[str]) -> str:
    """Short hash of a word sequence, equal on every machine."""
    return hashlib.blake2b(" ".join(words).encode(), digest_size=8).hexdigest()


class EvaluationGuard:
    """Finds evaluation tasks in texts.

    Args:
        path: hashes as ``make_eval_prompts`` writes them.
    """

    def __init__(self, path: Path = HASHES) -> None:
        items = json.loads(path.read_text())["items"]
        firsts = {first for _, _, first, _, _ in items}
        self._by_anchor: dict[str, list[tuple[str, int, str]]] = {}
        for task_id, n_words, _, anchor, full in items:
            self._by_anchor.setdefault(anchor, []).append((task_id, n_words, full))
        # Hashing a distinct word once, and four words only behind a known first word, lets the
        # scan run at the speed of a loop over words.
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
