import json
from pathlib import Path

import datasets
import pytest

from wmtp_modules.data.mbpp import END, mbpp_prompt
from wmtp_modules.evaluation.compare import compare_official, compare_strict
from wmtp_modules.evaluation.tasks import TASKS, load_tasks
from wmtp_modules.sandbox.jobs import FunctionJob, Limits, StdinJob


def mbpp_row(number, **changes):
    return {
        "task_id": number,
        "text": f"Return {number}.",
        "code": f"def f():\r\n    return {number}\r\n",
        "test_list": [f"assert f() == {number}", "assert f()", "assert f() > 0"],
        "test_setup_code": "root = f()\r\nroot2 = f()",
        "challenge_test_list": [],
    } | changes


def sanitized_row(number, **changes):
    return {
        "source_file": "notebook",
        "task_id": number,
        "prompt": f"Return {number}.",
        "code": f"def f():\n    return {number}",
        "test_imports": ["import math"],
        "test_list": [f"assert math.isclose(f(), {number})"],
    } | changes


def humaneval_row(number, **changes):
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def f{number}():\n    """Return {number}."""\n',
        "entry_point": f"f{number}",
        "canonical_solution": f"    return {number}\n",
        "test": f"def check(candidate):\n    assert candidate() == {number}\n",
    } | changes


def contest_row(name="a", **changes):
    return {
        "name": str(name),
        "description": "Add.",
        "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
        "private_tests": {"input": ["3 4"], "output": ["7"]},
        "generated_tests": {"input": ["5 6", ""], "output": ["11", "15"]},
        "solutions": {"language": [2, 3, 3], "solution": ["int", "print(1)\r\n", "print(2)"]},
        "incorrect_solutions": {"language": [], "solution": []},
    } | changes


ROWS = {"mbpp": mbpp_row, "humaneval": humaneval_row, "code_contests": contest_row}
NOTHING = {"input": [], "output": []}
SHOTS = [mbpp_row(i) for i in (2, 3, 4)]


