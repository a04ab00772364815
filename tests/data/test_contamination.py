import json
import random
import re
import runpy
import sysconfig
from pathlib import Path

import pytest

from wmtp_modules.data import contamination, rows_dataset
from wmtp_modules.data.contamination import HASHES, EvaluationGuard

SCRIPT = Path(__file__).parents[2] / "benchmarks/make_eval_prompts.py"
make_eval_prompts = runpy.run_path(str(SCRIPT))["make"]


@pytest.fixture(scope="module")
def guard():
    return EvaluationGuard()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_hashes_cover_both_benchmarks_without_text():
    content = json.loads(HASHES.read_text())
    assert len(content["columns"]) == 4
    assert len(content["first two words"]) == 75
    ids = [item[0] for item in content["items"]]
    assert set(ids) == {f"HumanEval/{i}" for i in range(164)} | {
        f"MBPP/{i}" for i in range(11, 511)
    }
    for _, n_words, *hashes in content["items"]:
        assert n_words >= 7
        assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)


@pytest.mark.nightly
def test_every_evaluation_task_is_found_and_training_tasks_are_not(guard, benchmarks):
    tasks = {task["task_id"]: task["text"] for task in read(benchmarks / "mbpp/mbpp.jsonl")}
    found = {
        i: guard.find(f"Here is a task:\n{text.upper()}\n\tDo it!") for i, text in tasks.items()
    }
    assert all(found[i] for i in range(11, 511))
    # These repeat the description of a test task, or of its sanitized version, word for word.
    assert [i for i in tasks if found[i] and i not in range(11, 511)] == [
        *(516, 569, 584, 602, 643, 653, 704, 821, 872, 928)
    ]
    sanitized = json.loads((benchmarks / "mbpp/sanitized-mbpp.json").read_text())
    assert all(guard.find(t["prompt"]) for t in sanitized if 11 <= t["task_id"] <= 510)
    for task in read(benchmarks / "humaneval/HumanEval_even.jsonl"):
        assert guard.find("# a file\nimport os\n" + task["prompt"] + "    return 1\n")


def test_samples_are_found_inside_json_and_without_annotations(samples, tmp_path):
    (tmp_path / "mbpp.jsonl").write_text('{"task_id": 12, "text": "Find the depth of a tree."}')
    arguments = ["--mbpp", f"{tmp_path}/mbpp.jsonl"]
    arguments += ["--humaneval", str(samples / "humaneval.jsonl")]
    (tmp_path / "hashes.json").write_text(make_eval_prompts(arguments))
    own = EvaluationGuard(tmp_path / "hashes.json")
    for task in read(samples / "humaneval.jsonl"):
        prompt = task["prompt"]
        assert own.find(json.dumps({"cell": prompt})) == own.find(prompt) == task["task_id"]
        assert own.find(json.dumps(json.dumps(prompt))) == task["task_id"]
        assert own.find(prompt.replace(": List[int]", "").replace(" -> List[int]", ""))


@pytest.mark.nightly
def test_tasks_are_found_inside_json(guard, benchmarks):
    """A jsonl source read as plain text, or a notebook: line ends are two characters there."""
    for task in read(benchmarks / "humaneval/HumanEval_even.jsonl"):
        prompt = task["prompt"]
        assert guard.find(json.dumps({"cell": prompt})) == guard.find(prompt) is not None
        assert guard.find(json.dumps(json.dumps(prompt))) == guard.find(prompt)


@pytest.mark.nightly
def test_tasks_are_found_without_annotations(guard, benchmarks):
    annotation = re.compile(r": (?:int|str|float|bool|List\[\w+\])|(?<=\)) -> [^:]+")
    changed = 0
    for task in read(benchmarks / "humaneval/HumanEval_even.jsonl"):
        head, docstring, rest = task["prompt"].partition('"""')
        bare = annotation.sub("", head) + docstring + rest
        changed += bare != task["prompt"]
        assert guard.find(bare), bare
    assert changed > 10


def test_standard_library_is_innocent(guard):
    files = list(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    assert len(files) > 100
    assert not [file for file in files if guard.find(file.read_text(encoding="utf-8"))]


def test_a_part_of_a_description_is_no_match(tmp_path):
    guard = make_guard(tmp_path)
    whole = "Write a function to count the green apples of a basket."
    assert guard.find(f"x. {whole}") == "MBPP/11"
    assert guard.find(" ".join(reversed(whole.split()))) is None
    assert guard.find(whole.removesuffix("basket.")) is None
    assert guard.find(whole.replace("green ", "")) is None
    assert guard.find(r"Write a function\nto\tcount the\r\ngreen \"apples\" of a basket")
    assert guard.find("write_a_function # to count\n the-green-apples OF a basket") == "MBPP/11"


def test_a_description_in_two_texts_is_in_none(tmp_path):
    guard = make_guard(tmp_path)
    words = ["write", "a", "function", "to", "count", "the", "green", "apples", "of", "a", "basket"]
    for cut in range(1, len(words)):
        assert guard.find_each([" ".join(words[:cut]), " ".join(words[cut:])]) == [None, None]


def test_words_that_are_far_apart(tmp_path):
    """More than is looked at first."""
    text = "write a function to count the green apples of a basket".replace(" ", " " * 100)
    assert make_guard(tmp_path).find(text) == "MBPP/11"


def make_guard(tmp_path):
    mbpp = [
        {"task_id": 10, "text": "Write a function to peel the oranges of a basket."},
        {"task_id": 11, "text": "Write a function to count the green apples of a basket."},
    ]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, mbpp)))
    prompts = [
        'def add(x: int, y: int):\n    """Add x and y.\n    >>> add(1, 2)\n    3\n    """\n',
        'import re\n\ndef long(s):\n    """ Return how often the letter z stands in the string s'
        ' and in its reverse.\n\n    Example: long("z") is 2\n    """\n',
    ]
    humaneval = [
        {"task_id": f"HumanEval/{i}", "prompt": prompt, "entry_point": name}
        for i, (prompt, name) in enumerate(zip(prompts, ("add", "long"), strict=True))
    ]
    (tmp_path / "humaneval.jsonl").write_text("\n".join(map(json.dumps, humaneval)))
    arguments = ["--mbpp", f"{tmp_path}/mbpp.jsonl", "--humaneval", f"{tmp_path}/humaneval.jsonl"]
    (tmp_path / "hashes.json").write_text(make_eval_prompts(arguments))
    return EvaluationGuard(tmp_path / "hashes.json")


