"""Makes good and bad responses for the critic's quickstart on this machine.

A response is a stretch of lines of source, its prompt the line before. A good one stands as
somebody wrote it. In a bad one every word from a random line on is replaced by a word of the same
kind, drawn as often as the text has it: structure and token counts stay, sense goes. The label is
of the whole response; the row also records the spoiled characters, which no critic sees.
"""

import keyword
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

VERSION = 1  # of the files made here; a new version makes them again
BASE_SHARE = 0.35  # of the library's own files
PARTS = {"critic": 0.35, "policy": 0.1, "heldout": 0.15}  # shares of the test files
PACKAGE = "sympy"  # ships its tests, and the lock file has one version for every Python
MIN_TOKENS = 84  # of a response
PROMPT_TOKENS = 20  # at most
TURN_WITHIN = 2 / 3  # of a response's lines, so that a third of a bad one at least is spoiled
KEYWORDS = frozenset(keyword.kwlist)
# Words inside strings and comments are prose. A prefix such as in rb"" belongs to the quotes.
SCAN = re.compile(
    r"""(?:\b[rRbBuUfF]{1,2}(?=['"]))?(?P<prose>\#[^\n]*|'{3}.*?'{3}|"{3}.*?"{3}"""
    r"""|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*")|(?P<number>\b\d\w*)|(?P<name>[^\W\d]\w*)""",
    re.DOTALL,
)
# Escapes (\n) and formats (%s) are structure.
PROSE = re.compile(r"(?<![\\%\w])(?:(?P<number>\d\w*)|(?P<text>[^\W\d]\w*))")


class Word(NamedTuple):
    """A word of a source text, which a word of the same kind may replace."""

    start: int  # in characters of the text
    end: int
    kind: str  # keyword, name, number, or text in a string or comment
    text: str


def words_of(source: str) -> list[Word]:
    """The words of a source text in its order."""
    words = []
    for found in SCAN.finditer(source):
        if found["prose"] is not None:
            start, end = found.span("prose")
            words += [
                Word(*inner.span(), inner.lastgroup or "", inner[0])
                for inner in PROSE.finditer(source, start, end)
            ]
        else:
            kind = "keyword" if found[0] in KEYWORDS else found.lastgroup or ""
            words.append(Word(*found.span(), kind, found[0]))
    return words


class Law:
    """How often each word of each kind stands in some texts, and draws from it."""

    def __init__(self, words: list[Word]) -> None:
        counts: dict[str, Counter] = {}
        for word in words:
            counts.setdefault(word.kind, Counter())[word.text] += 1
        self._kinds = {
            kind: (list(counter), list(accumulate(counter.values())))
            for kind, counter in counts.items()
        }

    def draw(self, kind: str, rng: random.Random) -> str:
        words, cumulative = self._kinds[kind]
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

    def use(self, first: int, n_lines: int) -> None:
        self._free[first : first + n_lines] = [False] * n_lines

    def spoiled(self, at: int, law: Law, rng: random.Random) -> tuple[str, int | None]:
        """A line with its words drawn anew, and the character of its first change, if any."""
        start, end = self.starts[at], self.starts[at + 1]
        lo, hi = (bisect_left(self._word_starts, edge) for edge in (start, end))
        parts, position, change = [], start, None
        for word in self.words[lo:hi]:
            drawn = law.draw(word.kind, rng)
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
    reward 1, or spoiled with reward 0 and its spoiled characters as ``noise``. Equally many of
    each length are good in all three.

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
            rows = _responses(sources[name], times, sizes[name], bad_share, longest, tokenizer, rng)
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
    n_rows: int,
    bad_share: float,
    longest: int,
    tokenizer: spm.SentencePieceProcessor,
    rng: random.Random,
) -> list[dict]:
    """Rows with prompt, response, reward and noise, from disjoint lines in random order.

    ``times`` counts three lines in a row over all files: what begins like another is left out.
    Good responses get lengths drawn from those of the bad ones, so that lengths tell nothing.
    """
    law = Law([word for source in sources for word in source.words])
    places = [
        (source, first)
        for source in sources
        for first, lines in enumerate(source.threes(), start=1)  # the prompt is the line before
        if times[lines] == 1
    ]
    rng.shuffle(places)
    n_bad = round(n_rows * bad_share)
    rows: list[dict] = []
    lengths: list[int] = []  # of the bad ones
    for source, first in places:
        if len(rows) == n_rows:
            break
        prompt, at = source.lines[first - 1], source.free_lines(first, longest)
        if not at or not prompt.strip() or source.n_tokens[first - 1] > PROMPT_TOKENS:
            continue
        is_bad = len(rows) < n_bad
        lines, start = (
            _spoil(source, at, law, rng) if is_bad else (source.lines[first : at.stop], 0)
        )
        wanted = range(MIN_TOKENS, longest + 1) if is_bad else (rng.choice(lengths),)
        totals = list(accumulate(map(len, tokenizer.encode(lines))))
        ends = [end for end, total in enumerate(totals, 1) if total in wanted]
        if not ends:
            continue
        end = rng.choice(ends)
        row: dict[str, Any] = {
            "prompt": prompt,
            "response": "".join(lines[:end]),
            "reward": float(not is_bad),
        }
        if is_bad:
            if start is None or start >= len(row["response"]):
                continue
            row["noise"] = [[start, len(row["response"])]]
            lengths.append(totals[end - 1])
        source.use(first, end)
        rows.append(row)
    if len(rows) < n_rows:
        raise ValueError(f"the test files hold fewer than {n_rows} responses: ask for fewer")
    rng.shuffle(rows)
    return rows


def _spoil(source: Source, at: range, law: Law, rng: random.Random) -> tuple[list[str], int | None]:
    """Lines with all words from a random line on drawn anew, and the first changed character."""
    turn = at.start + rng.randrange(max(1, round(len(at) * TURN_WITHIN)))
    lines, start = source.lines[at.start : turn], None
    for line in range(turn, at.stop):
        text, change = source.spoiled(line, law, rng)
        if start is None and change is not None:
            start = sum(map(len, lines)) + change
        lines.append(text)
    return lines, start
