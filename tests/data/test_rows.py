import json
import logging
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchtune.models.llama2 import llama2_tokenizer

from wmtp_modules.data import rows as rows_module
from wmtp_modules.data import rows_dataset
from wmtp_modules.data.sources import hub_source

EXPECTED = (
    "expected text, or prompt and response, or prompt and completion, or instruction and output, "
    "or messages"
)
PAIR = {"prompt": "add: ", "response": "x + 1"}


@pytest.fixture
def report(caplog):
    """The last report logged."""
    caplog.set_level(logging.INFO, logger=rows_module.log.name)
    return lambda: caplog.messages[-1]


def decoded(tokenizer, rows):
    return sorted(tokenizer.decode(row["tokens"]) for row in rows)


def test_text_rows_are_split_and_flagged(tokenizer, make_jsonl, report):
    text = "value = 1\n" * 40
    source = make_jsonl({"text": text, "noise": [[0, 5]]}, {"text": "short"})
    rows = rows_dataset(tokenizer, source=source)
    assert rows.column_names == ["tokens", "keep", "noise"]
    assert rows.features["tokens"].feature.dtype == "int32"
    ids = tokenizer.encode(text)
    assert list(chain(*rows[:-1]["tokens"])) == ids
    assert [len(tokens) for tokens in rows["tokens"]][:-2] == [64] * (len(rows) - 2)
    assert all(all(keep) for keep in rows["keep"])
    assert rows[0]["noise"][1] is True
    assert not any(chain(*rows[1:]["noise"]))
    assert "left out: 0 rows that contain an evaluation task" in report()


def test_pairs_keep_reward_and_problem_and_drop_over_long_rows(tokenizer, make_jsonl, report):
    source = make_jsonl(
        PAIR | {"reward": 2, "problem_id": 7},
        PAIR,
        {"prompt": "p", "response": "word " * 100},
    )
    rows = rows_dataset(tokenizer, source=source)
    assert rows["reward"][:] == [2.0, None]
    assert rows["problem_id"][:] == ["7", None]
    assert "noise" not in rows.column_names
    assert rows[0]["tokens"] == tokenizer.encode("add: x + 1")
    assert rows[0]["keep"][0] is False
    assert rows[0]["keep"][-1] is True
    assert "1 rows longer than max_seq_len 64" in report()


def test_pairs_keep_their_text_and_plain_text_has_none(tokenizer, make_jsonl):
    pairs = rows_dataset(tokenizer, source=make_jsonl(PAIR, PAIR))
    assert pairs.column_names == ["tokens", "keep", "prompt", "response"]
    mixed = rows_dataset(tokenizer, source=make_jsonl(PAIR, {"text": "alone"}))
    assert mixed["prompt"][:] == ["add: ", None]
    assert mixed["response"][:] == ["x + 1", None]


def test_noise_of_a_pair_counts_from_its_response(tokenizer, make_jsonl):
    noisy = PAIR | {"noise": [[4, 5]]}
    rows = rows_dataset(tokenizer, source=make_jsonl(noisy, PAIR | {"noise": []}, PAIR))
    flagged = [t for t, noise in zip(rows[0]["tokens"], rows[0]["noise"], strict=True) if noise]
    assert tokenizer.decode(flagged).strip() == "1"
    assert not any(chain(*rows[1:]["noise"]))


BAD = [
    (b'{"text": "a"', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "not a JSON object"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"other": 1}', "fields missing"),
    (b'{"text": "a", "prompt": "b"}', "expected text, or prompt and response"),
    (b'{"prompt": "b"}', "expected text, or prompt and response"),
    (b'{"text": 5}', "text is int, not a string"),
    (b'{"text": " \\n"}', "text is empty"),
    (b'{"prompt": "", "response": "b"}', "prompt is empty"),
    (b'{"text": "a\\u0000b"}', "NUL"),
    (b'{"text": "a\\ud800b"}', "surrogate"),
    (b'{"prompt": "a", "response": "b", "reward": 1%s}' % (b"0" * 400), "reward is 1000"),
    (b'{"prompt": "a", "response": "b", "reward": "1"}', "reward is '1', not a number"),
    (b'{"prompt": "a", "response": "b", "reward": true}', "reward is True, not a number"),
    (b'{"prompt": "a", "response": "b", "problem_id": []}', "problem_id is"),
    (b'{"prompt": "ab", "response": "c", "noise": [[1, 2]]}', "within 1 characters"),
    (b'{"text": "abc", "noise": [[0, 4]]}', "noise span"),
    (b'{"text": "abc", "noise": [[2, 2]]}', "noise span"),
    (b'{"text": "abc", "noise": [[-1, 2]]}', "noise span"),
    (b'{"text": "abc", "noise": [[0.0, 2]]}', "noise span"),
    (b'{"text": "abc", "noise": 3}', "noise span"),
]


