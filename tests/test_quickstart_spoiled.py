import json
import random
import re
from collections import Counter
from math import log

import pytest
import sentencepiece as spm

from wmtp_modules.quickstarts import spoiled
from wmtp_modules.quickstarts.spoiled import Law, prepare_spoiled_stdlib, words_of

SIZES = {"n_critic": 800, "n_policy": 40, "n_heldout": 200}
SOURCE = '''def outer(self, n=10):
    """Docstring with "quotes", it's 2 lines,
    see #3."""
    text = rb'bytes\\n%s it' + f"{n}"  # a comment's end
    return self.items[0x1F] if n is not None else text.join(1.5)
'''


def test_words_have_kinds_and_everything_else_is_structure():
    words = words_of(SOURCE)
    assert all(SOURCE[word.start : word.end] == word.text for word in words)
    by_kind: dict[str, list[str]] = {}
    for word in words:
        by_kind.setdefault(word.kind, []).append(word.text)
    assert by_kind.pop("number") == ["10", "2", "3", "0x1F", "1", "5"]
    assert " ".join(by_kind.pop("word")) == (
        "def outer self n Docstring with quotes it s lines see text bytes it n a comment s end "
        "return self items if n is not None else text join"
    )
    assert not by_kind


def test_a_law_draws_words_of_as_many_tokens_as_often_as_the_text_has_them(rows):
    tokenizer = spm.SentencePieceProcessor(model_file=str(rows["folder"] / "tokenizer.model"))
    law, rng = Law(words_of("a = b + a + a * 1 - xylophone"), tokenizer), random.Random(0)
    a, one = words_of("a 1")
    drawn = Counter(law.draw(a, rng) for _ in range(4_000))
    assert set(drawn) == {"a", "b"}
    assert 0.72 < drawn["a"] / 4_000 < 0.78
    assert {law.draw(one, rng) for _ in range(10)} == {"1"}


@pytest.fixture(scope="module")
def small_library():
    """Few files of each kind: what is tested here holds for any."""
    texts, _ = spoiled.test_texts()
    chosen = random.Random(0).sample(sorted(texts), 120)
    return {path: texts[path] for path in chosen}


@pytest.fixture(scope="module")
def made(tmp_path_factory, small_library):
    """A folder of the quickstart's files, made from few files, and a function that makes more."""

    def make(name: str, n_files: int = 120, **changed) -> dict:
        folder = tmp_path_factory.mktemp(name) / "assets"
        few = dict(list(small_library.items())[:n_files])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spoiled, "test_texts", lambda: (few, "a few tests"))
            patch.setattr(spoiled, "BASE_SHARE", 0.05)
            patch.setattr(spoiled, "PARTS", {"critic": 0.6, "policy": 0.15, "heldout": 0.25})
            arguments = SIZES | {"seed": 0} | changed
            prepare_spoiled_stdlib(str(folder), vocab_size=1024, max_tokens=128, **arguments)
        rows = {
            path.stem: [json.loads(line) for line in path.read_text().splitlines()]
            for path in folder.glob("*.jsonl")
        }
        return rows | {"folder": folder}

    return make


@pytest.fixture(scope="module")
def rows(made):
    return made("spoiled")


def test_files_of_the_parts_are_disjoint_and_no_line_is_in_two_responses(rows, small_library):
    for name, size in (("critic", 800), ("policy", 40), ("heldout", 200)):
        assert len(rows[name]) == size
        assert sum(row["reward"] for row in rows[name]) == round(0.2 * size)
        responses = [row["response"] for row in rows[name]]
        assert len(set(responses)) == size
    files = {
        name: {
            path
            for row in rows[name]
            if row["reward"]
            for path, text in small_library.items()
            if row["prompt"] + row["response"] in text
        }
        for name in ("critic", "policy", "heldout")
    }
    assert all(files.values())
    assert not files["critic"] & files["policy"]
    assert not (files["critic"] | files["policy"]) & files["heldout"]


def test_only_words_after_the_mark_change_and_they_keep_their_kind(rows, small_library):
    """A spoiled response has, word by word replaced by its kind, the original's structure."""

    def skeleton(text: str, words) -> str:
        parts, position = [], 0
        for word in words:
            parts += [text[position : word.start], f"<{word.kind}>"]
            position = word.end
        return "".join(parts) + text[position:]

    library = [(text, words_of(text)) for text in small_library.values()]
    skeletons = [skeleton(*one) for one in library]
    bad = [row for row in rows["critic"] if not row["reward"]]
    unchanged, found = 0, []
    for row in bad[:40]:
        ((start, end),) = row["noise"]
        assert 0 <= start < end == len(row["response"])
        sound = row["prompt"] + row["response"][:start]
        assert sound in "\n".join(small_library.values())
        unchanged += row["prompt"] + row["response"] in "\n".join(small_library.values())
        lines = [
            line for line in row["response"].split("\n") if "'" not in line and '"' not in line
        ]
        code = [line for line in lines if re.search(r"\w", line) and "#" not in line]
        found += [any(skeleton(line, words_of(line)) in one for one in skeletons) for line in code]
    assert unchanged == 0
    assert sum(found) >= 0.85 * len(found) > 50  # the others stand inside a docstring


