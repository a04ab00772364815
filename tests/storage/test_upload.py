"""Writing: the store follows the folder, and nothing in it looks whole that is not."""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from wmtp_modules.storage import background, store, upload
from wmtp_modules.storage.background import Background, rest_of
from wmtp_modules.storage.fetch import follower_of
from wmtp_modules.storage.mirror import mirror
from wmtp_modules.storage.places import Place, path_of
from wmtp_modules.storage.store import Object, StoreError
from wmtp_modules.storage.upload import Follower

RUN = "s3://bucket/run"


def folder_with(folder, files):
    """As ``new_folder`` makes it: all of it appears at once, in place of what was there."""
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True)
    for name, content in files.items():
        (partial / name).write_bytes(content)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def state(run, step, seed=0):
    """A training state as ``TrainingStates`` writes it, of a few bytes."""
    draw = random.Random(f"{step} {seed}")
    files = {name: draw.randbytes(200) for name in ("__0_0.distcp", ".metadata", "run.pt")}
    listed = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    files["manifest.json"] = json.dumps({"files": listed}).encode()
    folder_with(run / "training_state" / f"step_{step:06d}", files)


def best(run, version):
    files = {name: f"{version} {name}".encode() for name in ("consolidated.pth", "params.json")}
    folder_with(run / "best", files)


def drop(run, step):
    shutil.rmtree(run / "training_state" / f"step_{step:06d}")


def contents(run):
    """What belongs into the store of a folder."""
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and not any(map(upload.is_not_sent, path.relative_to(run).parts))
    }


@pytest.fixture
def in_store(s3):
    def read(prefix="run/"):
        page = s3.list_objects_v2(Bucket="bucket", Prefix=prefix)
        return {
            one["Key"].removeprefix(prefix): s3.get_object(Bucket="bucket", Key=one["Key"])[
                "Body"
            ].read()
            for one in page.get("Contents", [])
        }

    return read


def check_never_half(objects):
    """Whatever says that it is whole is whole."""
    units = {}
    for name, data in objects.items():
        unit, _, file = name.rpartition("/")
        units.setdefault(unit, {})[file] = data
    for unit, files in units.items():
        if unit.startswith("training_state/") and "manifest.json" in files:
            listed = json.loads(files["manifest.json"])["files"]
            assert listed.keys() <= files.keys(), unit
            for name, known in listed.items():
                assert hashlib.sha256(files[name]).hexdigest() == known["sha256"], (unit, name)
        if unit == "best" and ".incomplete" not in files:
            assert files.keys() == {"consolidated.pth", "params.json"}
            assert len({data.split()[0] for data in files.values()}) == 1, files


def place(cache):
    return Place(RUN, path_of(RUN, cache, "run"), "run")


@pytest.fixture
def run(tmp_path):
    folder = place(tmp_path / "cache").path
    folder.mkdir(parents=True)
    return folder


def test_the_store_follows_the_folder(s3, run, in_store):
    follower = Follower(run, RUN, "run")
    state(run, 2)
    best(run, "v1")
    (run / "metrics.jsonl").write_text("{}\n")
    (run / ".lock").write_text("not sent")
    (run / "last.partial-12-0123abcd").mkdir()
    (run / "last.partial-12-0123abcd/x").write_text("not sent")
    follower.send()
    assert in_store() == contents(run)
    assert len(in_store()) == 7
    assert follower.missing() == {}
    best(run, "v2")
    state(run, 4)
    drop(run, 2)
    (run / "metrics.jsonl").write_text("{}\n{}\n")
    (run / "controls/uniform").mkdir(parents=True)
    state(run / "controls/uniform", 2)
    (run / "controls/uniform/metrics.jsonl").write_text("{}\n")
    follower.send()
    assert in_store() == contents(run)
    assert {name.split("/")[1] for name in in_store() if name[:8] == "training"} == {"step_000004"}


def test_nothing_is_sent_twice(s3, run, monkeypatch):
    sent, put = [], store.put
    monkeypatch.setattr(store, "put", lambda p, u, b: (sent.append(u), put(p, u, b))[1])
    state(run, 2)
    Follower(run, RUN, "run").send()
    n = len(sent)
    assert n == 4
    again = Follower(run, RUN, "run")
    again.send()
    (run / "summary.json").write_text("{}")
    again.send()
    assert sent[n:] == [f"{RUN}/summary.json"]


class Killed(BaseException):
    pass