@pytest.mark.parametrize(("line", "why"), BAD)
def test_bad_row_is_named_by_file_and_line(tokenizer, make_jsonl, report, line, why):
    rows = rows_dataset(tokenizer, source=make_jsonl({"text": "good"}, b"", line))
    assert decoded(tokenizer, rows) == ["good"]
    assert "1 bad rows (rows.jsonl:3: " in report()
    assert why in report()
    with pytest.raises(ValueError, match=r"bad\.jsonl has no valid row: bad\.jsonl:1: ") as info:
        rows_dataset(tokenizer, source=make_jsonl(line, name="bad.jsonl"))
    assert why in str(info.value)


def test_a_kind_of_bad_row_is_told_once_with_its_number_and_fields(tokenizer, make_jsonl, report):
    rewards = [PAIR | {"reward": str(i)} for i in range(4)]
    unlike = [{"instruction": "a", f"output{i}": "b"} for i in range(3)]
    source = make_jsonl(*[{"text": 1, "id": 2}] * 7, *rewards, *unlike, b"[1", b"[12]", PAIR)
    rows_dataset(tokenizer, source=source)
    for told in (
        "16 bad rows (",
        "rows.jsonl:1: text is int, not a string, the row has the fields text, id (7 such rows); ",
        "rows.jsonl:8: reward is '0', not a number, the row has the fields prompt, response, reward"
        " (4 such rows); ",
        f"rows.jsonl:12: fields instruction: {EXPECTED}, the row has the fields instruction, "
        "output0 (3 such rows); ",
        "rows.jsonl:15: not JSON (Expecting ',' delimiter: line 2 column 1 (char 3)); ",
        "rows.jsonl:16: not a JSON object)",
    ):
        assert told in report()
    assert report().count("rows.jsonl:") == 5
    with pytest.raises(ValueError, match="valid row") as error:
        rows_dataset(tokenizer, source=make_jsonl(*unlike, {}))
    assert str(error.value).endswith(
        f"rows.jsonl has no valid row: rows.jsonl:1: fields instruction: {EXPECTED}, the row has "
        "the fields instruction, output0 (4 such rows)"
    )
    with pytest.raises(ValueError, match=r"messages, the row has no fields$"):
        rows_dataset(tokenizer, source=make_jsonl({}))


def test_five_kinds_of_bad_rows_are_shown(tokenizer, make_jsonl, report):
    values = [1, 1.5, [], {}, True, " ", "\0"]
    rows_dataset(tokenizer, source=make_jsonl(*({"text": value} for value in values), PAIR))
    assert report().count("rows.jsonl:") == 5
    assert "; and 2 other kinds)" in report()


def test_fields_of_columns_that_are_not_read(tokenizer, tmp_path):
    records = [{"prompt": "p", "answer": "c", "id": 1}] * 3
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(records).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"has the fields prompt, answer, id \(3 such rows"):
        rows_dataset(tokenizer, source=str(path))
    datasets.Dataset.from_list([{"body": "c", "id": 1}]).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"rows\.parquet has columns body, id, none of text"):
        rows_dataset(tokenizer, source=str(path))