@pytest.fixture
def write(tmp_path):
    def make(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return make


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


# ------------------------------------------------------------------ MBPP


def test_mbpp_prompt_shows_tasks_2_3_and_4(write):
    (task,) = load_tasks("mbpp", write(mbpp_row(11), *SHOTS, mbpp_row(601)), "test")
    assert task.prompt == (
        "You are an expert Python programmer, and here is your task: Return 2. Your code should "
        "pass these tests:\n\nassert f() == 2\nassert f()\nassert f() > 0\n[BEGIN]\n"
        "def f():\n    return 2\n\n[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Return 3. Your code should "
        "pass these tests:\n\nassert f() == 3\nassert f()\nassert f() > 0\n[BEGIN]\n"
        "def f():\n    return 3\n\n[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Return 4. Your code should "
        "pass these tests:\n\nassert f() == 4\nassert f()\nassert f() > 0\n[BEGIN]\n"
        "def f():\n    return 4\n\n[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Return 11. Your code should "
        "pass these tests:\n\nassert f() == 11\nassert f()\nassert f() > 0\n[BEGIN]\n"
    )
    # As a model is trained on it, so that training and evaluation meet.
    assert task.prompt.endswith(mbpp_prompt("Return 11.", mbpp_row(11)["test_list"]))
    assert END.endswith(task.stop[0])


def test_mbpp_job_runs_the_setup_after_the_program(write):
    (task,) = load_tasks("mbpp", write(mbpp_row(11)), "test")
    assert task.reference == "def f():\n    return 11\n"
    assert task.job("def f(): pass", 2.0) == FunctionJob(
        program="def f(): pass\nroot = f()\nroot2 = f()",
        tests="assert f() == 11\nassert f()\nassert f() > 0",
        limits=Limits(seconds=30.0),
    )


def test_sanitized_mbpp_imports_before_the_tests(write, tmp_path):
    path = tmp_path / "sanitized-mbpp.json"
    path.write_text(json.dumps([sanitized_row(i) for i in (2, 3, 4, 12)]))
    (task,) = load_tasks("mbpp", path, "test")
    assert task.job("x = 1", 1.0) == FunctionJob(
        program="x = 1\n",
        tests="import math\nassert math.isclose(f(), 12)",
        limits=Limits(seconds=15.0),
    )
    assert "task: Return 12. Your" in task.prompt


def test_mbpp_splits_and_the_missing_shots(write):
    path = write(*map(mbpp_row, (1, 10, 11, 510, 511, 974)))
    assert [task.task_id for task in load_tasks("mbpp", path, "test")] == [11, 510]
    tasks = load_tasks("mbpp", path, "all")
    assert [task.task_id for task in tasks] == [1, 10, 11, 510, 511, 974]
    assert tasks[0].job(tasks[0].reference, 1.0)  # scoring needs no prompt
    with pytest.raises(ValueError, match=r"shows tasks \(2, 3, 4\), which the source lacks"):
        _ = tasks[0].prompt
    with pytest.raises(ValueError, match=r"none of the MBPP test tasks 11-510, 1 others: set spli"):
        load_tasks("mbpp", write(mbpp_row(601)), "test")


# ------------------------------------------------------------- HumanEval


def test_humaneval(write):
    tasks = load_tasks("humaneval", write(humaneval_row(0), humaneval_row(7)), "test")
    assert [task.task_id for task in tasks] == ["HumanEval/0", "HumanEval/7"]
    task = tasks[1]
    assert task.prompt == 'def f7():\n    """Return 7."""\n'
    assert task.stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert task.reference == "    return 7\n"
    assert task.job("    return 8\n", 1.5) == FunctionJob(
        program='def f7():\n    """Return 7."""\n    return 8\n',
        tests="def check(candidate):\n    assert candidate() == 7\n\ncheck(f7)\n",
        context='def f7():\n    """Return 7."""\n    pass\n',
        limits=Limits(seconds=22.5),
    )


# ---------------------------------------------------------- CodeContests


def test_code_contests(write):
    # An input's last line is whole even where the data has lost its end.
    (task,) = load_tasks("code_contests", write(contest_row()), "test")
    assert task.task_id == "a"
    assert task.prompt == "Add.\n"
    assert task.stop == ()
    assert task.reference == "print(1)\n"
    assert task.job("print(3)", 2.0) == StdinJob(
        program="print(3)",
        cases=(("1 2\n", "3\n"), ("3 4\n", "7"), ("5 6\n", "11"), ("", "15")),
        compare=compare_official,
        other=compare_strict,
        limits=Limits(seconds=20.0, memory_mb=1024),
    )


def test_code_contests_may_be_compared_strictly(write):
    (task,) = load_tasks("code_contests", write(contest_row()), "test", "strict")
    job = task.job("print(3)")
    assert (job.compare, job.other) == (compare_strict, compare_official)


def test_code_contests_limits_and_files(write):
    row = contest_row(
        time_limit={"seconds": 2, "nanos": 500_000_000},
        memory_limit_bytes=256_000_000,
        input_file="in.txt",
        output_file="",
    )
    (task,) = load_tasks("code_contests", write(row), "all")
    job = task.job("", 2.0)
    # The machine's factor stretches time alone; a part of a MiB is rounded up.
    assert job.limits == Limits(seconds=5.0, memory_mb=245)
    assert (job.input_file, job.output_file) == ("in.txt", None)
    zero = contest_row(time_limit={"seconds": 0, "nanos": 0}, memory_limit_bytes=0)
    (task,) = load_tasks("code_contests", write(zero), "all")
    assert task.job("", 1.0).limits == Limits(seconds=10.0, memory_mb=1024)
    for limit, seconds in (({"seconds": None, "nanos": None}, 10.0), ({"seconds": 3}, 3.0)):
        (task,) = load_tasks("code_contests", write(contest_row(time_limit=limit)), "all")
        assert task.job("", 1.0).limits.seconds == seconds


def test_code_contests_without_a_python3_solution(write):
    row = contest_row(solutions={"language": [2, 1, 4, 2, 7], "solution": list("abcde")})
    (task,) = load_tasks("code_contests", write(row), "all")
    assert task.reference is None
    assert task.reference_languages == ("CPP", "JAVA", "PYTHON2", "language 7")


# --------------------------------------------------------------- sources


def test_parquet_and_folder_and_hub(write, tmp_path, monkeypatch):
    folder = tmp_path / "contests"
    for split in ("train", "valid", "test"):
        rows = datasets.Dataset.from_list([contest_row(split)])
        (folder / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(str(folder / f"data/{split}-00000-of-00001.parquet"))

    def names(source, split):
        return [task.task_id for task in load_tasks("code_contests", source, split)]

    assert names(folder / "data/valid-00000-of-00001.parquet", "test") == ["valid"]
    assert names(folder, "test") == ["test"]
    assert names(folder, "all") == ["test", "train", "valid"]

    splits = {
        split: datasets.Dataset.from_list([contest_row(split)]) for split in ("test", "train")
    }
    mbpp = {"prompt": datasets.Dataset.from_list(SHOTS), "test": datasets.Dataset.from_list(
        [mbpp_row(11), mbpp_row(510)])}  # fmt: skip
    asked = []

    def load(name, config):
        asked.append((name, config))
        return mbpp if "mbpp" in name else splits

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert names("deepmind/code_contests", "test") == ["test"]
    assert names("deepmind/code_contests", "all") == ["test", "train"]
    tasks = load_tasks("mbpp", "google-research-datasets/mbpp", "test")
    assert [task.task_id for task in tasks] == [11, 510]
    assert "Return 2." in tasks[0].prompt  # of another split
    assert asked[-1] == ("google-research-datasets/mbpp", "full")


def test_hub_that_cannot_be_read(monkeypatch):
    def load(name, config):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"owner/x is not a local path.*ConnectionError: no route"):
        load_tasks("humaneval", "owner/x", "test")


@pytest.mark.parametrize("name", ["nothing.jsonl", "folder/nothing.json", "folder/a.parquet"])
def test_missing_files_are_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match=f"{name} does not exist: give a local file"):
        load_tasks("mbpp", name, "test")