class FakeStore:
    """Objects in memory; ``kill_at`` ends the process before or after that request."""

    def __init__(self, monkeypatch) -> None:
        self.objects: dict[str, bytes] = {}
        self.n, self.kill_at = 0, None
        for name in ("put", "put_text", "delete", "objects_in"):
            monkeypatch.setattr(store, name, getattr(self, name))

    def _moment(self):
        self.n += 1
        if self.n == self.kill_at:
            raise Killed

    def _write(self, url, data):
        self._moment()
        self.objects[url.removeprefix(f"{RUN}/")] = data
        check_never_half(self.objects)
        self._moment()
        return Object(len(data), hashlib.md5(data).hexdigest())

    def put(self, path, url, beat):
        return self._write(url, path.read_bytes())

    def put_text(self, text, url):
        self._write(url, text.encode())

    def delete(self, url):
        self._moment()
        self.objects.pop(url.removeprefix(f"{RUN}/"), None)
        check_never_half(self.objects)
        self._moment()

    def objects_in(self, url):
        return {k: Object(len(v), hashlib.md5(v).hexdigest()) for k, v in self.objects.items()}


@pytest.mark.parametrize("goes_on", [False, True])
def test_killed_at_every_moment(run, tmp_path, monkeypatch, goes_on):
    """Of an upload that replaces a best model and a state; the next one finishes it.

    Or the run goes on before that, and drops the state that was on its way.
    """
    fake, moment = FakeStore(monkeypatch), 0
    finished = False
    while not finished:
        moment += 1
        shutil.rmtree(run)
        run.mkdir()
        fake.objects.clear()
        fake.kill_at = None
        best(run, "v1")
        state(run, 2)
        (run / "summary.json").write_text("{}")
        Follower(run, RUN, "run").send()
        best(run, "v2")
        state(run, 4)
        drop(run, 2)
        fake.n, fake.kill_at = 0, moment
        try:
            Follower(run, RUN, "run").send()
            finished = True
        except Killed:
            fake.kill_at = None
            states = {n.split("/")[1] for n in fake.objects if n.endswith("manifest.json")}
            assert states & {"step_000002", "step_000004"}  # there is always one
            follower = follower_of(place(tmp_path / "cache"), tmp_path / "cache")
            if goes_on:
                state(run, 6)
                drop(run, 4)
            follower.send()
        assert fake.objects == contents(run)
    assert moment > 20


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.nightly)])
def test_a_process_killed_at_random_moments(s3, run, children, in_store, kills):
    draw = random.Random(0)

    def remove_unfinished():
        """What a killed process was writing, as ``recover_folder`` does."""
        for other in run.rglob("*.partial"):
            shutil.rmtree(other)

    def send(first):
        remove_unfinished()
        follower = Follower(run, RUN, "run")
        for step in itertools.count(first):  # none that an earlier process has written
            best(run, f"v{step}")
            state(run, step)
            for other in (run / "training_state").iterdir():
                if other.name != f"step_{step:06d}":
                    shutil.rmtree(other)
            with suppress(OSError):  # a busy machine's server may not answer in time
                follower.send()

    for i in range(kills):
        pid = children.begin(send, 1000 * i)
        time.sleep(1 + draw.random())
        os.kill(pid, signal.SIGKILL)
        assert children.ends(pid) == [-signal.SIGKILL]
        check_never_half(in_store())
    shutil.rmtree(run.parent / ".run.sending", ignore_errors=True)
    remove_unfinished()
    Follower(run, RUN, "run").send()
    check_never_half(in_store())
    assert {n: d for n, d in in_store().items() if n in contents(run)} == contents(run)


def test_deleted_while_it_is_sent(s3, run, monkeypatch, names):
    """keep_last is faster than the network: what was begun still becomes whole."""
    state(run, 2)
    put = store.put

    def slow(path, url, beat):
        if (run / "training_state/step_000002").exists():
            drop(run, 2)
            state(run, 4)
        return put(path, url, beat)

    monkeypatch.setattr(store, "put", slow)
    follower = Follower(run, RUN, "run")
    follower.send()
    assert "training_state/step_000002/manifest.json" in names()
    assert not {n for n in names() if n.endswith(".incomplete")}
    follower.send()
    assert {n.split("/")[1] for n in names()} == {"step_000004"}


def test_a_table_that_grows_while_it_is_sent(s3, tmp_path, monkeypatch, names):
    table = tmp_path / "table"
    table.mkdir()
    (table / "losses.bin").write_bytes(b"x" * 100)
    put = store.put

    def growing(path, url, beat):
        found = put(path, url, beat)
        if (table / "losses.bin").stat().st_size == 100:
            with (table / "losses.bin").open("ab") as file:
                file.write(b"y" * 100)
        return found

    monkeypatch.setattr(store, "put", growing)
    follower = Follower(table, "s3://bucket/table", "folder")
    follower.send()
    assert ".incomplete" in names("table/")
    follower.send()
    assert names("table/") == {"losses.bin"}
    assert store.look("s3://bucket/table/losses.bin").size == 200