def test_exact_duplicates_are_counted(tokenizer, make_jsonl, report):
    other = PAIR | {"reward": 1.0}
    rows = [PAIR, {"text": "a"}, PAIR, other, {"text": "a", "id": 1}, {"text": "a "}, PAIR]
    assert len(rows_dataset(tokenizer, source=make_jsonl(*rows))) == 7
    assert "tokens, 3 exact duplicates of another among them, from 7 records" in report()
    rows_dataset(tokenizer, source=make_jsonl(PAIR, other))
    assert "duplicates of another" not in report()
    for name in "ab":  # also from file to file
        source = make_jsonl(PAIR, name=f"many/{name}.jsonl")
    rows_dataset(tokenizer, source=str(Path(source).parent))
    assert "1 exact duplicates" in report()


def strings_with_bad_utf8(values: list[bytes]) -> pa.Array:
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


@pytest.fixture
def bad_utf8(tmp_path):
    """A parquet file of 140 rows, of which row 71 (from 1) is no UTF-8."""
    texts = [b"row %d" % i for i in range(140)]
    texts[70] = b"caf\xe9"
    table = pa.table({"text": strings_with_bad_utf8(texts), "id": range(140)})
    pq.write_table(table, tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_a_value_that_is_no_utf8_costs_its_row(tokenizer, bad_utf8, report, monkeypatch):
    told = "text is not UTF-8 (unexpected end of data at byte 3)"
    rows = rows_dataset(tokenizer, source=str(bad_utf8))
    assert decoded(tokenizer, rows) == sorted(f"row {i}" for i in range(140) if i != 70)
    assert f"1 bad rows (rows.parquet:71: {told})" in report()
    hub = datasets.DatasetDict(train=datasets.Dataset(pq.read_table(bad_utf8)))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: hub)
    assert rows_dataset(tokenizer, source="owner/name")[:] == rows[:]
    assert f"1 bad rows (owner/name:train[70]: {told})" in report()


def test_one_file_of_a_folder_without_a_valid_row_is_an_error(tokenizer, make_jsonl, tmp_path):
    make_jsonl({"text": "good"}, name="data/a.jsonl")
    make_jsonl({"text": ""}, name="data/b.jsonl")
    with pytest.raises(ValueError, match=r"b\.jsonl has no valid row: b\.jsonl:1: text is empty"):
        rows_dataset(tokenizer, source=str(tmp_path / "data"))
    (tmp_path / "data/b.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.jsonl has no valid row: it is empty"):
        rows_dataset(tokenizer, source=str(tmp_path / "data"))


def test_parquet_equals_jsonl(tokenizer, make_jsonl, tmp_path, report):
    records = [{"text": "one two", "noise": [[0, 3]]}, {"text": None, "noise": None}, {"text": "x"}]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(records).to_parquet(str(path))
    from_parquet = rows_dataset(tokenizer, source=str(path))
    assert "1 bad rows (rows.parquet:2: fields missing" in report()
    assert from_parquet[:] == rows_dataset(tokenizer, source=make_jsonl(*records))[:]
    path.write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        rows_dataset(tokenizer, source=str(path))


def test_text_folder_reads_every_text_file_exactly(tokenizer, tmp_path, report):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git/config.txt").write_text("hidden")
    (folder / "sub/test_a.py").write_bytes(b"if x:\r\n\ty = 1\n")
    (folder / "b.MD").write_text("\ufeff# title\n", encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "image.png").write_bytes(b"\x89PNG")
    rows = rows_dataset(tokenizer, source=str(folder))
    assert decoded(tokenizer, rows) == ["# title\n", "if x:\r\n\ty = 1\n"]
    assert "1 bad rows (latin.txt: not UTF-8 (unexpected end of data at byte 3))" in report()
    assert "3 files (b.MD, latin.txt, sub/test_a.py), not read: 1 neither" in report()
    assert "neither rows nor text (image.png); left out" in report()


def test_missing_and_unusable_sources(tokenizer, tmp_path, monkeypatch):
    for name in ("data/none.jsonl", "/nowhere/at-all", "./none", "none"):
        with pytest.raises(ValueError, match=r"does not exist: give a local .* hub name"):
            rows_dataset(tokenizer, source=name)
    with pytest.raises(ValueError, match="has no supported file"):
        rows_dataset(tokenizer, source=str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="owner/name is not a local path, and cannot be read as a Hugging Face"
    ):
        rows_dataset(tokenizer, source="owner/name")