@pytest.mark.parametrize("task", TASKS)
def test_wrong_file(write, task):
    titles = {"mbpp": "MBPP", "humaneval": "HumanEval", "code_contests": "CodeContests"}
    for other, row in ROWS.items():
        if other != task:
            path = write(row(1), name=f"{other}.jsonl")
            with pytest.raises(
                ValueError,
                match=f"{other}.jsonl:1: .* looks like {titles[other]}: set task={other}",
            ):
                load_tasks(task, path, "all")
    with pytest.raises(ValueError, match=r"s.jsonl:1: .*looks like samples: pass the file as samp"):
        load_tasks(task, write({"task_id": None, "completion": ""}, name="s.jsonl"), "all")
    with pytest.raises(ValueError, match=r"o.jsonl:1: .*needs the columns .*; this row has foo"):
        load_tasks(task, write({"foo": 1}, name="o.jsonl"), "all")


def test_wrong_parquet(tmp_path):
    path = str(tmp_path / "x.parquet")
    datasets.Dataset.from_list([humaneval_row(1)]).to_parquet(path)
    with pytest.raises(
        ValueError, match=r"x.parquet:1: .*looks like HumanEval: set task=humaneval"
    ):
        load_tasks("mbpp", path, "all")
    Path(path).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"x.parquet is not a readable parquet file"):
        load_tasks("mbpp", path, "all")


@pytest.mark.parametrize(
    ("task", "changes", "why"),
    [
        ("mbpp", {"task_id": "11"}, "task_id is '11', not an integer"),
        ("mbpp", {"task_id": True}, "task_id is True, not an integer"),
        ("mbpp", {"text": 5}, "text is int, not a string"),
        ("mbpp", {"code": None}, "code is missing"),
        ("mbpp", {"test_list": []}, "test_list is empty"),
        ("mbpp", {"test_list": "assert f()"}, "test_list is not a list of strings"),
        ("mbpp", {"test_list": ["a", 1]}, "test_list is not a list of strings"),
        ("mbpp", {"test_setup_code": None}, "test_setup_code is missing"),
        ("humaneval", {"task_id": 3}, "task_id is int, not a string"),
        ("humaneval", {"entry_point": ""}, "entry_point is empty"),
        ("humaneval", {"test": None}, "test is missing"),
        ("humaneval", {"prompt": ["a"]}, "prompt is list, not a string"),
        ("humaneval", {"canonical_solution": None}, "canonical_solution is missing"),
        ("code_contests", {"name": 5}, "name is int, not a string"),
        ("code_contests", {"description": None}, "description is missing"),
        ("code_contests", {"public_tests": []}, r"public_tests is not \{input\[\], output\[\]\}"),
        ("code_contests", {"private_tests": {"input": ["1"], "output": []}}, "has 1 input and 0 o"),
        (
            "code_contests",
            {"private_tests": {"input": [1], "output": ["1"]}},
            "input is not a list",
        ),
        ("code_contests", {"private_tests": {"input": ["1"]}}, "output is missing"),
        ("code_contests", {"solutions": {"language": ["PY"], "solution": [""]}}, "language is not"),
        ("code_contests", {"time_limit": 3}, r"time_limit is 3, not \{seconds, nanos\}"),
        ("code_contests", {"time_limit": {"seconds": -1, "nanos": 0}}, "time_limit is"),
        ("code_contests", {"memory_limit_bytes": "1"}, "memory_limit_bytes is '1', not a number"),
        ("code_contests", {"input_file": "../x"}, "input_file is '../x', not the name of a file"),
        ("code_contests", {"output_file": 3}, "output_file is int, not a string"),
        (
            "code_contests",
            {f"{kind}_tests": NOTHING for kind in ("public", "private", "generated")},
            "no test in public_tests, private_tests, generated_tests",
        ),
    ],
)
def test_bad_row_is_named(write, task, changes, why):
    path = write(ROWS[task](1) | {"name": "first"}, b"", ROWS[task](2) | changes)
    with pytest.raises(ValueError, match=f"^rows.jsonl:3: .*{why}.*: fix that row of .*rows.jsonl"):
        load_tasks(task, path, "all")


