import ast
import json
import random
from collections import Counter

import pytest
import sentencepiece as spm

from wmtp_modules.quickstarts import mutations as quickstart_critic
from wmtp_modules.quickstarts.mutations import functions_of, mutate, prepare_critic_stdlib
from wmtp_modules.quickstarts.stdlib import prepare_stdlib, stdlib_files

SOURCE = '''
class Box:
    """A box."""

    @property
    def first(self, index=1, *rest, é="é"):
        """Documented."""
        """Twice."""
        def inner(item):
            "Inner."
        total = self.items[index] + len(rest)
        for item in rest:
            if item is not None and "é" != item <= total:  # a comment
                total -= 1
        return f"{total + 1}", total

def _documented():
    """Nothing else."""
'''


def whole(function, response=None):
    return function.prompt + (response or function.response)


def mutations(function, n=100, **kwargs):
    return [mutate(function, random.Random(seed), **kwargs) for seed in range(n)]


def test_functions_lose_docstrings_decorators_and_comments():
    first, documented = functions_of(SOURCE)
    assert first.prompt == "def first(self, index=1, *rest, é='é'):\n"
    assert first.response == (
        "\n    def inner(item):\n        pass\n"
        "    total = self.items[index] + len(rest)\n"
        "    for item in rest:\n"
        "        if item is not None and 'é' != item <= total:\n"
        "            total -= 1\n"
        "    return (f'{total + 1}', total)"
    )
    assert (first.name, first.line) == ("first", 6)
    assert (documented.prompt, documented.response) == ("def _documented():\n", "    pass")
    assert mutate(documented, random.Random(0)) is None


def test_every_kind_of_mutation_is_drawn_from_names_and_operators_of_the_body():
    function = functions_of(SOURCE)[0]
    changes = Counter()
    for mutation in mutations(function, 500, n_tokens=lambda text: 0):
        start, end = mutation.span
        was = function.response[start : len(function.response) - len(mutation.response) + end]
        changes[mutation.kind, was, mutation.response[start:end]] += 1
    drawn = {(was, now) for kind, was, now in changes if kind == "operator"}
    assert drawn == {
        ("+", "-"),
        ("is not", "is"),
        ("and", "or"),
        ("!=", "=="),
        ("<=", ">="),
        ("<=", "<"),
        ("-=", "+="),
    }
    names = {"self", "index", "rest", "é", "total", "item"}
    swapped = [(was, now) for kind, was, now in changes if kind == "variable"]
    assert len(swapped) > 10
    assert all({was, now} <= names and was != now for was, now in swapped)
    assert ("self", "item") not in swapped  # not bound that early
    assert {(was, now) for kind, was, now in changes if kind == "off_by_one"} == {
        ("1", "0"),
        ("1", "2"),
        ("", " - 1"),
        ("", " + 1"),
    }
    tuple_ = "(f'{total + 1}', total)"  # nothing inside the f-string is changed
    assert {change[1:] for change in changes if change[0] == "dropped_return"} == {
        (f"return {tuple_}", tuple_)
    }


def test_mutations_of_the_standard_library_parse_and_differ_only_in_their_span():
    path = next(path for path in stdlib_files() if path.name == "textwrap.py")
    functions = functions_of(path.read_text())
    assert len(functions) > 10
    kinds = Counter()
    for function in functions:
        assert not ast.get_docstring(ast.parse(whole(function)).body[0])
        for mutation in filter(None, mutations(function, 30)):
            tree = ast.parse(whole(function, mutation.response))
            compile(tree, "<test>", "exec")
            assert ast.dump(tree) != ast.dump(ast.parse(whole(function)))
            assert ast.unparse(tree) == whole(function, mutation.response)
            start, end = mutation.span
            assert 0 <= start < end <= len(mutation.response)
            tail = len(mutation.response) - end
            assert mutation.response[:start] == function.response[:start]
            assert mutation.response[end:] == function.response[len(function.response) - tail :]
            kinds[mutation.kind] += 1
    assert set(kinds) == {"operator", "variable", "off_by_one", "dropped_return"}


def test_mutations_follow_from_the_seed():
    function = functions_of(SOURCE)[0]
    assert mutations(function) == mutations(function)
    assert len({mutation.response for mutation in mutations(function)}) > 10


