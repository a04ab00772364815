"""A table survives kills, restarts with other world sizes and damage, and refuses strangers."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets

from wmtp_modules.data.packing import row_lengths
from wmtp_modules.files import file_hash
from wmtp_modules.scoring import score_table
from wmtp_modules.scoring.score_table import (
    ScoreTable,
    compute_scores,
    fingerprint_checkpoint,
    fingerprint_rows,
    fingerprint_tokenizer,
)

FINGERPRINT = {
    "checkpoint": "c0",
    "tokenizer": "t0",
    "dataset": "d0",
    "max_seq_len": 64,
    "kind": "ntp",
    "n_heads": 1,
}
N_ROWS, PART_ROWS = 23, 4


def make_rows(n=N_ROWS, seed=0):
    random = np.random.default_rng(seed)
    tokens = [random.integers(0, 500, random.integers(1, 40)).tolist() for _ in range(n)]
    features = Features({"tokens": Sequence(Value("int32"))})
    return Dataset.from_dict({"tokens": tokens}, features=features)


def score(batch):
    """Depends on every token of the row and on nothing else in the batch."""
    return [(np.cumsum(row) * 0.5 + len(row)).astype(np.float32) for row in batch]


def build(folder, rows, score_batch=score, *, fingerprint=FINGERPRINT, world=1, order=None):
    for rank in order or reversed(range(world)):  # rank 0 last: it sees all parts
        compute_scores(
            folder,
            fingerprint,
            rows,
            score_batch,
            batch_tokens=100,
            part_rows=PART_ROWS,
            rank=rank,
            world=world,
        )


def assert_complete(folder, rows):
    table = ScoreTable.open(folder, FINGERPRINT, rows)
    assert len(table) == len(rows)
    for i, tokens in enumerate(rows["tokens"]):
        (expected,) = score([np.array(tokens)])
        assert table[i].dtype == np.float32
        assert np.array_equal(table[i], expected)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.arrow")}


def test_each_row_gets_its_own_scores(tmp_path):
    rows = make_rows()
    build(tmp_path, rows)
    assert_complete(tmp_path, rows)
    assert not list(tmp_path.glob("*.tmp*"))


def test_several_floats_per_token(tmp_path):
    rows = make_rows()
    fingerprint = {**FINGERPRINT, "kind": "mtp", "n_heads": 3}

    def score_heads(batch):
        return [np.stack([s, s + 1, -s], axis=1) for s in score(batch)]

    build(tmp_path, rows, score_heads, fingerprint=fingerprint)
    table = ScoreTable.open(tmp_path, fingerprint, rows)
    for i, tokens in enumerate(rows["tokens"]):
        assert np.array_equal(table[i], score_heads([np.array(tokens)])[0])


def test_batches_stay_within_their_size_and_cover_all(tmp_path):
    seen = []

    def recording(batch):
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= 100
        seen.extend(tuple(row) for row in batch)
        return score(batch)

    rows = make_rows()
    build(tmp_path, rows, recording)
    assert sorted(seen) == sorted(tuple(tokens) for tokens in rows["tokens"])


def test_rows_behind_a_selection_are_scored_in_their_order(tmp_path):
    rows = make_rows(40).shuffle(seed=3).select(range(5, 30))
    build(tmp_path, rows)
    assert_complete(tmp_path, rows)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_world_size_does_not_show(tmp_path, world):
    rows = make_rows()
    build(tmp_path / "one", rows)
    build(tmp_path / "many", rows, world=world)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert_complete(tmp_path / "many", rows)


def test_resuming_keeps_finished_parts_and_gives_the_same_table(tmp_path):
    rows = make_rows()
    build(tmp_path / "whole", rows)
    scored = 0

    def failing(batch):
        nonlocal scored
        scored += len(batch)
        if scored > 2 * PART_ROWS + 1:
            raise KeyboardInterrupt
        return score(batch)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", rows, failing)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cut").glob("*.arrow")}
    assert len(before) == 2
    with pytest.raises(ValueError, match="holds no complete score table"):
        ScoreTable.open(tmp_path / "cut", FINGERPRINT, rows)

    counted = []

    def counting(batch):
        counted.extend(batch)
        return score(batch)

    build(tmp_path / "cut", rows, counting, world=2)
    assert len(counted) == N_ROWS - 2 * PART_ROWS
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == t for name, t in before.items())
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert_complete(tmp_path / "cut", rows)

    build(tmp_path / "cut", rows, counting)  # a complete table is left alone
    assert len(counted) == N_ROWS - 2 * PART_ROWS


def test_a_table_keeps_the_part_size_it_was_begun_with(tmp_path):
    rows = make_rows()
    build(tmp_path, rows, world=2, order=[1])
    compute_scores(tmp_path, FINGERPRINT, rows, score, batch_tokens=100, part_rows=999)
    assert_complete(tmp_path, rows)


def test_a_part_appears_only_when_it_is_complete(tmp_path, monkeypatch):
    def killed(source, target):
        if str(target).endswith(".arrow"):
            raise KeyboardInterrupt
        real_replace(source, target)

    real_replace = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, make_rows())
    assert not contents(tmp_path)


@pytest.mark.slow
def test_a_killed_process_loses_only_its_unfinished_part(tmp_path):
    script = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import test_score_table as t

        n = 0
        def slow(batch):
            global n
            n += len(batch)
            if n > 2 * t.PART_ROWS:
                print("inside part 2", flush=True)
                time.sleep(60)
            return t.score(batch)

        t.build(Path({str(tmp_path / "table")!r}), t.make_rows(), slow)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert "inside part 2" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = make_rows()
    assert len(contents(tmp_path / "table")) == 2
    build(tmp_path / "table", rows)
    assert_complete(tmp_path / "table", rows)


@pytest.mark.parametrize("damage", ["half", "almost_all", "empty", "swapped"])
def test_a_damaged_part_is_named_and_scored_again(tmp_path, damage, caplog):
    rows = make_rows()
    build(tmp_path, rows)
    path = tmp_path / "part-000002.arrow"
    sound = contents(tmp_path)
    if damage == "swapped":
        path.write_bytes(sound["part-000003.arrow"])
    else:
        size = {"half": len(sound[path.name]) // 2, "almost_all": -20, "empty": 0}[damage]
        path.write_bytes(sound[path.name][:size])
    with pytest.raises(
        ValueError, match=r"part-000002.arrow .* score again, intact parts are kept"
    ):
        ScoreTable.open(tmp_path, FINGERPRINT, rows)
    scored = []
    build(tmp_path, rows, lambda batch: scored.extend(batch) or score(batch))
    assert "part-000002.arrow" in caplog.text
    assert len(scored) == PART_ROWS
    assert contents(tmp_path) == sound
    assert_complete(tmp_path, rows)


def test_a_missing_part_is_named(tmp_path):
    rows = make_rows()
    build(tmp_path, rows)
    (tmp_path / "part-000001.arrow").unlink()
    with pytest.raises(ValueError, match=r"part-000001.arrow is missing"):
        ScoreTable.open(tmp_path, FINGERPRINT, rows)


@pytest.mark.parametrize("key", list(FINGERPRINT))
def test_a_stranger_is_refused_with_both_values(tmp_path, key):
    rows = make_rows()
    build(tmp_path, rows)
    other = {**FINGERPRINT, key: 7}
    message = rf"{key}: the table has {FINGERPRINT[key]!r}, this run 7\): delete that folder"
    with pytest.raises(ValueError, match=message):
        ScoreTable.open(tmp_path, other, rows)
    with pytest.raises(ValueError, match=message):  # a resumed run must not mix
        build(tmp_path, rows, fingerprint=other)


def test_a_resumed_run_is_refused_before_the_table_is_complete(tmp_path):
    rows = make_rows()
    build(tmp_path, rows, world=2, order=[1])
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="checkpoint: the table has 'c0', this run 'c1'"):
        build(tmp_path, rows, fingerprint={**FINGERPRINT, "checkpoint": "c1"})
    assert contents(tmp_path) == before


def test_other_rows_are_refused(tmp_path):
    rows = make_rows()
    build(tmp_path, rows)
    with pytest.raises(ValueError, match="rows: the table has 23, this run 22"):
        ScoreTable.open(tmp_path, FINGERPRINT, rows.select(range(22)))
    with pytest.raises(ValueError, match="has 4 rows"):  # as many rows, other lengths
        ScoreTable.open(tmp_path, FINGERPRINT, make_rows(seed=1))
    with pytest.raises(ValueError, match="no rows to score"):
        build(tmp_path / "empty", rows.select([]))


PER_ROW = {**FINGERPRINT, "kind": "rewards", "per": "row"}


def build_per_row(folder, rows, score_batch, *, world=1):
    for rank in reversed(range(world)):
        compute_scores(
            folder,
            PER_ROW,
            rows,
            score_batch,
            inputs=lambda part: list(zip(part["prompt"], part["response"], strict=True)),
            batch_tokens=100,
            part_rows=PART_ROWS,
            rank=rank,
            world=world,
        )


def make_pair_rows():
    rows = make_rows()
    rows = rows.add_column("prompt", [f"p{i}" for i in range(N_ROWS)])
    return rows.add_column("response", [f"r{3 * i}" for i in range(N_ROWS)])


def score_pairs(batch):
    return [np.array([int(prompt[1:]) + int(response[1:]) / 64]) for prompt, response in batch]


@pytest.mark.parametrize("world", [1, 3])
def test_one_float_per_row_from_other_columns(tmp_path, world):
    rows = make_pair_rows()
    sizes = {f"p{i}": len(tokens) for i, tokens in enumerate(rows["tokens"])}

    def checking(batch):  # batches go by the length in tokens all the same
        assert len(batch) * max(sizes[prompt] for prompt, _ in batch) <= 100
        return score_pairs(batch)

    build_per_row(tmp_path, rows, checking, world=world)
    table = ScoreTable.open(tmp_path, PER_ROW, rows)
    scores = table.per_row()
    assert scores.dtype == np.float32
    assert scores.tolist() == [i + 3 * i / 64 for i in range(N_ROWS)]
    assert len(table) == N_ROWS
    assert all(np.array_equal(table[i], scores[i : i + 1]) for i in range(N_ROWS))


def test_a_per_row_table_goes_on_after_a_kill(tmp_path):
    rows, seen = make_pair_rows(), []

    def killed(batch):
        seen.extend(batch)
        if len(seen) > PART_ROWS:
            raise KeyboardInterrupt
        return score_pairs(batch)

    with pytest.raises(KeyboardInterrupt):
        build_per_row(tmp_path / "cut", rows, killed)
    assert len(contents(tmp_path / "cut")) == 1
    rest = []
    build_per_row(tmp_path / "cut", rows, lambda batch: rest.extend(batch) or score_pairs(batch))
    assert sorted(prompt for prompt, _ in rest) == sorted(f"p{i}" for i in range(PART_ROWS, N_ROWS))
    build_per_row(tmp_path / "whole", rows, score_pairs)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_scores_per_row_and_per_token_are_not_mixed_up(tmp_path):
    rows = make_pair_rows()
    build_per_row(tmp_path / "row", rows, score_pairs)
    build(tmp_path / "token", rows)
    with pytest.raises(ValueError, match="this table has scores per token, not one per row"):
        ScoreTable.open(tmp_path / "token", FINGERPRINT, rows).per_row()
    per_token = {**PER_ROW}
    del per_token["per"]
    with pytest.raises(ValueError, match="per: the table has 'row', this run None"):
        ScoreTable.open(tmp_path / "row", per_token, rows)


def test_a_per_row_table_of_other_rows_names_the_data_set(tmp_path):
    rows = make_pair_rows()
    build_per_row(tmp_path, rows, score_pairs)
    with pytest.raises(ValueError, match=r"\(dataset: the table has 'd0', this run 'd1'\)"):
        ScoreTable.open(tmp_path, {**PER_ROW, "dataset": "d1"}, rows)
    with pytest.raises(ValueError, match="rows: the table has 23, this run 22"):
        ScoreTable.open(tmp_path, PER_ROW, rows.select(range(22)))


def test_the_progress_bar_says_what_is_scored(tmp_path, capsys):
    rows = make_rows()
    compute_scores(tmp_path, FINGERPRINT, rows, score, batch_tokens=100, desc="values (train)")
    assert f"values (train): {len(rows)}/{len(rows)} row [" in capsys.readouterr().err


def test_row_fingerprint_sees_values_and_order_but_not_chunks():
    rows = make_rows(30)
    fingerprint = fingerprint_rows(rows)
    parts = [rows.select(range(7)), rows.select(range(7, 30))]
    assert fingerprint_rows(concatenate_datasets(parts)) == fingerprint
    assert fingerprint_rows(rows.add_column("keep", [[True]] * 30)) == fingerprint
    assert fingerprint_rows(rows.shuffle(seed=0)) != fingerprint
    assert fingerprint_rows(rows.shuffle(seed=0).flatten_indices()) == fingerprint_rows(
        rows.shuffle(seed=0)
    )
    tokens = rows["tokens"][:]
    joined = [[*tokens[0], *tokens[1]], [], *tokens[2:]]  # same tokens, other borders
    assert fingerprint_rows(Dataset.from_dict({"tokens": joined})) != fingerprint
    tokens[3][0] += 1
    assert fingerprint_rows(Dataset.from_dict({"tokens": tokens})) != fingerprint
    assert row_lengths(rows).tolist() == [len(row) for row in rows["tokens"]]


def test_checkpoint_and_tokenizer_fingerprints(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "consolidated.pth").write_bytes(b"weights" * 1000)
        (tmp_path / folder / "params.json").write_text('{"dim": 4096}')
        (tmp_path / folder / "tokenizer.model").write_bytes(b"pieces")
    a, b = tmp_path / "a", tmp_path / "b"
    (b / "README.md").write_text("not part of the model")
    assert fingerprint_checkpoint(a) == fingerprint_checkpoint(b)
    assert fingerprint_tokenizer(a / "tokenizer.model") == fingerprint_tokenizer(
        b / "tokenizer.model"
    )
    (b / "params.json").write_text('{"dim": 4097}')
    assert fingerprint_checkpoint(a) != fingerprint_checkpoint(b)
    (b / "params.json").write_text('{"dim": 4096}')
    (b / "consolidated.pth").write_bytes(b"Weights" + b"weights" * 999)
    assert fingerprint_checkpoint(a) != fingerprint_checkpoint(b)
    (b / "tokenizer.model").write_bytes(b"Pieces")
    assert fingerprint_tokenizer(a / "tokenizer.model") != fingerprint_tokenizer(
        b / "tokenizer.model"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no weight file"):
        fingerprint_checkpoint(tmp_path / "empty")


# ------------------------------------------------------------------------------- damage


def open_table(folder, rows):
    return ScoreTable.open(folder, FINGERPRINT, rows)


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_one_flipped_bit_is_found_and_its_part_scored_again(tmp_path, share, caplog):
    """Most bits of a part are inside a score, where nothing but the hash can see one."""
    rows = make_rows()
    build(tmp_path, rows)
    part = tmp_path / "part-000002.arrow"
    flip(part, int(share * part.stat().st_size))
    with pytest.raises(
        ValueError, match=r"part-000002\.arrow is damaged.*score again, intact parts"
    ):
        ScoreTable.open(tmp_path, FINGERPRINT, rows)
    scored = []
    build(tmp_path, rows, lambda batch: (scored.extend(batch), score(batch))[1])
    assert len(scored) == PART_ROWS
    assert "part-000002.arrow is damaged" in caplog.text
    assert_complete(tmp_path, rows)


def test_a_part_of_another_table_is_not_taken(tmp_path):
    """Of equal rows, so that only the hash tells them apart."""
    rows = make_rows()
    build(tmp_path / "a", rows)
    build(tmp_path / "b", rows, lambda batch: [-s for s in score(batch)])
    for name in ("part-000001.arrow", "part-000001.json"):
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(ValueError, match=r"part-000001\.arrow is damaged"):
        ScoreTable.open(tmp_path / "a", FINGERPRINT, rows)


def test_a_killed_run_does_not_keep_a_damaged_part(tmp_path):
    rows = make_rows()
    build(tmp_path, rows)
    (tmp_path / "manifest.json").unlink()
    flip(tmp_path / "part-000000.arrow", 300)
    (tmp_path / "part-000001.json").unlink()  # killed between the part and its record
    (tmp_path / "part-000002.json").write_text("{")
    scored = []
    build(tmp_path, rows, lambda batch: (scored.extend(batch), score(batch))[1])
    assert len(scored) == 3 * PART_ROWS
    assert_complete(tmp_path, rows)


def test_a_manifest_that_is_older_than_its_parts_is_written_again(tmp_path):
    rows = make_rows()
    build(tmp_path, rows)
    record = json.loads((tmp_path / "manifest.json").read_text())
    del record["parts"]  # as an earlier version wrote it
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"manifest\.json lacks the hashes of its 6 parts"):
        ScoreTable.open(tmp_path, FINGERPRINT, rows)
    build(tmp_path, rows, None)
    assert_complete(tmp_path, rows)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("part_rows", 0), ("part_rows", -4), ("part_rows", 10**30), ("part_rows", True),
        ("part_rows", None), ("rows", "23"), ("fingerprint", []), ("fingerprint", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["fingerprint.json", "manifest.json"])
def test_a_damaged_record_is_one_error(tmp_path, name, key, value):
    rows = make_rows()
    build(tmp_path, rows)
    record = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(record | {key: value}))
    read = build if name == "fingerprint.json" else open_table
    with pytest.raises(ValueError, match=rf"{name} is damaged, so the scores next to it"):
        read(tmp_path, rows)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null"])
def test_a_record_that_is_none(tmp_path, content):
    rows = make_rows()
    build(tmp_path, rows)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        ScoreTable.open(tmp_path, FINGERPRINT, rows)


def test_a_scorer_that_refuses_names_its_rows(tmp_path):
    def refuse(batch):
        raise ValueError("a loss is not finite")

    with pytest.raises(ValueError, match=r"not finite \(one of these rows of the data: \d+"):
        build(tmp_path, make_rows(), refuse)
    assert not list(tmp_path.glob("part-*"))


def test_a_full_disk_keeps_the_parts_before(tmp_path, monkeypatch):
    rows, calls = make_rows(), []
    from wmtp_modules.scoring import score_table

    class Full(score_table.ArrowWriter):
        def finalize(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise OSError(28, "No space left on device")
            return super().finalize(*args, **kwargs)

    monkeypatch.setattr(score_table, "ArrowWriter", Full)
    with pytest.raises(OSError, match=r"part-000002\.arrow could not be written \(No space left"):
        build(tmp_path, rows)
    assert sorted(path.name for path in tmp_path.glob("*.arrow")) == [
        "part-000000.arrow",
        "part-000001.arrow",
    ]
    assert not list(tmp_path.glob("*.tmp"))
    build(tmp_path, rows)
    assert_complete(tmp_path, rows)


def test_a_checkpoint_is_read_once_in_a_process_unless_it_changes(tmp_path, monkeypatch):
    """Every run of a config asks for it, and a 7B model with its reward model has 40 GB."""
    weights, read = tmp_path / "model.safetensors", []
    monkeypatch.setattr(score_table, "file_hash", lambda path: read.append(path) or file_hash(path))
    weights.write_bytes(b"one")
    first = fingerprint_checkpoint(tmp_path)
    assert fingerprint_checkpoint(tmp_path) == first
    assert read == [weights]
    weights.write_bytes(b"two, longer")
    assert fingerprint_checkpoint(tmp_path) != first
    os.utime(weights, ns=(1, 1))  # the same content at another time is read, and found the same
    assert fingerprint_checkpoint(tmp_path) != first
    assert read == [weights] * 3


# ------------------------------------------------------------------------------ two runs


def test_two_runs_make_one_table_once(tmp_path, children, capfd):
    """The second waits for the first, keeps its watchdog quiet, and uses what there is then."""
    rows, scored = make_rows(), tmp_path / "scored"

    def slowly(batch):
        with scored.open("a") as file:
            file.write("x" * len(batch))
        time.sleep(0.05)
        return score(batch)

    def run(name):
        beats = []
        options = dict(batch_tokens=100, part_rows=PART_ROWS, beat=beats.append)
        compute_scores(tmp_path / "table", FINGERPRINT, rows, slowly, **options)
        (tmp_path / name).write_text(str(len(beats)))

    pids = [children.begin(run, name) for name in ("one", "two")]
    assert children.ends(*pids) == [0, 0]
    told = capfd.readouterr().err
    assert any(f"Waiting for pid {pid} on" in told for pid in pids)
    assert all(int((tmp_path / name).read_text()) > N_ROWS / PART_ROWS for name in ("one", "two"))
    assert_complete(tmp_path / "table", rows)
    assert len(scored.read_text()) == N_ROWS