@pytest.mark.parametrize("task", TASKS)
def test_damaged_files(write, tmp_path, task):
    row = ROWS[task]
    with pytest.raises(
        ValueError, match=r"rows.jsonl:2: not JSON .*: fix that row of .* download it"
    ):
        load_tasks(task, write(row(1), json.dumps(row(2)).encode()[:-9]), "all")
    with pytest.raises(ValueError, match=r"rows.jsonl:2: task .* is a duplicate of rows.jsonl:1"):
        load_tasks(task, write(row(1), row(1)), "all")
    with pytest.raises(ValueError, match=r"rows.jsonl is empty: give a file with"):
        load_tasks(task, write(), "all")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: not a JSON object"):
        load_tasks(task, write([1]), "all")
    path = tmp_path / "list.json"
    for content, why in (
        ("[{}", r"list.json is not JSON, or is truncated"),
        ("{}", r"list.json is not a JSON list of rows"),
        ("[[]]", r"list.json, row 1: not a JSON object"),
        ("[]", r"list.json is empty"),
        (json.dumps([row(1), row(2) | {"solutions": 1, "prompt": 1, "code": 1}]), "json, row 2: "),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=why):
            load_tasks(task, path, "all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no .jsonl or .parquet file"):
        load_tasks(task, tmp_path / "empty", "all")
    with pytest.raises(ValueError, match=r"x.gz: expected a .jsonl"):
        load_tasks(task, write(name="x.gz"), "all")


def test_samples_are_read_as_the_benchmarks_are(samples):
    tasks = load_tasks("mbpp", samples / "mbpp.jsonl", "all")
    assert [task.task_id for task in tasks] == [2, 3, 4, 12, 511, 602]
    assert [t.task_id for t in load_tasks("mbpp", samples / "mbpp.jsonl", "test")] == [12]
    assert all("\r" not in task.prompt for task in tasks)
    assert len(load_tasks("humaneval", samples / "humaneval.jsonl", "test")) == 2
    contests = load_tasks("code_contests", samples / "code_contests.jsonl", "test")
    assert len(contests) == 3
    assert all(task.reference and task.job(task.reference, 1.0).cases for task in contests)


@pytest.mark.nightly
def test_real_files(benchmarks):
    full = load_tasks("mbpp", benchmarks / "mbpp/mbpp.jsonl", "test")
    assert [task.task_id for task in full] == list(range(11, 511))
    assert len(load_tasks("mbpp", benchmarks / "mbpp/mbpp.jsonl", "all")) == 974
    sanitized = load_tasks("mbpp", benchmarks / "mbpp/sanitized-mbpp.json", "test")
    assert len(sanitized) == 257
    assert all(task.prompt.count("[BEGIN]") == 4 for task in (*full, *sanitized))
    assert all(task.prompt.count("[DONE]") == 3 and "\r" not in task.prompt for task in full)
    assert len(load_tasks("humaneval", benchmarks / "humaneval/HumanEval_even.jsonl", "test")) == 82
    contests = load_tasks("code_contests", benchmarks / "code_contests/sample_a.jsonl", "test")
    assert len(contests) == 150
    assert all(task.reference and task.job(task.reference, 1.0).cases for task in contests)
