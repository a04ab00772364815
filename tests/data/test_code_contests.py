import datasets
import pytest
from torchtune.models.llama2 import llama2_tokenizer

from wmtp_modules.data import code_contests_dataset


def problem(title, codes=("print(1)\n",), languages=None, **changes):
    return {
        "name": title,
        "description": f"Problem {title}: print one.",
        "solutions": {"language": languages or [3] * len(codes), "solution": list(codes)},
        "incorrect_solutions": {"language": [3], "solution": ["print(0)\n"]},
        "generated_tests": {"input": ["1\n"], "output": ["1\n"]},
    } | changes


def test_python3_solutions_only(tokenizer, make_jsonl):
    source = make_jsonl(
        problem("a", ["print 1\n", "cout", "print(1)\r\n", "print(1)\n", "class"], [1, 2, 3, 3, 4]),
        problem("b", ["cout"], [2]),
    )
    rows = code_contests_dataset(tokenizer, source=source)
    assert len(rows) == 1  # duplicates count once
    assert (rows[0]["reward"], rows[0]["problem_id"]) == (1.0, "a")
    assert rows[0]["tokens"] == tokenizer.encode("Problem a: print one.\nprint(1)\n")
    kept = [t for t, keep in zip(rows[0]["tokens"], rows[0]["keep"], strict=True) if keep]
    assert tokenizer.decode(kept) == "print(1)\n"


def test_incorrect_solutions_come_along(tokenizer, make_jsonl):
    bad = [f"print({i})\n" for i in range(10)]  # print(1) is among the correct ones as well
    failed = {"language": [3] * 10 + [2], "solution": [*bad, "cout"]}
    source = make_jsonl(
        problem("a", ["print(1)\r\n", "print(+1)\n", "print(1.)\n"], incorrect_solutions=failed),
        problem("b", ["print(0)\n"]),  # its only text is in both lists
        problem("c", incorrect_solutions={"language": [], "solution": []}),
    )
    rows = code_contests_dataset(tokenizer, source=source, incorrect=True, max_solutions=4)
    drawn = [(r["problem_id"], r["reward"], r["response"]) for r in rows]
    assert sorted(drawn[:2]) == [("a", 1.0, "print(+1)\n"), ("a", 1.0, "print(1.)\n")]
    assert [(name, reward) for name, reward, _ in drawn[2:]] == [("a", 0.0)] * 4 + [("c", 1.0)]
    assert len({code for *_, code in drawn[2:6]} & set(bad) - {"print(1)\n"}) == 4
    again = code_contests_dataset(tokenizer, source=source, incorrect=True, max_solutions=4)
    assert again["tokens"][:] == rows["tokens"][:]
    correct = code_contests_dataset(tokenizer, source=source, max_solutions=4)
    assert correct["problem_id"][:] == ["a", "a", "a", "b", "c"]
    assert set(correct["reward"]) == {1.0}
    # Without the parameter a source needs no list of them; with it, it does.
    lacking = make_jsonl(problem("a", incorrect_solutions=None))
    assert len(code_contests_dataset(tokenizer, source=lacking)) == 1
    with pytest.raises(ValueError, match="incorrect_solutions is not"):
        code_contests_dataset(tokenizer, source=lacking, incorrect=True)


def test_solutions_are_capped_by_seed(tokenizer, make_jsonl):
    codes = [f"print({i})\n" for i in range(20)]

    def drawn(seed, codes, name):
        source = make_jsonl(problem("a", codes), name=name)
        rows = code_contests_dataset(tokenizer, source=source, seed=seed, max_solutions=4)
        return [tokenizer.decode(row["tokens"]) for row in rows]

    first = drawn(0, codes, "a.jsonl")
    assert len(set(first)) == 4
    assert first == drawn(0, codes[::-1], "b.jsonl")
    assert first != drawn(1, codes, "c.jsonl")
    with pytest.raises(ValueError, match="max_solutions must be at least 1, got 0"):
        code_contests_dataset(tokenizer, source="any", max_solutions=0)


def test_problems_are_divided_whole(tokenizer, make_jsonl):
    source = make_jsonl(*(problem(str(i), ["print(1)", "print(2)"]) for i in range(40)))
    sides = [
        code_contests_dataset(tokenizer, source=source, split=s, validation_fraction=0.3)
        for s in ("train", "validation")
    ]
    names = [side["problem_id"][:] for side in sides]
    assert len(names[0]) + len(names[1]) == 80
    assert not set(names[0]) & set(names[1])
    assert 8 <= len(names[1]) <= 40


def test_hub_has_its_own_validation_split(tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    # As the hub has it: lists in a dict, the language as a class label.
    languages = datasets.ClassLabel(names=["UNKNOWN_LANGUAGE", "PYTHON", "CPP", "PYTHON3", "JAVA"])
    solutions = {
        "language": datasets.List(languages),
        "solution": datasets.List(datasets.Value("string")),
    }
    for split in ("train", "valid", "test"):
        rows = datasets.Dataset.from_list([problem(f"{split}{i}") for i in range(3)])
        rows = rows.cast_column("solutions", solutions)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(str(folder / f"data/{split}-00000-of-00001.parquet"))
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: real(str(folder), config))
    for source in ("deepmind/code_contests", str(folder)):
        for split, own in (("train", "train"), ("validation", "valid")):
            rows = code_contests_dataset(tokenizer, source=source, split=split)
            assert rows["problem_id"][:] == [f"{own}{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"description": " "}, "description is empty"),
        ({"name": 3}, "name is int, not a string"),
        ({"solutions": None}, "solutions is not"),
        ({"solutions": {"language": [3], "solution": []}}, "solutions is not"),
        ({"solutions": {"language": [3], "solution": ["a\0"]}}, "solutions holds a NUL"),
    ],
)
def test_bad_problems(tokenizer, make_jsonl, changes, why):
    with pytest.raises(ValueError, match=f"no valid row: rows.jsonl:1: {why}"):
        code_contests_dataset(tokenizer, source=make_jsonl(problem("a", **changes)))


def test_samples_in_the_shape_of_the_real_ones(tiny_tokenizer_path, samples):
    long = llama2_tokenizer(str(tiny_tokenizer_path), max_seq_len=1000)
    rows = code_contests_dataset(long, source=str(samples / "code_contests.jsonl"))
    assert rows["problem_id"][:] == ["1_a_sum_of_two", "2_b_mean", "3_c_many_queries"]
    assert set(rows["reward"]) == {1.0}


@pytest.mark.nightly
def test_real_problems(tiny_tokenizer_path, benchmarks):
    long = llama2_tokenizer(str(tiny_tokenizer_path), max_seq_len=100_000)
    rows = code_contests_dataset(long, source=str(benchmarks / "code_contests/sample_a.jsonl"))
    assert len(rows) == 150
    assert len(set(rows["problem_id"])) == 150
    assert set(rows["reward"]) == {1.0}
