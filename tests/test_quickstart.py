import json
import random
import shutil
import time

import pytest
import sentencepiece as spm

from wmtp_modules.quickstarts import stdlib as quickstart
from wmtp_modules.quickstarts.stdlib import assets_folder, corrupt_lines, prepare_stdlib

ARGUMENTS = {"vocab_size": 400, "corrupted_share": 0.4, "seed": 0}


@pytest.fixture(scope="module", autouse=True)
def few_files():
    """An eighth of the standard library is enough to see how it is dealt."""
    files = quickstart.stdlib_files()[::8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "stdlib_files", lambda: files)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "assets"
    prepare_stdlib(str(folder), **ARGUMENTS)
    return folder


@pytest.fixture
def assets(made, tmp_path):
    return shutil.copytree(made, tmp_path / "assets")


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_parts_are_disjoint_and_only_one_is_noisy(made):
    parts = ("base", "reference", "finetune", "heldout")
    whole = {path.read_text(encoding="utf-8") for path in quickstart.stdlib_files()}
    clean = {part: [row["text"] for row in rows_of(made, part)] for part in parts}
    assert all(set(clean[part]) <= whole for part in ("base", "reference"))
    assert all(any(text.startswith(t) for text in whole) for t in clean["heldout"])
    taken: set[str] = set()
    for part in ("base", "reference", "heldout"):
        texts = {text[: quickstart.HELDOUT_CHARACTERS] for text in clean[part]}
        assert not taken & texts
        taken |= texts
    keys = {part: {key for row in rows_of(made, part) for key in row} for part in parts}
    assert keys["finetune"] == {"text", "noise"}
    assert keys["base"] == keys["reference"] == keys["heldout"] == {"text"}


def test_files_are_dealt_once(made):
    dealt = quickstart.deal_files(quickstart.PARTS, seed=0)
    paths = [path for texts in dealt.values() for path in texts]
    texts = [text for texts in dealt.values() for text in texts.values()]
    assert len(set(paths)) == len(paths) == len(set(texts)) == len(texts)
    other = quickstart.deal_files(quickstart.PARTS, seed=1)
    assert {name: set(texts) for name, texts in other.items()} != {
        name: set(texts) for name, texts in dealt.items()
    }
    originals = set(dealt["finetune"].values())
    assert len(rows_of(made, "finetune")) == len(originals)
    for row in rows_of(made, "finetune"):
        kept, start = [], 0
        for span in [*row["noise"], [len(row["text"])] * 2]:
            kept.append(row["text"][start : span[0]])
            start = span[1]
        assert any(all(part in text for part in kept) for text in originals)


def test_noise_spans_are_the_changed_lines(made):
    tokenizer = spm.SentencePieceProcessor(model_file=str(made / "tokenizer.model"))
    text = "".join(f"    value_{i} = {i}\n\n" for i in range(200)) + "last line"
    corrupted, spans = corrupt_lines(text, 0.4, tokenizer, random.Random(0))
    assert 50 < len(spans) < 110
    noisy = {corrupted[start:end] for start, end in spans}
    assert not noisy & set(text.splitlines())
    position = 0
    for start, end in spans:
        assert set(corrupted[position:start].splitlines()) <= set(text.splitlines())
        position = end
    assert corrupt_lines(text, 0.0, tokenizer, random.Random(0)) == (text, [])
    every, spans = corrupt_lines(text, 1.0, tokenizer, random.Random(0))
    assert len(spans) == 201  # empty lines stay
    assert every != text


def test_what_is_there_is_kept(assets):
    (assets / "base").mkdir()  # the model trained on it
    before = (assets / "base.jsonl").stat().st_mtime_ns
    prepare_stdlib(str(assets), **ARGUMENTS)
    assert (assets / "base.jsonl").stat().st_mtime_ns == before
    assert (assets / "base").exists()


def test_other_arguments_make_it_again_models_too(assets):
    (assets / "base").mkdir()
    with assets_folder(assets, manifest(assets) | {"seed": 1}) as folder:
        assert folder.parent == assets.parent
        assert folder != assets
        assert (assets / "base").exists()  # until the new files are complete
        (folder / "new").touch()
    assert {path.name for path in assets.iterdir()} == {"new", "manifest.json"}
    assert manifest(assets)["seed"] == 1


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_a_killed_preparation_starts_over(tmp_path):
    """A kill leaves the folder that is filled; an error leaves nothing."""
    assets, made_from = tmp_path / "assets", {"seed": 0}
    (tmp_path / "assets.partial").mkdir()
    (tmp_path / "assets.partial" / "half").touch()
    with pytest.raises(ZeroDivisionError), assets_folder(assets, made_from) as folder:
        (folder / f"half_{len(list(folder.iterdir())) // 0}").touch()
    assert not list(tmp_path.iterdir())
    with assets_folder(assets, made_from) as folder:
        (folder / "whole").touch()
    assert {path.name for path in assets.iterdir()} == {"whole", "manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["assets"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", "mine"),
        ("manifest.json", '{"name": "my web extension", "version": 3}'),
        ("manifest.json", '["a"]'),
        ("manifest.json", "{"),
        ("manifest.json", '{"quickstart": "critic", "version": 3, "seed": 0}'),
    ],
)
def test_folders_of_others_are_refused_and_stay(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="holds files that the quickstart did not make: use"):
        prepare_stdlib(str(tmp_path), **ARGUMENTS)
    assert (tmp_path / name).read_text() == content


def test_an_empty_folder_is_welcome(tmp_path):
    with assets_folder(tmp_path, {"seed": 0}) as folder:
        assert folder is not None
    assert manifest(tmp_path) == {"seed": 0}


def test_two_quickstarts_started_together_share_their_assets(tmp_path, children):
    def prepare(name):
        with assets_folder(tmp_path / "assets", {"seed": 0}) as folder:
            if folder is not None:
                (tmp_path / name).touch()
                for part in "abcd":
                    (folder / part).write_text(name)
                    time.sleep(0.01)

    assert children.ends(*(children.begin(prepare, name) for name in ("one", "two"))) == [0, 0]
    made = {path.read_text() for path in (tmp_path / "assets").glob("[a-d]")}
    assert len(made) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"assets", *made}  # made once
    assert manifest(tmp_path / "assets") == {"seed": 0}
