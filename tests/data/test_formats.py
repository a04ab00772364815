"""Every file format gives the same rows, alone, in folders, lists and patterns, by any number of
processes."""

import bz2
import csv
import gzip
import json
import logging
import os
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from wmtp_modules.data import rows as rows_module
from wmtp_modules.data import rows_dataset
from wmtp_modules.data.sources import open_source, open_sources

RECORDS = [
    {"prompt": f"p{i}\n", "response": text, "weight": 0.5 * i}
    for i, text in enumerate(['a, "b"\n\n é漢', "NA", "007", "null", " 1.0", "x"])
]


def lines(records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def table(path, delimiter):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(RECORDS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(RECORDS)


def zst(path, content):
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)


def feather(path):
    import pyarrow.feather

    pyarrow.feather.write_feather(pa.Table.from_pylist(RECORDS), str(path))


WRITE = {
    "rows.jsonl": lambda p: p.write_bytes(lines(RECORDS)),
    "rows.ndjson": lambda p: p.write_bytes(lines(RECORDS)),
    "rows.json": lambda p: p.write_text("\ufeff" + json.dumps(RECORDS, indent=1), "utf-8"),
    "lines.json": lambda p: p.write_bytes(lines(RECORDS)),
    "rows.csv": lambda p: table(p, ","),
    "rows.tsv": lambda p: table(p, "\t"),
    "rows.parquet": lambda p: datasets.Dataset.from_list(RECORDS).to_parquet(str(p)),
    "rows.feather": feather,
    "saved": lambda p: datasets.Dataset.from_list(RECORDS).save_to_disk(p, num_shards=2),
    "rows.jsonl.gz": lambda p: p.write_bytes(
        gzip.compress(lines(RECORDS[:2])) + gzip.compress(lines(RECORDS[2:]))
    ),
    "rows.json.gz": lambda p: p.write_bytes(gzip.compress(json.dumps(RECORDS).encode())),
    "rows.jsonl.zst": lambda p: zst(p, lines(RECORDS)),
    "ROWS.JSONL.BZ2": lambda p: p.write_bytes(bz2.compress(lines(RECORDS))),
}


@pytest.fixture
def want(tokenizer, make_jsonl):
    return rows_dataset(tokenizer, source=make_jsonl(*RECORDS, name="want/rows.jsonl"))[:]


@pytest.mark.parametrize("name", WRITE)
def test_every_format_gives_the_same_rows(tokenizer, tmp_path, want, name):
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / name
    WRITE[name](path)
    assert rows_dataset(tokenizer, source=str(path))[:] == want
    assert rows_dataset(tokenizer, source=str(path.parent))[:] == want
    assert rows_dataset(tokenizer, source=[str(path)])[:] == want


def test_compressed_tables(tokenizer, tmp_path, want):
    table(tmp_path / "t.csv", ",")
    content = (tmp_path / "t.csv").read_bytes()
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(content))
    zst(tmp_path / "a.csv.zst", content)
    for name in ("a.csv.gz", "a.csv.zst"):
        assert rows_dataset(tokenizer, source=str(tmp_path / name))[:] == want


def test_splits_of_save_to_disk_and_nothing_that_was_computed_there(tokenizer, tmp_path):
    rows = {s: datasets.Dataset.from_list([{"text": s}]) for s in ("train", "test", "validation")}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "saved")
    train = tmp_path / "saved" / "train"
    (train / "cache-0123.arrow").write_bytes((train / "data-00000-of-00001.arrow").read_bytes())
    (tmp_path / "saved" / "README.md").write_text("# A data set")
    for split in ("train", "validation"):
        found = rows_dataset(tokenizer, source=str(tmp_path / "saved"), split=split)
        assert [tokenizer.decode(t) for t in found["tokens"]] == [split]


def texts(tokenizer, **arguments):
    return [tokenizer.decode(t) for t in rows_dataset(tokenizer, **arguments)["tokens"]]


