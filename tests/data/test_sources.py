"""Which files of a folder are read: splits by name, formats that are not read, pointers of git."""

import gzip
import os
from pathlib import Path

import pytest
from datasets.data_files import (
    DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME,
    DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
    SPLIT_KEYWORDS,
    resolve_pattern,
)

from wmtp_modules.data.sources import SPLIT_NAMES, open_source, split_of

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ANNEX = b"/annex/objects/MD5E-s123--0123456789abcdef.jsonl\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"


@pytest.fixture
def fill(tmp_path):
    """fill(name=content or None, ...): a folder of files, by default each with a sound row."""

    def make(*names, **contents) -> Path:
        for name in names:
            contents[name] = b'{"text": "%s"}\n' % name.encode()
        for name, content in contents.items():
            path = tmp_path / "folder" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / "folder"

    return make


def names_read(folder, split="train"):
    return [str(path.relative_to(folder)) for path in open_source(folder, split, ("text",)).files]


TEST = [
    "code_test.jsonl", "testing.jsonl", "evaluation.jsonl", "my-eval.jsonl", "a.test.jsonl",
    "Test.jsonl", "HUMAN_EVAL.JSONL", "test1.jsonl", "2test.jsonl", "my test set.jsonl",
    "test/a.jsonl", "my-testing_1/a.jsonl", "test/train-00000-of-00001.jsonl", "a/b_eval/c.jsonl",
    "data/test-00000-of-00001-0123456789abcdef.jsonl", "train_test.jsonl", "test-valid.jsonl",
]  # fmt: skip
VALIDATION = [
    "my-validation.jsonl", "dev.jsonl", "code.val.jsonl", "x_valid_2.jsonl", "VALID.jsonl",
    "dev/a.jsonl", "a/dev/train.jsonl", "train-dev.jsonl", "val-00001-of-00002.jsonl",
]  # fmt: skip
TRAIN = ["my_train.jsonl", "training.jsonl", "code-training-2.jsonl", "train/test_cases.jsonl"]
NONE = [
    "contest.jsonl", "latest.jsonl", "attest.jsonl", "testimony.jsonl", "developers.jsonl",
    "evaluated.jsonl", "retrieval.jsonl", "interval.jsonl", "trainer.jsonl", "tests.jsonl",
    "medieval/values.jsonl", "devset.jsonl", "protestant.jsonl", "constraint.jsonl",
]  # fmt: skip


def test_files_belong_to_the_split_that_their_names_say(fill):
    folder = fill(*TEST, *VALIDATION, *TRAIN, *NONE)
    assert sorted(names_read(folder)) == sorted(TRAIN + NONE)
    assert sorted(names_read(folder, "validation")) == sorted(VALIDATION)
    for name in TEST:
        assert split_of(Path(name)) == "test", name


@pytest.mark.filterwarnings("ignore")
def test_the_rule_is_the_hubs(fill):
    assert {s: sorted(names) for s, names in SPLIT_NAMES.items()} == {
        str(s): sorted(names) for s, names in SPLIT_KEYWORDS.items()
    }
    # Upper case is ours, and in a name of two splits the Hub gives the file to both.
    names = [n for n in TEST + VALIDATION + TRAIN + NONE if n.islower()]
    folder = fill(*names)
    theirs: dict[str, set[str]] = {}
    for patterns in (DEFAULT_PATTERNS_SPLIT_IN_FILENAME, DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME):
        found = {}
        for split, globs in patterns.items():
            for glob in globs:
                try:
                    paths = resolve_pattern(glob, str(folder))
                except FileNotFoundError:
                    continue
                for path in paths:
                    found.setdefault(os.path.relpath(path, folder), set()).add(str(split))
        theirs |= found  # folders before files
    assert len(theirs) > 20
    for name in names:
        assert split_of(Path(name)) in theirs.get(name, {None}), name


def test_files_per_split_are_named(fill):
    folder = fill("a.jsonl", "train.jsonl", "code_test.jsonl", "dev.jsonl", "README.md")
    (folder / "picture.png").touch()
    assert open_source(folder, "train", ("text",)).note == (
        "2 files (no split in the name: a.jsonl; train: train.jsonl), not read: "
        "1 test split (code_test.jsonl), 1 validation split (dev.jsonl), "
        "1 text beside rows (README.md), 1 neither rows nor text (picture.png)"
    )
    note = open_source(folder, "validation", ("text",)).note
    assert note.startswith("1 files (validation: dev.jsonl), not read: 1 test split")
    many = fill(*(f"many/{i}.jsonl" for i in range(8))) / "many"
    note = open_source(many, "train", ("text",)).note
    assert note == "8 files (0.jsonl, 1.jsonl, 2.jsonl, 3.jsonl, 4.jsonl and 3 more)"


def test_a_file_given_by_its_path_is_read_whatever_its_name(fill):
    assert open_source(fill("test.jsonl") / "test.jsonl", "train", ("text",)).files


def test_shards_beside_those_of_train_are_splits_of_their_own(fill):
    folder = fill(*(f"data/{s}-00000-of-00001.jsonl" for s in ("train", "prompt", "train_sft")))
    assert len(names_read(folder)) == 2
    assert "1 prompt split (data/prompt" in open_source(folder, "train", ("text",)).note
    assert len(names_read(fill("only/part-00000-of-00001.jsonl") / "only")) == 1


def test_a_folder_without_the_split_says_which_it_has(fill):
    with pytest.raises(ValueError, match=r"no file for train, only test: code_test.jsonl\. Files"):
        open_source(fill("code_test.jsonl"), "train", ("text",))