def find_slowly(hashes, text):
    """What ``find`` must say: every task looked for at every word."""
    words = re.findall("[a-z0-9]+", re.sub(r'\\[nrt"]', " ", text).lower())
    for i in range(len(words)):
        for task, n_words, _, full in hashes["items"]:
            if contamination.hash_words(words[i : i + n_words]) == full:
                return task
    return None


def disguised(rng, words):
    """The words in some layout and case, as a template, a file or a string in JSON has them."""
    ascii_only = [" ", "\n", "\t# ", "-", "_", ": ", "\\n", '\\"', "..\r\n"]
    between = rng.choice([ascii_only, [*ascii_only, "é", "\u2003"]])
    cases = [str.lower, str.upper, str.title, lambda word: word.lower().replace("k", "\u212a")]
    case, texts = rng.choice(cases), []
    for word in words:
        texts += [case(word), rng.choice(between)]
    return "".join(texts)


def test_the_same_is_found_as_by_looking_everywhere(tmp_path):
    guard = make_guard(tmp_path)
    hashes = json.loads((tmp_path / "hashes.json").read_text())
    tasks = [
        "write a function to count the green apples of a basket",
        "def add x int y int add x and y",
        "def add x y add x and y",
        "return how often the letter z stands in the string s and in its reverse",
    ]
    rng, found, texts = random.Random(0), [], []
    for _ in range(600):
        words = [word for _ in range(rng.randrange(4)) for word in rng.choice(tasks).split()]
        for _ in range(rng.choice([0, 0, 0, 1, 2])):  # some no longer whole, or not in sequence
            if words:
                del words[rng.randrange(len(words))]
        around = [rng.choice(["write", "def", "return", "a", "x1", "9"]) for _ in range(4)]
        at = rng.randrange(4)
        text = disguised(rng, [*around[:at], *words, *around[at:]])
        assert guard.find(text) == find_slowly(hashes, text), text
        found.append(guard.find(text))
        texts.append(text)
    assert guard.find_each(texts) == found  # and none across the end of a text
    assert guard.find_each(texts[:5] + [""] * 20 + texts[5:9]) == [
        *found[:5],
        *[None] * 20,
        *found[5:9],
    ]
    assert {*found} == {None, "MBPP/11", "HumanEval/0", "HumanEval/1"}
    assert 100 < found.count(None) < 500


def test_generator_takes_descriptions_up_to_the_examples(tmp_path):
    guard = make_guard(tmp_path)
    assert guard.find("Write a function to peel the oranges of a basket.") is None
    assert guard.find('"""Add x and y."""') is None  # too short without its signature
    assert guard.find('def add(x: int, y: int):\n    """Add x and y."""') == "HumanEval/0"
    assert guard.find('def add(x, y):\n    """Add x and y."""') == "HumanEval/0"
    description = "return how often the letter z stands in the string s and in its reverse"
    assert guard.find(description) == "HumanEval/1"


def test_evaluation_tasks_are_excluded_from_any_source(
    tokenizer, make_jsonl, samples, tmp_path, caplog, monkeypatch
):
    caplog.set_level("INFO")
    task = read(samples / "mbpp.jsonl")[3] | {"task_id": 11}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(task))
    prompt = read(samples / "humaneval.jsonl")[0]["prompt"]
    arguments = ["--mbpp", f"{tmp_path}/mbpp.jsonl"]
    arguments += ["--humaneval", str(samples / "humaneval.jsonl")]
    (tmp_path / "hashes.json").write_text(make_eval_prompts(arguments))
    own = EvaluationGuard(tmp_path / "hashes.json")
    monkeypatch.setattr(contamination, "EvaluationGuard", lambda: own)
    source = make_jsonl(
        {"text": "innocent"},
        {"text": f"first line\n{prompt}"},
        {"prompt": f"Q: {task['text']}", "response": "A"},
        {"prompt": "Q", "response": f"# {task['text']}\n"},
    )
    rows = rows_dataset(tokenizer, source=source)
    assert [tokenizer.decode(r["tokens"]) for r in rows] == ["innocent"]
    assert "3 rows that contain an evaluation task (HumanEval/0, MBPP/11)" in caplog.messages[-1]
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.py").write_text("innocent")
    (folder / "b.py").write_text(f"import os\n{prompt}")
    assert len(rows_dataset(tokenizer, source=str(folder))) == 1
    with pytest.raises(
        ValueError, match=r"no row remains.* 1 rows that contain an evaluation task"
    ):
        rows_dataset(tokenizer, source=str(folder / "b.py"))