def test_arguments_are_checked(tokenizer, tiny_tokenizer_path, make_jsonl):
    source = make_jsonl({"text": "a"})
    with pytest.raises(ValueError, match="split must be train or validation, got 'test'"):
        rows_dataset(tokenizer, source=source, split="test")
    with pytest.raises(ValueError, match=r"validation_fraction must be .* got 1"):
        rows_dataset(tokenizer, source=source, validation_fraction=1)
    with pytest.raises(ValueError, match="no validation split: set validation_fraction"):
        rows_dataset(tokenizer, source=source, split="validation")
    with pytest.raises(ValueError, match=r"tokenizer\.max_seq_len is None"):
        rows_dataset(llama2_tokenizer(str(tiny_tokenizer_path)), source=source)


def test_nothing_left_names_the_reasons(tokenizer, make_jsonl):
    source = make_jsonl({"prompt": "p", "response": "word " * 100})
    with pytest.raises(ValueError, match=r"no row remains.*1 rows longer than max_seq_len"):
        rows_dataset(tokenizer, source=source)
    # A failed attempt leaves nothing behind that a later one would take for a result.
    with pytest.raises(ValueError, match="no row remains"):
        rows_dataset(tokenizer, source=source)


def test_division_depends_on_content_and_seed_only(tokenizer, make_jsonl):
    texts = [f"text number {i}" for i in range(200)]
    kwargs = dict(validation_fraction=0.25)
    forward = make_jsonl(*({"text": t} for t in texts), name="forward.jsonl")
    backward = make_jsonl(*({"text": t} for t in reversed(texts)), name="backward.jsonl")
    parts = {
        (name, split, seed): decoded(
            tokenizer, rows_dataset(tokenizer, source=source, split=split, seed=seed, **kwargs)
        )
        for name, source in (("forward", forward), ("backward", backward))
        for split in ("train", "validation")
        for seed in (0, 1)
    }
    for seed in (0, 1):
        train, held_out = parts["forward", "train", seed], parts["forward", "validation", seed]
        assert sorted(train + held_out) == sorted(texts)
        assert 30 < len(held_out) < 70
        assert train == parts["backward", "train", seed]
        assert held_out == parts["backward", "validation", seed]
    assert parts["forward", "validation", 0] != parts["forward", "validation", 1]


def test_rows_of_a_problem_stay_on_one_side(tokenizer, make_jsonl):
    source = make_jsonl(
        *(
            {"prompt": f"p{i}", "response": f"r{j}", "problem_id": str(i)}
            for i in range(30)
            for j in range(3)
        )
    )
    sides = [
        set(rows_dataset(tokenizer, source=source, split=s, validation_fraction=0.3)["problem_id"])
        for s in ("train", "validation")
    ]
    assert sides[0] | sides[1] == {str(i) for i in range(30)}
    assert not sides[0] & sides[1]


def make_hub_folder(make_jsonl):
    make_jsonl({"text": "one"}, name="hub/data/train-00000-of-00002.jsonl")
    make_jsonl({"text": "two"}, name="hub/data/train-00001-of-00002.jsonl")
    make_jsonl({"text": "held out"}, name="hub/data/valid-00000-of-00001.jsonl")
    make_jsonl({"text": "secret"}, name="hub/data/test-00000-of-00001.jsonl")


def test_folder_with_named_splits_keeps_them(tokenizer, make_jsonl, tmp_path):
    make_hub_folder(make_jsonl)
    source = str(tmp_path / "hub")
    expected = {"train": ["one", "two"], "validation": ["held out"]}
    for split, texts in expected.items():
        rows = rows_dataset(tokenizer, source=source, split=split, validation_fraction=0.5)
        assert decoded(tokenizer, rows) == texts
    make_jsonl({"text": "secret"}, name="only/test.jsonl")
    with pytest.raises(ValueError, match="no file for train, only"):
        rows_dataset(tokenizer, source=str(tmp_path / "only"))


