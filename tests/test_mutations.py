import ast
import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece as spm

from wmtp_modules.quickstarts import stdlib
from wmtp_modules.quickstarts.stdlib import stdlib_files

SCRIPT = Path(__file__).parents[1] / "benchmarks/mutations.py"
spec = importlib.util.spec_from_file_location("mutations", SCRIPT)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
functions_of, mutate = module.functions_of, module.mutate
prepare_critic_stdlib = module.prepare_critic_stdlib


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
    monkeypatch.setattr(module, "DROPPED_RETURN_SHARE", 0)
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
    share = module.DROPPED_RETURN_SHARE
    assert share / 2 < len(dropped) / 2_000 < share * 2


def test_a_change_whose_reverse_was_made_more_often_comes_first():
    function = functions_of("def f(a, b):\n    return a + b < b - a")[0]
    made = Counter({("-", "+"): 3, ("<", ">"): 1})
    assert {mutate(function, random.Random(i), len, made).change for i in range(20)} == {("+", "-")}


def test_balanced_keeps_each_change_as_often_as_its_reverse():
    changes = [("+", "-"), ("a", "b"), ("-", "+"), ("+", "-"), ("-", "+"), ("-", "+"), ("", " - 1")]
    mutations = [module.Mutation("operator", "", (0, 1), change) for change in changes]
    assert module.balanced(mutations) == [True, False, True, True, True, False, False]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Files made from a part of the library: path of the folder, and their rows by name."""
    folder, files = tmp_path_factory.mktemp("mutations") / "assets", stdlib_files()[::6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib, "stdlib_files", lambda: files)
        prepare_critic_stdlib(str(folder), vocab_size=600, max_tokens=96, seed=0)
    rows = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("base", "train", "heldout")
    }
    return folder, rows


def test_pairs_of_the_standard_library_are_balanced(assets):
    folder, rows = assets
    tokenizer = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    files = {
        name: {row["problem_id"].split(":")[0] for row in rows[name]}
        for name in ("train", "heldout")
    }
    assert files["train"]
    assert not files["train"] & files["heldout"]
    bodies, bad_bodies, problems = [], set(), []
    for name in files:
        changes = Counter()
        for good, bad in zip(*(2 * [iter(rows[name])]), strict=True):
            assert good["prompt"] == bad["prompt"]
            assert good["problem_id"] == bad["problem_id"]
            assert (good["reward"], bad["reward"]) == (1.0, 0.0)
            assert "noise" not in good
            ((start, end),) = bad["noise"]
            assert 0 <= start < end
            assert good["response"][:start] == bad["response"][:start]
            tail = len(bad["response"]) - end
            was = good["response"][start : len(good["response"]) - tail]
            assert good["response"].endswith(bad["response"][end:])
            changes[was, bad["response"][start:end]] += 1
            for row in (good, bad):
                n = len(tokenizer.encode(row["prompt"] + row["response"])) + 2
                assert n <= 96
            bodies.append(good["response"])
            bad_bodies.add(bad["response"])
            problems.append(good["problem_id"])
        assert changes == Counter({change[::-1]: n for change, n in changes.items()})
    assert len(set(bodies)) == len(bodies) > 100
    assert not set(bodies) & bad_bodies
    assert len(set(problems)) == len(problems)


def test_files_of_base_hold_no_function_of_a_pair(assets):
    _, rows = assets
    bodies = {row["response"] for name in ("train", "heldout") for row in rows[name]}
    for row in random.Random(0).sample(rows["base"], 20):
        assert not bodies & {function.response for function in functions_of(row["text"])}


def test_foreign_folders_stay(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds files that the quickstart did not make: use"):
        prepare_critic_stdlib(str(tmp_path), vocab_size=1024, max_tokens=96, seed=0)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(ValueError, match="max_tokens must be at least 30, got 20"):
        prepare_critic_stdlib(str(tmp_path / "new"), vocab_size=1024, max_tokens=20, seed=0)