# ------------------------------------------------------------------ from an empty disk


def test_resume_on_an_empty_disk(s3, run, tmp_path, in_store):
    for step in (2, 4, 6):
        state(run, step)
    best(run, "v1")
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "config.yaml").write_text("a: 1\n")
    Follower(run, RUN, "run").send()
    before = contents(run)
    s3.delete_object(Bucket="bucket", Key="run/training_state/step_000006/manifest.json")
    other = place(tmp_path / "other")
    follower = follower_of(other, tmp_path / "other")
    kept = ("best", "metrics", "config", "training_state/step_000004")
    assert contents(other.path) == {n: d for n, d in before.items() if n.startswith(kept)}
    follower.send()
    # Until the next state is up the older ones stay.
    assert "training_state/step_000002/manifest.json" in in_store()
    state(other.path, 6, seed=1)
    follower.send()
    assert in_store() == contents(other.path)
    check_never_half(in_store())


def test_an_empty_disk_that_is_too_small(s3, run, small_disk):
    """The run does not begin, and what is in the store stays whole."""
    state(run, 2)
    (run / "training_state/step_000002/big.distcp").write_bytes(os.urandom(3_000_000))
    Follower(run, RUN, "run").send()
    disk = small_disk(1000)
    with pytest.raises(StoreError, match=rf"does not fit on the disk of {disk}"):
        follower_of(place(disk), disk)
    assert not list(disk.rglob("step_000002"))
    small_disk(9000)
    follower_of(place(disk), disk)
    (state_here,) = disk.rglob("step_000002")
    assert (state_here / "big.distcp").stat().st_size == 3_000_000


def test_what_is_newer_here_stays_and_goes_up(s3, run, tmp_path, in_store):
    state(run, 2)
    (run / "metrics.jsonl").write_text("2\n")
    Follower(run, RUN, "run").send()
    state(run, 4)
    best(run, "v1")
    (run / "metrics.jsonl").write_text("2\n4\n")
    before = contents(run)
    follower_of(place(tmp_path / "cache"), tmp_path / "cache").send()
    assert contents(run) == before == in_store()


def test_what_another_machine_has_done_meanwhile(s3, run, tmp_path, in_store):
    state(run, 2)
    best(run, "v1")
    (run / "metrics.jsonl").write_text("2\n")
    Follower(run, RUN, "run").send()
    other = place(tmp_path / "other")
    there = follower_of(other, tmp_path / "other")
    best(other.path, "v2")
    state(other.path, 4)
    (other.path / "metrics.jsonl").write_text("2\n4\n")
    there.send()
    follower_of(place(tmp_path / "cache"), tmp_path / "cache")
    assert (run / "best/params.json").read_text() == "v2 params.json"
    assert (run / "training_state/step_000004/run.pt").exists()
    assert (run / "metrics.jsonl").read_text() == "2\n4\n"


def test_starting_over(s3, run, tmp_path, names):
    state(run, 2)
    (run / "config.yaml").write_text("a: 1\n")
    Follower(run, RUN, "run").send()
    other = place(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"{RUN} holds a run that was interrupted after step 2"):
        follower_of(other, tmp_path / "other", resume=False)
    (run / "summary.json").write_text("{}")
    Follower(run, RUN, "run").send()
    follower = follower_of(other, tmp_path / "other", resume=False)
    other.path.mkdir(parents=True)
    follower.send()
    assert "summary.json" in names()  # it has not begun: an error of its setup costs nothing
    (other.path / "config.yaml").write_text("a: 2\n")
    follower.send()
    assert names() == {"config.yaml"}


def test_a_fetch_that_was_cut_continues(s3, run, tmp_path, monkeypatch):
    state(run, 2)
    Follower(run, RUN, "run").send()
    other, gather, calls = place(tmp_path / "other"), store.gather, []

    def cut(url, there, part):
        calls.append(url)
        if len(calls) == 3:
            raise StoreError(f"{url} dropped")
        return gather(url, there, part)

    monkeypatch.setattr(store, "gather", cut)
    with pytest.raises(StoreError, match="dropped"):
        follower_of(other, tmp_path / "other")
    assert not (other.path / "training_state/step_000002").exists()
    monkeypatch.setattr(store, "gather", gather)
    follower_of(other, tmp_path / "other")
    assert contents(other.path) == contents(run)