def n_tokens(tokenizer, row) -> int:
    return len(tokenizer.encode(row["response"]))


def area(good: list[float], bad: list[float]) -> float:
    """Share of good-bad couples in which the good one is higher, ties as half."""
    return sum((g > b) + (g == b) / 2 for g in good for b in bad) / (len(good) * len(bad))


def test_token_counts_do_not_tell_good_from_bad(rows):
    tokenizer = spm.SentencePieceProcessor(model_file=str(rows["folder"] / "tokenizer.model"))
    counts = {0.0: Counter(), 1.0: Counter()}
    for row in rows["critic"]:
        counts[row["reward"]].update(tokenizer.encode(row["response"]))
    total = {reward: counter.total() + 1024 for reward, counter in counts.items()}

    def score(token: int) -> float:  # of a table that sees no context
        share = [(counts[reward][token] + 1) / total[reward] for reward in (1.0, 0.0)]
        return log(share[0] / share[1])

    scores: dict[str, list[float]] = {"good": [], "bad": [], "sound": [], "spoiled": []}
    for row in rows["heldout"]:
        kind = "good" if row["reward"] else "bad"
        tokens = tokenizer.encode(row["response"])
        assert 84 <= len(tokens) <= 124
        assert len(tokenizer.encode(row["prompt"] + row["response"])) + 2 <= 128
        scores[kind].append(sum(map(score, tokens)))
        start = row["noise"][0][0] if "noise" in row else len(row["response"])
        sound = len(tokenizer.encode(row["response"][:start]))
        scores["sound"] += map(score, tokens[:sound])
        scores["spoiled"] += map(score, tokens[sound:])
    some = [random.Random(0).sample(scores[kind], 2_000) for kind in ("sound", "spoiled")]
    assert 0.46 < area(*some) < 0.56
    assert 0.4 < area(scores["good"], scores["bad"]) < 0.69


def test_the_seed_decides(made):
    few = {"n_critic": 20, "n_policy": 10, "n_heldout": 10, "n_files": 60}
    rows, again, other = (made("seed", seed=seed, **few) for seed in (0, 0, 1))
    for name in ("base", "critic", "policy", "heldout"):
        assert again[name] == rows[name]
        assert other[name] != rows[name]


def test_shares_and_sizes_are_arguments_and_too_many_are_an_error(made):
    rows = made("plenty", n_critic=20, n_policy=20, n_heldout=10, bad_share=0.7, n_files=60)
    assert [len(rows[name]) for name in ("critic", "policy", "heldout")] == [20, 20, 10]
    assert sum(row["reward"] for row in rows["policy"]) == 6
    # Which stretches are taken, and their lengths, do not depend on what becomes of them.
    other = made("other", n_critic=20, n_policy=20, n_heldout=10, bad_share=0.2, n_files=60)
    tokenizer = spm.SentencePieceProcessor(model_file=str(other["folder"] / "tokenizer.model"))
    for name in ("critic", "policy", "heldout"):
        for row, same in zip(rows[name], other[name], strict=True):
            assert row["prompt"] == same["prompt"]
            assert n_tokens(tokenizer, row) == n_tokens(tokenizer, same)
    with pytest.raises(ValueError, match="hold fewer than 90000 responses: ask for fewer"):
        made("too_many", n_critic=90_000, n_files=6)


def test_folder_is_made_once_and_foreign_folders_stay(rows, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in rows["folder"].iterdir()}
    arguments = {"vocab_size": 1024, "max_tokens": 128, "seed": 0}
    prepare_spoiled_stdlib(str(rows["folder"]), **arguments, **SIZES)
    assert {path: path.stat().st_mtime_ns for path in rows["folder"].iterdir()} == before
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds files that the quickstart did not make: use"):
        prepare_spoiled_stdlib(str(tmp_path), **arguments)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(ValueError, match="max_tokens must be at least 106, got 100"):
        prepare_spoiled_stdlib(str(tmp_path / "new"), 1024, 100, 0)


def test_without_the_librarys_tests_a_packages_are_taken(tmp_path, monkeypatch):
    paths = spoiled.sysconfig.get_paths()
    monkeypatch.setattr(
        spoiled.sysconfig, "get_paths", lambda: paths | {"stdlib": str(tmp_path / "slim")}
    )
    texts, origin = spoiled.test_texts()
    assert origin == "sympy's tests"
    assert len(texts) > 300
    assert all("tests" in path for path in texts)