def test_hub_splits_through_load_dataset(tokenizer, make_jsonl, tmp_path, monkeypatch):
    make_hub_folder(make_jsonl)
    folder = str(tmp_path / "hub")
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: real(folder, config))
    expected = {"train": ["one", "two"], "validation": ["held out"]}
    for split, texts in expected.items():
        rows = rows_dataset(tokenizer, source="owner/name", split=split, validation_fraction=0.5)
        assert decoded(tokenizer, rows) == texts
    with pytest.raises(ValueError, match="has columns text, none of prompt"):
        hub_source("owner/name", "train", ("prompt",), None)
    (tmp_path / "hub/data/train-00000-of-00002.jsonl").unlink()
    (tmp_path / "hub/data/train-00001-of-00002.jsonl").unlink()
    with pytest.raises(ValueError, match="has no train split, only"):
        hub_source("owner/name", "train", ("text",), None)


def test_second_call_is_a_cache_hit(
    tokenizer, tiny_tokenizer_path, make_jsonl, monkeypatch, report
):
    source = make_jsonl({"text": "one " * 60})
    first = rows_dataset(tokenizer, source=source)
    first_report = report()

    def refuse(*args):
        raise AssertionError("made again")

    monkeypatch.setattr(rows_module, "_generate", refuse)
    again = llama2_tokenizer(str(tiny_tokenizer_path), max_seq_len=64)
    second = rows_dataset(again, source=source)
    assert second.cache_files == first.cache_files
    assert second[:] == first[:]
    assert report() == first_report
    with pytest.raises(AssertionError, match="made again"):
        rows_dataset(llama2_tokenizer(str(tiny_tokenizer_path), 32), source=source)
    make_jsonl({"text": "two " * 60})
    with pytest.raises(AssertionError, match="made again"):
        rows_dataset(tokenizer, source=source)


@pytest.mark.slow
def test_another_process_finds_the_cache(tokenizer, tiny_tokenizer_path, make_jsonl, cache_folder):
    source = make_jsonl({"text": "one " * 60})
    rows = rows_dataset(tokenizer, source=source)
    program = (
        "import json, sys\n"
        "from torchtune.models.llama2 import llama2_tokenizer\n"
        "from wmtp_modules.data import rows as r\n"
        "def refuse(*args):\n    raise AssertionError('made again')\n"
        "r._generate = refuse\n"
        "rows = r.rows_dataset(llama2_tokenizer(sys.argv[1], max_seq_len=64), source=sys.argv[2])\n"
        "print(json.dumps(rows.cache_files))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_tokenizer_path), source],
        env={"HF_DATASETS_CACHE": str(cache_folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == rows.cache_files


def test_rows_are_memory_mapped(tokenizer, make_jsonl):
    rows = rows_dataset(tokenizer, source=make_jsonl({"text": "one"}))
    assert rows.cache_files
    assert np.array_equal(rows[0]["tokens"], tokenizer.encode("one"))


# ------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["report.json", "state.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff" * 200])
def test_a_damaged_cache_says_which_folder_to_delete(
    tokenizer, make_jsonl, cache_folder, name, content
):
    source = make_jsonl({"text": "x = 1"})
    rows_dataset(tokenizer, source=source)
    (file,) = cache_folder.rglob(name)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="are damaged: delete that folder to rebuild") as e:
        rows_dataset(tokenizer, source=source)
    (folder,) = (cache_folder / "wmtp").iterdir()
    assert str(folder) in str(e.value)
    shutil.rmtree(folder)
    assert len(rows_dataset(tokenizer, source=source)) == 1


def test_a_full_disk_is_told_with_the_folder(tokenizer, make_jsonl, cache_folder, monkeypatch):
    from datasets.arrow_writer import ArrowWriter

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ArrowWriter, "finalize", full)
    with pytest.raises(OSError, match=r"cached \(No space left on device\): make room for .*wmtp"):
        rows_dataset(tokenizer, source=make_jsonl({"text": "x = 1"}))


def test_an_empty_source_does_not_mean_the_current_folder(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "secret.py").write_text("x = 1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="source is empty: give a file"):
        rows_dataset(tokenizer, source=" ")


def test_a_line_nested_too_deeply_is_a_bad_row(tokenizer, make_jsonl, report):
    rows = rows_dataset(tokenizer, source=make_jsonl(b"[" * 100_000, {"text": "x = 1"}))
    assert len(rows) == 1
    assert "rows.jsonl:1: not JSON (nested too deeply)" in report()
