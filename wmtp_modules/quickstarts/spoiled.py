"""Makes good and bad responses for the critic's quickstart on this machine.

A response is a stretch of lines of source, its prompt the line before. A good one stands as
somebody wrote it. In a bad one every word from a random line on is replaced by a word of the same
kind and number of tokens, drawn as often as the part's files have it: punctuation, layout and
lengths stay, sense goes. The label is of the whole response; the row also records the spoiled
characters, which no critic sees.
"""

import random
import re
import sys
import sysconfig
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece as spm
from torchtune.utils import get_logger

from wmtp_modules.quickstarts.stdlib import (
    assets_folder,
    deal_files,
    deal_texts,
    train_tokenizer,
    write_rows,
)

log = get_logger("INFO")

VERSION = 2  # of the files made here; a new version makes them again
BASE_SHARE = 0.35  # of the library's own files
PARTS = {"critic": 0.5, "policy": 0.1, "heldout": 0.2}  # shares of the test files
PACKAGE = "sympy"  # ships its tests, and the lock file has one version for every Python
MIN_TOKENS = 84  # of a response
PROMPT_TOKENS = 20  # at most
TRIES = 20  # draws of a line's words, until it has as many tokens as before
TURN_WITHIN = 2 / 3  # of a response's lines, so that a third of a bad one at least is spoiled
# Escapes (\n), formats (%s) and what stands before quotes (rb"") are structure.
WORDS = re.compile(
    r"""(?<![\\%\w])(?![rRbBuUfF]{1,2}['"])(?:(?P<number>\d\w*)|(?P<word>[^\W\d]\w*))"""
)


class Word(NamedTuple):
    """A word of a source text, which a word of the same kind may replace."""

    start: int  # in characters of the text
    end: int
    kind: str  # word or number
    text: str


def words_of(source: str) -> list[Word]:
    """The words of a source text in its order: names, keywords and prose alike, and numbers."""
    return [
        Word(*found.span(), found.lastgroup or "", found[0]) for found in WORDS.finditer(source)
    ]


class Law:
    """How often words of each kind and number of tokens stand in some texts, and draws from it."""

    def __init__(self, words: list[Word], tokenizer: spm.SentencePieceProcessor) -> None:
        counts = Counter((word.kind, word.text) for word in words)
        lengths = map(len, tokenizer.encode([text for _, text in counts]))
        self._n_tokens = {text: n for (_, text), n in zip(counts, lengths, strict=True)}
        often: dict[tuple[str, int], dict[str, int]] = {}
        for (kind, text), n in counts.items():
            often.setdefault((kind, self._n_tokens[text]), {})[text] = n
        self._words = {key: (list(ns), list(accumulate(ns.values()))) for key, ns in often.items()}

    def draw(self, like: Word, rng: random.Random) -> str:
        """A word of the kind and the number of tokens of another one, which the texts hold."""
        words, cumulative = self._words[like.kind, self._n_tokens[like.text]]
        return rng.choices(words, cum_weights=cumulative)[0]


class Source:
    """A source text by its lines, from which responses are cut; no line is in two of them."""

    def __init__(self, text: str, tokenizer: spm.SentencePieceProcessor) -> None:
        lines = text.split("\n")[:-1]  # without what follows the last newline
        self.lines = [line + "\n" for line in lines]
        self.starts = list(accumulate(map(len, self.lines), initial=0))
        # No piece spans two lines, so a text has as many tokens as its lines have.
        self.n_tokens = list(map(len, tokenizer.encode(self.lines)))
        self.words = words_of(text)
        self._word_starts = [word.start for word in self.words]
        self._free = [True] * len(lines)

    def free_lines(self, first: int, longest: int) -> range:
        """The lines from one on that no response has, as far as they have so many tokens."""
        n = 0
        for at in range(first, len(self.lines)):
            n += self.n_tokens[at]
            if n > longest or not self._free[at]:
                return range(first, at)
        return range(first, len(self.lines))

    def threes(self) -> Iterator[tuple[str, ...]]:
        """Each line with its two next ones, from the first on."""
        return zip(self.lines, self.lines[1:], self.lines[2:], strict=False)

    def use(self, lines: range) -> None:
        self._free[lines.start : lines.stop] = [False] * len(lines)

    def spoiled(self, at: int, law: Law, rng: random.Random) -> tuple[str, int | None]:
        """A line with its words drawn anew, and the character of its first change, if any."""
        start, end = self.starts[at], self.starts[at + 1]
        lo, hi = (bisect_left(self._word_starts, edge) for edge in (start, end))
        parts, position, change = [], start, None
        for word in self.words[lo:hi]:
            drawn = law.draw(word, rng)
            parts.append(self.lines[at][position - start : word.start - start])
            if change is None and drawn != word.text:
                change = sum(map(len, parts))
            parts.append(drawn)
            position = word.end
        return "".join(parts) + self.lines[at][position - start :], change


