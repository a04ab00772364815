import ctypes
import dataclasses
import fcntl
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import time

import pytest

from wmtp_modules.evaluation import evidence
from wmtp_modules.evaluation.code_contests import code_contests_task
from wmtp_modules.evaluation.evidence import (
    EvidenceStore,
    read_samples,
    result_key,
    sample_key,
)
from wmtp_modules.evaluation.humaneval import HumanEvalTask
from wmtp_modules.evaluation.mbpp import MBPPTask

FORK = multiprocessing.get_context("fork")  # the children only write files


def row(key, **more):
    return {"key": str(key), "task_id": 1, "text": "ä\n\ud800\0", **more}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new/results.jsonl"


def keys(path):
    """Of every line, which all must be whole."""
    content = path.read_bytes()
    assert content == b"" or content.endswith(b"\n")
    return [json.loads(line)["key"] for line in content.splitlines()]


def in_child(function, *args):
    """What a forked process returns, as its limits or mounts are its own."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: sender.send(function(*args)))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return receiver.recv()


# ----------------------------------------------------------------- store


def test_rows_are_found_again(path):
    store = EvidenceStore(path)
    assert ("a" in store, len(store), store.dropped_bytes) == (False, 0, 0)
    store.append([row("a"), row("b", n=1)])
    store.append([])
    store.append([row("c")])
    for seen in (store, EvidenceStore(path)):
        assert len(seen) == 3
        assert "c" in seen
        assert seen["b"] == row("b", n=1)
        assert seen["a"] == row("a")
    assert keys(path) == ["a", "b", "c"]
    with pytest.raises(KeyError):
        store["d"]


def test_the_last_row_of_a_key_counts(path):
    store = EvidenceStore(path)
    store.append([row("a", verdict="infrastructure"), row("b")])
    store.append([row("a", verdict="pass")])
    assert store["a"]["verdict"] == EvidenceStore(path)["a"]["verdict"] == "pass"
    assert len(EvidenceStore(path)) == 2


def test_a_line_that_was_cut_anywhere_is_dropped(path):
    store = EvidenceStore(path)
    store.append([row("a")])
    whole = path.read_bytes()
    store.append([row("b", text="x" * 200_000)])  # more than is read at once from the end
    both = path.read_bytes()
    for end in (*range(len(whole), len(whole) + 60), len(both) - 70_000, len(both) - 1):
        path.write_bytes(both[:end])
        store = EvidenceStore(path)
        assert store.dropped_bytes == end - len(whole)
        assert path.read_bytes() == whole
        assert ("a" in store, "b" in store) == (True, False)
    path.write_bytes(b"\0" * 10)  # what a power cut leaves
    assert EvidenceStore(path).dropped_bytes == 10


def test_another_process_killed_meanwhile_damages_nothing(path):
    store = EvidenceStore(path)
    store.append([row("a")])
    with path.open("ab") as file:
        file.write(b'{"key": "b", "te')
    store.append([row("c", n=2)])
    assert keys(path) == ["a", "c"]
    assert store["c"] == EvidenceStore(path)["c"] == row("c", n=2)


@pytest.mark.parametrize(
    "damaged", [b'{"key": "x', b"", b"[1]", b'"key"', b'{"task_id": 1}', b'{"key": 1}', b"\xff"]
)
def test_a_damaged_line_in_the_middle_is_named(path, damaged):
    EvidenceStore(path).append([row("a")])
    with path.open("ab") as file:
        file.write(damaged + b"\n")
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(path))}:2: this line is damaged .*delete"
    ):
        EvidenceStore(path)
    assert path.read_bytes() == before


def _append_many(path, name, batches):
    store = EvidenceStore(path)
    for batch in range(batches):
        store.append([row(f"{name}-{batch}-{i}", text="x" * 3000) for i in range(3)])
        assert store[f"{name}-{batch}-1"]["key"] == f"{name}-{batch}-1"  # where it was put


def test_processes_that_append_at_once_do_not_mix_lines(path):
    writers = [FORK.Process(target=_append_many, args=(path, name, 20)) for name in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert sorted(keys(path)) == sorted(
        f"{name}-{batch}-{i}" for name in range(4) for batch in range(20) for i in range(3)
    )


def _append_one(store, told):
    told.send("now")
    store.append([row("b")])


def test_a_writer_waits_for_the_one_that_writes(path):
    store = EvidenceStore(path)
    store.append([row("a")])
    receiver, sender = FORK.Pipe(duplex=False)
    with path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = FORK.Process(target=_append_one, args=(store, sender))
        writer.start()
        receiver.recv()
        writer.join(0.3)
        assert keys(path) == ["a"]
        fcntl.flock(file, fcntl.LOCK_UN)
    writer.join(60)
    assert keys(path) == ["a", "b"]


def _append_until_killed(path, run, told):
    store = EvidenceStore(path)
    for batch in range(10_000):
        store.append([row(f"{run}-{batch}", text="x" * 2_000_000)])
        told.send(batch)


def test_kill_9_of_a_writer_loses_no_row_that_it_had_finished(path):
    chance = random.Random(0)
    done = []
    for run in range(8):
        receiver, sender = FORK.Pipe(duplex=False)
        writer = FORK.Process(target=_append_until_killed, args=(path, run, sender))
        writer.start()
        sender.close()
        receiver.recv()
        time.sleep(0.03 * chance.random())  # lands at another place of a write each time
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        last = 0
        while receiver.poll():
            try:
                last = receiver.recv()
            except EOFError:
                break
        done += [f"{run}-{batch}" for batch in range(last + 1)]
        found = EvidenceStore(path)
        # At most the row in flight is beyond what was told.
        assert set(done) <= set(keys(path))
        assert len(found) <= len(done) + run + 1
    EvidenceStore(path).append([row("end")])
    assert keys(path)[-1] == "end"


def _append_to_full(path, room):
    """Append until a file may not grow; what it said, and what was there before and after."""
    store = EvidenceStore(path)
    store.append([row("a")])
    before = path.read_bytes()
    room()
    try:
        store.append([row("b"), row("c", text="x" * 300_000)])
    except OSError as error:
        told = f"{error.strerror}"
    else:
        told = "nothing"
    return told, path.read_bytes() == before, ["b" in store, "c" in store]


def _limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_write_that_stops_halfway_leaves_what_was_there(path):
    told, same, there = in_child(_append_to_full, path, _limit_file_size)
    assert re.search(
        r"results.jsonl: 2 rows could not be written \(File too large\); earlier rows are kept",
        told,
    )
    assert (same, there) == (True, [False, False])
    store = EvidenceStore(path)
    assert store.dropped_bytes == 0
    store.append([row("b")])
    assert keys(path) == ["a", "b"]


def _on_a_full_disk(folder):
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newns, ms_rec_private = 0x00020000, 0x4000 | (1 << 18)
    if libc.unshare(clone_newns) or libc.mount(b"none", b"/", None, ms_rec_private, None):
        return os.strerror(ctypes.get_errno())
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=131072"):
        return os.strerror(ctypes.get_errno())
    return _append_to_full(folder / "results.jsonl", lambda: None)


def test_a_full_disk(tmp_path):
    answer = in_child(_on_a_full_disk, tmp_path)
    if isinstance(answer, str):
        pytest.skip(f"this user may not mount a small disk: {answer}")
    told, same, there = answer
    assert re.search(r"2 rows could not be written \(No space left on device\); .*make room", told)
    assert (same, there) == (True, [False, False])


# ------------------------------------------------------------------ keys


def humaneval(task_id="HumanEval/1", head="def f():\n", test="assert f()", entry="f"):
    return HumanEvalTask(task_id, "    return 1\n", head, test, entry)


def mbpp(number, **changes):
    fields = dict(text="Do.", tests=("assert f()",), imports=(), setup="", shots="")
    return MBPPTask(number, "def f(): return 1", **(fields | changes))


def contest(**changes):
    nothing = {"input": [], "output": []}
    record = {
        "name": "a",
        "description": "Add.",
        "public_tests": {"input": ["1"], "output": ["1"]},
        "private_tests": nothing,
        "generated_tests": nothing,
        "solutions": {"language": [3], "solution": ["print(1)"]},
    }
    return code_contests_task(record | changes)


def test_a_sample_is_another_if_anything_that_shaped_it_is():
    settings = {"checkpoint": "abc", "top_p": 0.95}
    made = [
        sample_key(settings, humaneval(), 0.8, 7),
        sample_key(settings | {"checkpoint": "abd"}, humaneval(), 0.8, 7),
        sample_key(settings | {"top_p": 0.9}, humaneval(), 0.8, 7),
        sample_key(settings, humaneval(head="def f(x):\n"), 0.8, 7),
        sample_key(settings, humaneval("HumanEval/2"), 0.8, 7),
        sample_key(settings, humaneval(), 0.1, 7),
        sample_key(settings, humaneval(), 0.8, 8),
        sample_key(settings, mbpp(11), 0.8, 7),
        sample_key(settings, mbpp(11, shots="def g(): pass"), 0.8, 7),
    ]
    assert len(set(made)) == len(made)
    assert made[0] == sample_key(dict(reversed(settings.items())), humaneval(), 0.8, 7)
    assert sample_key({}, humaneval(), 1, 7) == sample_key({}, humaneval(), 1.0, 7)


def test_a_result_is_another_if_anything_that_shaped_it_is(monkeypatch):
    sample = {"sample": 0, "temperature": 0.8, "completion": "    return 1\n"}
    changes = [("sample", 1), ("temperature", 0.1), ("temperature", None), ("completion", "")]
    rows = [sample, *(sample | {field: value} for field, value in changes)]
    tasks = [
        humaneval(),
        humaneval("HumanEval/2"),
        humaneval(head="def f(x):\n"),
        humaneval(test="assert True"),
        humaneval(entry="g"),
        mbpp(11),
        mbpp(11, setup="f()"),
        mbpp(11, imports=("import math",)),
        contest(),
        contest(public_tests={"input": ["1"], "output": ["2"]}),
        contest(time_limit={"seconds": 1, "nanos": 0}),
        contest(memory_limit_bytes=2**20),
        contest(input_file="in.txt"),
        contest(output_file="in.txt"),
        dataclasses.replace(contest(), comparison="strict"),
    ]
    made = [result_key(tasks[0], row, "landlock") for row in rows]
    made += [result_key(task, sample, "landlock") for task in tasks[1:]]
    made.append(result_key(tasks[0], sample, "bubblewrap"))
    assert len(set(made)) == len(made)
    monkeypatch.setattr(evidence, "RULES", evidence.RULES + 1)  # a verdict of before is made anew
    assert result_key(tasks[0], sample, "landlock") not in made
    monkeypatch.undo()
    # The prompt's shots are none of a result's business, nor is how a reference looks.
    assert result_key(mbpp(11, shots="x"), sample, "landlock") == made[len(rows) + 4]
    assert result_key(humaneval(), {**sample, "key": "k", "tokens": 3}, "landlock") == made[0]


def test_half_a_surrogate_pair_has_a_key_and_a_row(path):
    sample = {"sample": 0, "temperature": None, "completion": "x = '\ud800\0'"}
    key = result_key(humaneval(), sample, "landlock")
    EvidenceStore(path).append([sample | {"key": key}])
    assert EvidenceStore(path)[key]["completion"] == sample["completion"]


# --------------------------------------------------------------- samples


@pytest.fixture
def write(tmp_path):
    def make(*rows):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / "samples.jsonl").write_bytes(b"\n".join(lines))
        return tmp_path / "samples.jsonl"

    return make


def test_samples_are_counted_for_each_task(write):
    path = write(
        {"task_id": 11, "completion": "a"},
        {"task_id": 12, "completion": "", "other": 1},
        b"",
        {"task_id": 11, "completion": "\ud800\0"},
    )
    assert read_samples(path, [mbpp(11), mbpp(12), mbpp(13)]) == [
        {"task_id": 11, "sample": 0, "temperature": None, "completion": "a"},
        {"task_id": 12, "sample": 0, "temperature": None, "completion": ""},
        {"task_id": 11, "sample": 1, "temperature": None, "completion": "\ud800\0"},
    ]


def test_generated_samples_keep_their_numbers(write):
    """Ranks write in any order, and results are joined to samples by these numbers."""
    rows = [
        {"task_id": 11, "temperature": temperature, "sample": sample, "completion": str(sample)}
        for temperature, sample in [(0.8, 1), (0.2, 1), (0.8, 0), (0.2, 0)]
    ]
    keyed = [row | {"key": str(i), "checkpoint": "a"} for i, row in enumerate(rows)]
    assert read_samples(write(*keyed, keyed[0]), [mbpp(11)]) == rows


GOOD = {"task_id": 601, "completion": "x"}


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (
            {"task_id": "601", "completion": ""},
            "no task '601' in the source: write the number, 601",
        ),
        ({"task_id": "MBPP/601", "completion": ""}, "no task 'MBPP/601' .*: write the number, 601"),
        ({"task_id": 601.0, "completion": ""}, "no task 601.0 in the source"),
        ({"task_id": True, "completion": ""}, "no task True in the source"),
        ({"task_id": [601], "completion": ""}, r"no task \[601\] in the source"),
        ({"task_id": 6011, "completion": ""}, r"no task 6011 .*\(did you mean 601\?\)"),
        (
            {"task_id": 5, "completion": ""},
            "no task 5 in the source, which has 2 tasks such as '60",
        ),
        ({"task_id": "9" * 5000, "completion": ""}, "no task "),
        ({"completion": ""}, "task_id is missing, the row has completion"),
        ({"task_id": 601, "completion": "", "temperature": "0.8"}, "temperature is '0.8', not a"),
        ({"task_id": 601, "completion": "", "sample": "0"}, "sample is '0', not an integer"),
        (
            {"task_id": 601, "completion": "", "sample": 0},
            "the file mixes samples of several checkpoints",
        ),
        (
            {"task_id": 601, "completion": "", "checkpoint": "b"},
            "the file mixes samples of several checkpoints",
        ),
        ({"task_id": 601}, "completion is missing, the row has task_id"),
        ({"task_id": 601, "completion": None}, "completion is missing"),
        ({"task_id": 601, "completion": ["x"]}, "completion is list, not a string"),
        ({}, "task_id is missing, the row has no field"),
        ([1], "not an object"),
        (b'{"task_id": 601, "comple', "not JSON, or truncated"),
        (b'{"task_id": 601, "completion": "\xff"}', "not JSON, or truncated"),
    ],
)
def test_bad_samples(write, bad, why):
    with pytest.raises(ValueError, match=rf"samples.jsonl:2: {why}"):
        read_samples(write(GOOD, bad), [mbpp(601), mbpp(602)])


def test_a_near_task_is_named(write):
    path = write({"task_id": "humaneval/1", "completion": ""})
    with pytest.raises(
        ValueError, match=r"no task 'humaneval/1' .* \(did you mean 'HumanEval/1'\?\)"
    ):
        read_samples(path, [humaneval("HumanEval/1"), humaneval("HumanEval/20")])


def test_no_samples(write, tmp_path):
    with pytest.raises(ValueError, match=r"samples.jsonl is empty: give rows"):
        read_samples(write(b"\n"), [mbpp(601)])
    for missing in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ValueError, match=r"is not a file: give a .jsonl file, or 'reference'"):
            read_samples(missing, [mbpp(601)])