def test_texts_have_splits_and_code_has_not(fill):
    texts = fill("wiki.train.txt", "wiki.test.txt", "wiki.valid.txt", "README.md", "b.txt")
    assert names_read(texts) == ["README.md", "b.txt", "wiki.train.txt"]
    assert names_read(texts, "validation") == ["wiki.valid.txt"]
    code = fill("code/test.txt", "code/a_test.py", "code/test/b.py") / "code"
    assert len(names_read(code)) == 3


DATA = [
    "a.parquet.gz", "rows.zip", "rows.tar.gz", "rows.jsonl.xz", "A.JSONL.XZ", "a.tfrecord",
    "rows.xlsx", "rows.npy", "rows.orc", "train.csv.zip", "x.avro",
]  # fmt: skip
READ = [
    "train.jsonl.gz", "train.jsonl.zst", "data.arrow", "data.feather", "a.ndjson", "rows.json",
    "rows.csv", "rows.tsv", "train.csv.gz", "c4-train.00000-of-01024.json.gz", "train.json",
    "train/data-00000-of-00001.arrow", "x.jsonl.bz2",
]  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_data_beside_documents_is_read(fill, name):
    assert names_read(fill(name, "README.md", "LICENSE", "dataset_info.json")) == [name]


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_read_is_an_error_that_names_it(fill, name):
    folder = fill(name, "README.md", "LICENSE", "dataset_info.json")
    with pytest.raises(ValueError, match="has data in files that cannot be read") as error:
        open_source(folder, "train", ("text",))
    assert name in str(error.value)
    assert "README" not in str(error.value)
    assert any(way in str(error.value) for way in ("unpack it", "convert it"))
    with pytest.raises(ValueError, match="in files that cannot be read"):
        open_source(folder / name, "train", ("text",))


def test_data_beside_rows_that_cannot_be_read_is_an_error(fill):
    folder = fill("a.jsonl", "b.jsonl.xz", "c.orc", "meta.json", "vocab.json", "README.md")
    with pytest.raises(ValueError, match=r"b\.jsonl\.xz: unpack it; c\.orc: convert it .* or move"):
        open_source(folder, "train", ("text",))
    for name in ("b.jsonl.xz", "c.orc"):
        (folder / name).unlink()
    fill(**{"test.csv": b"a,b", "my_test.jsonl.gz": gzip.compress(b"{}")})
    source = open_source(folder, "train", ("text",))
    assert "files (no split in the name: a.jsonl), not read: " in source.note
    assert "(README.md, meta.json" not in source.note
    for name in ("meta.json", "my_test.jsonl.gz", "test.csv", "vocab.json"):
        assert name in source.note
    fill(**{"validation.parquet.gz": b"x"})  # its rows would else come from the training files
    with pytest.raises(ValueError, match=r"validation\.parquet\.gz: unpack it"):
        open_source(folder, "validation", ("text",))


def test_a_corpus_keeps_its_tables_and_documents(fill):
    prose = fill("README.md", "guide/testing.md", "LICENSE.txt", "picture.png", "book.json")
    (prose / "guide" / "testing.md").write_text("prose " * 50)
    assert names_read(prose) == ["LICENSE.txt", "README.md", "guide/testing.md"]
    code = fill("code/a.py", "code/package.json", "code/fixture.csv") / "code"
    (code / "a.py").write_text("x = 1\n" * 50)
    source = open_source(code, "train", ("text",))
    assert source.note == (
        "1 files (a.py), not read: 2 neither rows nor text (fixture.csv, package.json)"
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (LFS, "rows.* is a Git LFS pointer, .*: run `git lfs pull`"),
        (ANNEX, "rows.* is a git-annex pointer, .*: run `git annex get`"),
        (PAGE, "rows.* is a web page .*: download it again"),
        (b"Entry not found", "rows.* is a web page or a server's answer"),
    ],
)
def test_what_stands_in_for_a_file_of_rows(fill, name, content, match):
    source = open_source(fill(**{name: content}), "train", ("text",))
    ((_, records),) = source.parts()
    with pytest.raises(ValueError, match=match):
        list(records)


def test_a_pointer_among_texts_is_no_text(fill):
    folder = fill(**{"a.py": LFS, "b.py": b"x = 1", "page.html": PAGE})
    ((_, records),) = open_source(folder, "train", ("text",)).parts()
    read = dict(records)
    assert "git lfs pull" in str(read.pop("a.py"))
    assert read == {"b.py": {"text": "x = 1"}, "page.html": {"text": PAGE.decode()}}


@pytest.mark.parametrize("name", ["b.jsonl", "b.parquet", "train.jsonl.gz"])
def test_a_link_to_nothing_is_missed(fill, name):
    folder = fill("a.jsonl")
    (folder / name).symlink_to("../.git/annex/objects/F1/2x/MD5E-s1--0.jsonl")
    with pytest.raises(ValueError, match=rf"{name}.* a link to .*: run `git annex get {name}`"):
        open_source(folder, "train", ("text",))
    with pytest.raises(ValueError, match=r"a link to .*, which is not there"):
        open_source(folder / name, "train", ("text",))


def test_a_dead_link_in_a_corpus_is_no_error(fill):
    folder = fill(**{"a.py": b"x = 1"})
    (folder / "b.py").symlink_to("gone.py")
    assert names_read(folder) == ["a.py"]
    (folder / "a.py").unlink()
    with pytest.raises(ValueError, match=r"b\.py is a link to gone\.py, which is not there: copy"):
        open_source(folder, "train", ("text",))