def test_lists_and_patterns(tokenizer, make_jsonl, tmp_path, monkeypatch):
    for name in ("a/train-1.jsonl", "a/train-2.jsonl", "a/test.jsonl", "b/c/x.jsonl"):
        make_jsonl({"text": name}, name=name)
    (tmp_path / "b/notes.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for source, found in (
        (["b/c/x.jsonl", "a/train-1.jsonl"], ["b/c/x.jsonl", "a/train-1.jsonl"]),
        (["a/test.jsonl"], ["a/test.jsonl"]),  # named by itself
        ("a/*.jsonl", ["a/train-1.jsonl", "a/train-2.jsonl"]),
        (str(tmp_path / "a" / "train-[2-9].jsonl"), ["a/train-2.jsonl"]),
        ("a/te*.jsonl", ["a/test.jsonl"]),  # the pattern says so
        ("**/*.jsonl", ["a/train-1.jsonl", "a/train-2.jsonl", "b/c/x.jsonl"]),
        (["b", "a/*"], ["b/c/x.jsonl", "a/train-1.jsonl", "a/train-2.jsonl"]),
    ):
        assert texts(tokenizer, source=source) == found, source
    for source, message in (
        ([], "source is an empty list"),
        (["b", "b"], "source names b twice"),
        ("a/*.csv", r"a/\*\.csv matches no file"),
        (["b", "gone.jsonl"], "gone.jsonl does not exist"),
        (["b", " "], "source is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            rows_dataset(tokenizer, source=source)


def test_of_a_list_each_keeps_its_own_validation_split(tokenizer, make_jsonl, tmp_path):
    for name in ("a/train.jsonl", "a/valid.jsonl"):
        make_jsonl({"text": name}, name=name)
    many = make_jsonl(*({"text": f"b{i}"} for i in range(60)), name="b.jsonl")
    source = [str(tmp_path / "a"), many]
    both = {"source": source, "validation_fraction": 0.2}
    train, held_out = texts(tokenizer, **both), texts(tokenizer, **both, split="validation")
    assert {"a/train.jsonl"} < set(train)
    assert {"a/valid.jsonl"} < set(held_out)
    assert len(train) + len(held_out) == 62
    assert texts(tokenizer, source=source, split="validation") == ["a/valid.jsonl"]


def test_a_list_of_hub_names_and_files(tokenizer, make_jsonl, tmp_path, monkeypatch):
    make_jsonl({"text": "hub"}, name="hub/data/train-00000-of-00001.jsonl")
    real, asked = datasets.load_dataset, []

    def load(name, config):
        asked.append((name, config))
        return real(str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = ["owner/name", make_jsonl({"text": "file"})]
    assert texts(tokenizer, source=source, subset="main") == ["hub", "file"]
    assert asked == [("owner/name", "main")]


BAD = [
    ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:-9], r"a\.jsonl\.gz is truncated or damaged"),
    ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz is truncated or damaged"),
    ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst is truncated or damaged"),
    ("a.json", b"[{}", r"a\.json is not JSON, or is truncated"),
    ("a.json", b'{\n"data": []}', r"a\.json is not a JSON list of rows: give one"),
    ("a.json", b"[3]", r"a\.json has no valid row: a\.json, row 1: not a JSON object"),
    ("a.json", b"", "has no valid row: it is empty"),
    ("a.csv", b"", "has no valid row: it is empty"),
    ("a.csv", b"text\n", "has no valid row: it is empty"),
    ("a.csv", b"a,b\n1,2\n", r"a\.csv has columns a, b, none of text"),
    ("a.csv", b'text\n"x\n', r"a\.csv is no table of rows from line 2 on"),
    ("a.csv", b"text\nx,y\n", r"a\.csv:2: more cells than the header has"),
    ("a.csv", b'text\n"a\n\xff"\n', r"a\.csv:2: not UTF-8"),
    ("a.csv", b"text,reward\nx,good\n", r"a\.csv:2: reward is 'good', not a number"),
    ("a.arrow", b"no arrow", r"a\.arrow is not a readable Arrow file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_what_cannot_be_read_is_one_sentence_with_file_and_row(
    tokenizer, tmp_path, name, content, message
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        rows_dataset(tokenizer, source=str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_lines_of_a_table_are_counted_as_they_stand(tokenizer, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger=rows_module.log.name)
    (tmp_path / "a.csv").write_text('text\n"two\nlines"\n\n" "\nlast\n')
    assert len(rows_dataset(tokenizer, source=str(tmp_path / "a.csv"))) == 2
    assert "1 bad rows (a.csv:5: text is empty" in caplog.messages[-1]


def test_any_number_of_processes_makes_the_same(tokenizer, make_jsonl, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger=rows_module.log.name)
    records = [{"text": f"row {i}"} for i in range(500)]
    records[300:302] = [{"text": 3}, {"text": "row 7"}]
    source = make_jsonl(*records)
    map_rows, taken = datasets.Dataset.map, []
    monkeypatch.setattr(
        datasets.Dataset,
        "map",
        lambda *args, **more: taken.append(more["num_proc"]) or map_rows(*args, **more),
    )
    one, told = rows_dataset(tokenizer, source=source)[:], caplog.messages[-1]
    monkeypatch.setattr(rows_module, "n_processes", lambda n_bytes: 3)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(source).parent / "other")
    rows = rows_dataset(tokenizer, source=source)
    assert rows[:] == one
    assert taken == [None, 3]
    assert caplog.messages[-1] == told
    assert "1 exact duplicates" in told
    assert "rows.jsonl:301: text is int" in told
    (folder,) = (Path(source).parent / "other" / "wmtp").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["report.json", "rows"]


def test_all_cores_are_used_where_it_is_worth_it(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert [rows_module.n_processes(n) for n in (0, 8_000_000, 10**12)] == [1, 2, 6]


def test_a_bar_says_how_far_it_is(tokenizer, make_jsonl, monkeypatch, capsys):
    monkeypatch.setattr(rows_module, "BYTES_PER_PROCESS", 10)
    monkeypatch.setattr(rows_module, "n_processes", lambda n_bytes: 2)
    rows_dataset(tokenizer, source=make_jsonl(*({"text": f"row {i}"} for i in range(300))))
    told = capsys.readouterr().err
    assert "tokenising" in told
    assert re.search(r"(\S+)/\1 B", told)


def test_an_own_name_of_a_column_is_read_from_every_format(tmp_path):
    datasets.Dataset.from_list([{"body": "a", "id": 1}]).to_parquet(str(tmp_path / "a.parquet"))
    (source,) = open_sources(str(tmp_path / "a.parquet"), "train", ("body",))
    ((_, records),) = source.parts()
    assert dict(records) == {"a.parquet:1": {"body": "a", "id": None}}
    assert open_source(tmp_path, "train", ("body",)).files == (tmp_path / "a.parquet",)