def test_read_by_another(s3, run, tmp_path):
    """What a run has written is what the next one reads by its URL."""
    best(run, "v1")
    Follower(run, RUN, "run").send()
    url = f"{RUN}/best"
    read = Place(url, path_of(url, tmp_path / "cache"))
    assert not read.path.is_relative_to(run)
    mirror(read, tmp_path / "cache")
    assert (read.path / "params.json").read_text() == "v1 params.json"


# ------------------------------------------------------------------ in the background


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(background, "POLL_S", 0.05)
    monkeypatch.setattr(background, "SETTLE_S", 0.01)
    monkeypatch.setattr(background.time, "sleep", lambda s: None)


def wait_for(is_so):
    for _ in range(1000):
        if is_so():
            return
        threading_wait(0.02)
    raise AssertionError("it did not come")


def threading_wait(seconds):
    import threading

    threading.Event().wait(seconds)


def test_it_is_sent_while_the_run_goes_on(s3, run, names, in_store, impatient):
    thread = Background([Follower(run, RUN, "run")])
    state(run, 2)
    wait_for(lambda: "training_state/step_000002/manifest.json" in names())
    (run / "summary.json").write_text("{}")
    assert thread.close() == []
    assert in_store() == contents(run)


def test_a_failure_stops_nothing_and_is_told(s3, run, caplog, impatient, names, monkeypatch):
    state(run, 2)
    put = store.put

    def refused(path, url, beat):
        raise StoreError(f"{url} cannot be used: no")

    monkeypatch.setattr(store, "put", refused)
    thread = Background([Follower(run, RUN, "run")])
    wait_for(lambda: "Not everything is in the store" in caplog.text)
    (told,) = thread.close()
    assert caplog.text.count("Not everything is in the store") == 1
    assert "4 files" in told
    assert f"are not in {RUN} yet: {RUN}/training_state/step_000002/.metadata cannot be" in told
    assert told.endswith(f"send them with `python -m wmtp_modules.sync {run}`")
    assert "\n" not in told
    monkeypatch.setattr(store, "put", put)
    command = [sys.executable, "-m", "wmtp_modules.sync", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "4 files sent" in done.stdout
    assert names() == {name for name in contents(run)}


@pytest.mark.parametrize("fault", ["bucket", "keys"])
def test_the_bucket_goes_or_the_key(s3, run, impatient, refuse_keys, caplog, fault):
    thread = Background([Follower(run, RUN, "run")])
    if fault == "bucket":
        s3.delete_bucket(Bucket="bucket")
    else:
        refuse_keys()
    state(run, 2)
    (told,) = thread.close()
    assert ("no bucket bucket" if fault == "bucket" else "AWS_ACCESS_KEY_ID") in told


def test_a_bucket_that_was_deleted_and_made_anew(s3, run, impatient, names, in_store, caplog):
    """What was up before goes up again."""
    best(run, "v1")
    thread = Background([Follower(run, RUN, "run")])
    wait_for(lambda: names() == {*contents(run)})
    for name in names():
        s3.delete_object(Bucket="bucket", Key=f"run/{name}")
    s3.delete_bucket(Bucket="bucket")
    state(run, 2)
    wait_for(lambda: "no bucket bucket" in caplog.text)
    s3.create_bucket(Bucket="bucket")
    assert thread.close() == []
    assert in_store() == contents(run)


def test_a_store_that_hangs_does_not_hold_up_a_run_that_was_stopped(run, monkeypatch, impatient):
    monkeypatch.setattr(background, "STOPPED_S", 0.2)
    monkeypatch.setattr(store, "put_text", lambda *_: threading_wait(5))
    state(run, 2)
    (told,) = Background([Follower(run, RUN, "run")]).close(is_stopped=True)
    assert "4 files" in told


def test_an_endpoint_with_a_password(run, monkeypatch):
    """It is not written down, and sync asks for it."""
    from wmtp_modules.sync import send_files

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:planted-secret@host:9000")
    Follower(run, RUN, "run").save()
    assert "planted-secret" not in (run / upload.RECORD).read_text()
    for value in (None, "http://other:9000"):
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        if value:
            monkeypatch.setenv("AWS_ENDPOINT_URL", value)
        with pytest.raises(ValueError, match=r"AWS_ENDPOINT_URL is .*: set it as it was"):
            send_files(run)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "x")


def test_all_is_up(run):
    assert rest_of(Follower(run, RUN, "run")) is None
