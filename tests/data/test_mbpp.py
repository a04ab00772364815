import json

import datasets
import pytest
from torchtune.models.llama2 import llama2_tokenizer

from wmtp_modules.data import mbpp_dataset


@pytest.fixture
def tokenizer(tiny_tokenizer_path):
    return llama2_tokenizer(str(tiny_tokenizer_path), max_seq_len=1024)


def task(number, **changes):
    return {
        "task_id": number,
        "text": f"Return the number {number}.",
        "code": f"def f():\r\n    return {number}\r\n",
        "test_list": [f"assert f() == {number}", "assert f()", "assert f() > 0"],
        "test_setup_code": "",
    } | changes


EDGES = [1, 10, 11, 510, 511, 600, 601, 974]


def test_format_and_official_split(tokenizer, make_jsonl):
    source = make_jsonl(*map(task, EDGES))
    train = mbpp_dataset(tokenizer, source=source, split="train")
    held_out = mbpp_dataset(tokenizer, source=source, split="validation")
    assert train["problem_id"][:] == ["MBPP/601", "MBPP/974"]
    assert held_out["problem_id"][:] == ["MBPP/511", "MBPP/600"]
    prompt = (
        "You are an expert Python programmer, and here is your task: Return the number 601. Your "
        "code should pass these tests:\n\nassert f() == 601\nassert f()\nassert f() > 0\n[BEGIN]\n"
    )
    response = "def f():\n    return 601\n\n[DONE]"
    assert train[0]["tokens"] == tokenizer.encode(prompt + response)
    kept = [t for t, keep in zip(train[0]["tokens"], train[0]["keep"], strict=True) if keep]
    assert tokenizer.decode(kept) == response
    assert kept[-1] == tokenizer.eos_id


def test_hub_splits(tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    ids = {"train": [601, 974], "validation": [511, 600], "test": [11, 510], "prompt": [1, 10]}
    for split, tasks in ids.items():
        rows = datasets.Dataset.from_list([task(i) for i in tasks])
        (folder / "full").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(str(folder / f"full/{split}-00000-of-00001.parquet"))
    config = {"config_name": "full", "data_files": [
        {"split": split, "path": f"full/{split}-*"} for split in ids
    ]}  # fmt: skip
    (folder / "README.md").write_text(f"---\nconfigs:\n- {json.dumps(config)}\n---\n")
    real = datasets.load_dataset
    asked = []

    def load(name, config):
        asked.append((name, config))
        return real(str(folder), config)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("google-research-datasets/mbpp", str(folder)):
        for split, first in (("train", 601), ("validation", 511)):
            rows = mbpp_dataset(tokenizer, source=source, split=split)
            assert rows["problem_id"][:] == [f"MBPP/{i}" for i in ids[split]]
            assert f"number {first}." in tokenizer.decode(rows[0]["tokens"])
    assert asked == [("google-research-datasets/mbpp", "full")] * 2


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"task_id": "601"}, "task_id is '601', not an integer"),
        ({"test_list": "assert"}, "test_list is not a list of strings"),
        ({"test_list": []}, "test_list is empty"),
        ({"code": ""}, "code is empty"),
        ({"text": None}, "text is missing"),
    ],
)
def test_bad_tasks(tokenizer, make_jsonl, changes, why):
    with pytest.raises(ValueError, match=f"no valid row: rows.jsonl:1: {why}"):
        mbpp_dataset(tokenizer, source=make_jsonl(task(601, **changes)))


def test_a_source_of_test_tasks_only_trains_nothing(tokenizer, make_jsonl):
    with pytest.raises(ValueError, match=r"no row remains.* 2 tasks of other splits"):
        mbpp_dataset(tokenizer, source=make_jsonl(task(11), task(510)))


def test_samples_in_the_shape_of_the_real_ones(tokenizer, samples):
    source = str(samples / "mbpp.jsonl")
    train = mbpp_dataset(tokenizer, source=source, split="train")
    held_out = mbpp_dataset(tokenizer, source=source, split="validation")
    assert (train["problem_id"][:], held_out["problem_id"][:]) == (["MBPP/602"], ["MBPP/511"])
    assert all("\r" not in tokenizer.decode(row["tokens"]) for row in train)


@pytest.mark.nightly
def test_real_tasks(tokenizer, benchmarks):
    tokenizer.max_seq_len = 4096
    source = str(benchmarks / "mbpp/mbpp.jsonl")
    train = mbpp_dataset(tokenizer, source=source)
    held_out = mbpp_dataset(tokenizer, source=source, split="validation")
    # 374 and 90 by the authors' division, less those that repeat a test description.
    assert (len(train), len(held_out)) == (367, 87)
    assert "MBPP/602" not in train["problem_id"][:]
    assert all("\r" not in tokenizer.decode(row["tokens"]) for row in train)