@pytest.mark.parametrize(
    ("body", "kept", "otherwise"),
    [
        ("x = long + a", {"x = long - a"}, {"x = a + a", "x = long + long"}),
        ("return a[b]", {"return b[b]", "return a[a]"}, {"return a[b - 1]", "return a[b + 1]"}),
        ("return 9", {"return 8"}, {"return 10"}),
        ("return -1", {"return -2"}, set()),
        ("return x is y", set(), {"return x is not y"}),
        ("return z[a:]", set(), {"return z[a - 1:]", "return z[a + 1:]"}),
    ],
)
def test_changes_that_keep_the_length_come_first(body, kept, otherwise, monkeypatch):
    monkeypatch.setattr(quickstart_critic, "DROPPED_RETURN_SHARE", 0)
    parameters = {"x = long + a": "long, a", "return a[b]": "a, b", "return z[a:]": "a"}
    function = functions_of(f"def f({parameters.get(body, '')}):\n    {body}")[0]
    drawn = {mutation.response.strip() for mutation in mutations(function)}
    assert drawn == (kept or otherwise)
    # With a length that is never the same, all are drawn.
    ever_longer = iter(range(10**6))
    drawn = {m.response.strip() for m in mutations(function, n_tokens=lambda _: next(ever_longer))}
    assert drawn >= kept | otherwise


def test_dropped_returns_are_capped():
    function = functions_of("def f(a, b):\n    return a + b")[0]
    dropped = [m for m in mutations(function, 2_000) if m.kind == "dropped_return"]
    assert {(m.response, m.span) for m in dropped} == {("    a + b", (4, 9))}
    share = quickstart_critic.DROPPED_RETURN_SHARE
    assert share / 2 < len(dropped) / 2_000 < share * 2


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """The quickstart's files: path of the folder, and their rows by name."""
    folder = tmp_path_factory.mktemp("critic") / "assets"
    prepare_critic_stdlib(str(folder), vocab_size=1024, max_tokens=96, seed=0)
    rows = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("base", "train", "heldout")
    }
    return folder, rows


@pytest.mark.slow
def test_pairs_of_the_standard_library(assets):
    folder, rows = assets
    tokenizer = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert len(rows["train"]) > 4_000  # two a pair
    assert len(rows["heldout"]) > 600
    files = {
        name: {row["problem_id"].split(":")[0] for row in rows[name]}
        for name in rows
        if name != "base"
    }
    assert not files["train"] & files["heldout"]
    bodies, bad_bodies, problems, shorter, same = [], set(), [], 0, 0
    for good, bad in zip(*(2 * [iter(rows["train"] + rows["heldout"])]), strict=True):
        assert good["prompt"] == bad["prompt"]
        assert good["problem_id"] == bad["problem_id"]
        assert (good["reward"], bad["reward"]) == (1.0, 0.0)
        assert "noise" not in good
        ((start, end),) = bad["noise"]
        assert 0 <= start < end
        assert good["response"][:start] == bad["response"][:start]
        assert good["response"].endswith(bad["response"][end:])
        lengths = [
            len(tokenizer.encode(row["prompt"] + row["response"])) + 2 for row in (good, bad)
        ]
        assert 30 <= lengths[0] <= 96
        assert lengths[1] <= 96
        shorter += lengths[1] < lengths[0]
        same += lengths[1] == lengths[0]
        bodies.append(good["response"])
        bad_bodies.add(bad["response"])
        problems.append(good["problem_id"])
    assert len(set(bodies)) == len(bodies)
    assert not set(bodies) & bad_bodies
    assert len(set(problems)) == len(problems)
    assert same > 0.6 * len(bodies)
    assert 0.46 < (shorter + same / 2) / len(bodies) < 0.54


@pytest.mark.slow
def test_files_of_base_hold_no_function_of_a_pair(assets):
    _, rows = assets
    bodies = {row["response"] for name in ("train", "heldout") for row in rows[name]}
    for row in random.Random(0).sample(rows["base"], 20):
        assert not bodies & {function.response for function in functions_of(row["text"])}


@pytest.mark.slow
def test_folder_is_made_once_and_foreign_folders_stay(assets, tmp_path):
    folder, _ = assets
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepare_critic_stdlib(str(folder), vocab_size=1024, max_tokens=96, seed=0)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (tmp_path / "thesis.tex").touch()
    for path in (tmp_path, folder):
        # The other quickstart's folder is as foreign as any.
        with pytest.raises(ValueError, match="holds files that the quickstart did not make: use"):
            prepare_stdlib(str(path), vocab_size=1024, corrupted_share=0.4, seed=0)
    with pytest.raises(ValueError, match="holds files that the quickstart did not make: use"):
        prepare_critic_stdlib(str(tmp_path), vocab_size=1024, max_tokens=96, seed=0)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(ValueError, match="max_tokens must be at least 30, got 20"):
        prepare_critic_stdlib(str(tmp_path / "new"), vocab_size=1024, max_tokens=20, seed=0)