def prepare_spoiled_stdlib(
    assets_dir: str,
    vocab_size: int,
    max_tokens: int,
    seed: int,
    n_critic: int = 2500,
    n_policy: int = 300,
    n_heldout: int = 800,
    bad_share: float = 0.8,
) -> None:
    """Make ``tokenizer.model`` and ``{base,critic,policy,heldout}.jsonl`` if missing.

    ``base`` holds files of the library itself as plain text, for the starting model. The others
    hold responses from files of its test folder, no file in two of them: as it was written with
    reward 1, or spoiled with reward 0 and its spoiled characters as ``noise``. Which of them are
    bad is drawn after all else: lengths and places tell nothing.

    Args:
        max_tokens: of a row, with BOS and EOS; ValueError if no response would fit.
        seed: assigns the files and draws responses and words.
        n_critic: responses for the critic, likewise the others.
        bad_share: share of spoiled responses in each part, in (0, 1).
    """
    longest = max_tokens - PROMPT_TOKENS - 2
    if longest < MIN_TOKENS:
        least = MIN_TOKENS + PROMPT_TOKENS + 2
        raise ValueError(f"max_tokens must be at least {least}, got {max_tokens}")
    sizes = {"critic": n_critic, "policy": n_policy, "heldout": n_heldout}
    made_from = {
        "quickstart": "spoiled",
        "version": VERSION,
        "python": sys.version.split()[0],
        "vocab_size": vocab_size,
        "max_tokens": max_tokens,
        "seed": seed,
        "sizes": sizes,
        "bad_share": bad_share,
    }
    with assets_folder(Path(assets_dir), made_from) as folder:
        if folder is None:
            return
        base = list(deal_files({"base": BASE_SHARE}, seed)["base"].values())
        tokenizer = train_tokenizer(folder, base, vocab_size)
        write_rows(folder / "base.jsonl", [{"text": text} for text in base])
        log.info(f"  base: {len(base)} files, {sum(map(len, base)) / 1e6:.1f} MB")
        texts, origin = test_texts()
        parts = deal_texts(texts, PARTS, seed)
        sources = {
            name: [Source(text, tokenizer) for text in part.values()]
            for name, part in parts.items()
        }
        # Code that stands in two files must not be on both sides of a split.
        times = Counter(key for part in sources.values() for one in part for key in one.threes())
        for name, part in parts.items():
            rng = random.Random(f"{seed} {name}")
            law = Law([x for one in sources[name] for x in one.words], tokenizer)
            rows = _responses(
                sources[name], times, law, sizes[name], bad_share, longest, tokenizer, rng
            )
            write_rows(folder / f"{name}.jsonl", rows)
            log.info(
                f"  {name}: {len(rows)} responses, {bad_share:.0%} of them spoiled, from "
                f"{len(part)} files of {origin}"
            )


def test_texts() -> tuple[dict[str, str], str]:
    """Test files by path, and whose they are: the standard library's, else a package's.

    Distributions and images often leave out the library's.
    """
    paths = sysconfig.get_paths()
    root, origin = Path(paths["stdlib"], "test"), "the standard library's tests"
    found = sorted(root.rglob("*.py"))
    if len(found) < 100:
        root, origin = Path(paths["purelib"], PACKAGE), f"{PACKAGE}'s tests"
        found = [path for path in sorted(root.rglob("*.py")) if "tests" in path.parts]
    texts = {}
    for path in found:
        if 1_000 < path.stat().st_size < 200_000:
            text = path.read_text(encoding="utf-8", errors="replace")
            if "\ufffd" not in text:  # files that test encodings
                texts[path.relative_to(root).as_posix()] = text
    return texts, origin


def _responses(
    sources: list[Source],
    times: Counter,
    law: Law,
    n_rows: int,
    bad_share: float,
    longest: int,
    tokenizer: spm.SentencePieceProcessor,
    rng: random.Random,
) -> list[dict]:
    """Rows with prompt, response, reward and noise, from disjoint lines in random order.

    ``times`` counts three lines in a row over all files: what begins like another is left out.
    Every stretch is spoiled, and a good one then stays as it was written: which stretches can be
    spoiled, and how long they are, tells nothing.
    """
    places = [
        (source, first)
        for source in sources
        for first, lines in enumerate(source.threes())
        if first > 0 and times[lines] == 1  # the prompt is the line before
    ]
    rng.shuffle(places)
    is_bad = [row < round(n_rows * bad_share) for row in range(n_rows)]
    rng.shuffle(is_bad)
    rows: list[dict] = []
    for source, first in places:
        if len(rows) == n_rows:
            break
        at, prompt = source.free_lines(first, longest), source.lines[first - 1]
        if not prompt.strip() or source.n_tokens[first - 1] > PROMPT_TOKENS:
            continue
        totals = accumulate(source.n_tokens[first : at.stop])
        ends = [end for end, total in enumerate(totals, first + 1) if total >= MIN_TOKENS]
        if not ends:
            continue
        at = range(first, rng.choice(ends))
        spoiled = _spoil(source, at, law, tokenizer, rng)
        if spoiled is None:
            continue
        row: dict[str, Any] = {"prompt": prompt}
        if is_bad[len(rows)]:
            text, start = spoiled
            row |= {"response": text, "reward": 0.0, "noise": [[start, len(text)]]}
        else:
            row |= {"response": "".join(source.lines[first : at.stop]), "reward": 1.0}
        source.use(at)
        rows.append(row)
    if len(rows) < n_rows:
        raise ValueError(f"the test files hold fewer than {n_rows} responses: ask for fewer")
    return rows


def _spoil(
    source: Source,
    at: range,
    law: Law,
    tokenizer: spm.SentencePieceProcessor,
    rng: random.Random,
) -> tuple[str, int] | None:
    """Lines with all words from a random one on drawn anew, and the first changed character.

    None if nothing has changed, or a line could not keep its number of tokens.
    """
    turn = at.start + rng.randrange(max(1, round(len(at) * TURN_WITHIN)))
    text, start = "".join(source.lines[at.start : turn]), None
    for line in range(turn, at.stop):
        for _ in range(TRIES):
            spoiled, change = source.spoiled(line, law, rng)
            if len(tokenizer.encode(spoiled)) == source.n_tokens[line]:
                break
        else:
            return None
        if start is None and change is not None:
            start = len(text) + change
        text += spoiled
    return None if start is None else (text, start)
