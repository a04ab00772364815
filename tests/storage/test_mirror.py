"""Reading: what arrives is what is in the store, once, whatever happens on the way."""

import errno
import os
import socket
import threading
import time
from contextlib import suppress

import pytest

from wmtp_modules.storage import mirror as mirroring
from wmtp_modules.storage import store
from wmtp_modules.storage.mirror import mirror
from wmtp_modules.storage.places import Place, path_of
from wmtp_modules.storage.store import StoreError


def put(s3, key, content):
    s3.put_object(Bucket="bucket", Key=key, Body=content)


def place(url, cache):
    return Place(url, path_of(url, cache))


@pytest.fixture
def requests(monkeypatch):
    """Ranges that were asked for."""
    seen, blocks = [], store._blocks

    def noting(url, there, start):
        seen.append((url, start))
        return blocks(url, there, start)

    monkeypatch.setattr(store, "_blocks", noting)
    return seen


def test_a_folder_and_a_file(s3, tmp_path, requests):
    put(s3, "ckpt/params.json", b"{}")
    put(s3, "ckpt/deep/weights", os.urandom(100_000))
    put(s3, "ckpt2/other", b"not below ckpt/")
    put(s3, "ckpt/", b"")  # what a console makes
    folder = place("s3://bucket/ckpt", tmp_path)
    mirror(folder, tmp_path)
    found = {str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if p.is_file()}
    assert found == {"params.json", "deep/weights"}
    file = place("s3://bucket/ckpt/params.json", tmp_path)
    mirror(file, tmp_path)
    assert file.path.read_bytes() == b"{}"
    n = len(requests)
    mirror(folder, tmp_path)
    assert len(requests) == n  # nothing has changed


def test_what_changes_in_the_store_changes_here(s3, tmp_path):
    put(s3, "data/a", b"first")
    put(s3, "data/b", b"second")
    data = place("s3://bucket/data", tmp_path)
    mirror(data, tmp_path)
    put(s3, "data/a", b"other")
    s3.delete_object(Bucket="bucket", Key="data/b")
    mirror(data, tmp_path)
    assert [p.name for p in data.path.iterdir()] == ["a"]
    assert (data.path / "a").read_bytes() == b"other"
    (data.path / "a").write_bytes(b"touch")  # here: it is the store's that counts
    mirror(data, tmp_path)
    assert (data.path / "a").read_bytes() == b"other"


def test_an_object_of_several_parts(s3, tmp_path, monkeypatch):
    """Its etag is no md5; size and what was asked for hold."""
    monkeypatch.setattr(store, "BLOCK", 1_000_000)
    content = os.urandom(5 * 2**20 + 12_345)
    upload = s3.create_multipart_upload(Bucket="bucket", Key="big")["UploadId"]
    parts = []
    for n, part in enumerate((content[: 5 * 2**20], content[5 * 2**20 :]), start=1):
        answer = s3.upload_part(
            Bucket="bucket", Key="big", UploadId=upload, PartNumber=n, Body=part
        )
        parts.append({"PartNumber": n, "ETag": answer["ETag"]})
    s3.complete_multipart_upload(
        Bucket="bucket", Key="big", UploadId=upload, MultipartUpload={"Parts": parts}
    )
    big = place("s3://bucket/big", tmp_path)
    mirror(big, tmp_path)
    assert big.path.read_bytes() == content


def test_it_continues_where_it_was_cut(s3, tmp_path, requests, monkeypatch):
    monkeypatch.setattr(store, "BLOCK", 1000)
    content = os.urandom(10_500)
    put(s3, "file", content)
    file, blocks = place("s3://bucket/file", tmp_path), store._blocks

    def cut(url, there, start):
        for n, block in enumerate(blocks(url, there, start)):
            if n == 4:
                raise ConnectionResetError("gone")
            yield block

    monkeypatch.setattr(store, "_blocks", cut)
    with pytest.raises(StoreError, match=r"s3://bucket/file .*dropped.*continues from what is"):
        mirror(file, tmp_path)
    assert not file.path.exists()  # it has no name before it is whole
    monkeypatch.setattr(store, "_blocks", blocks)
    mirror(file, tmp_path)
    assert file.path.read_bytes() == content
    assert requests[-1][1] == 4000


def test_a_part_of_another_content_is_not_continued(s3, tmp_path):
    put(s3, "file", b"x" * 1000)
    file = place("s3://bucket/file", tmp_path)
    there = store.look(file.url)
    part = store.part_of(file.path, there)
    part.parent.mkdir(parents=True)
    part.write_bytes(b"y" * 500)  # damaged
    with pytest.raises(StoreError, match=r"did not arrive as it is in the store"):
        mirror(file, tmp_path)
    mirror(file, tmp_path)
    assert file.path.read_bytes() == b"x" * 1000


def test_changed_after_it_was_cut(s3, tmp_path, monkeypatch):
    put(s3, "file", b"a" * 5000)
    file, blocks = place("s3://bucket/file", tmp_path), store._blocks

    def cut(url, there, start):
        yield b"a" * 1000
        raise ConnectionResetError("gone")

    monkeypatch.setattr(store, "_blocks", cut)
    with pytest.raises(StoreError, match="continues from what is there"):
        mirror(file, tmp_path)
    before = store.look(file.url)
    put(s3, "file", b"b" * 5000)
    with pytest.raises(StoreError, match="changed while it was read"), store.errors_of(file.url):
        list(blocks(file.url, before, 1000))
    with pytest.raises(StoreError, match="changed while it was read"):
        store.gather(file.url, before, store.part_of(file.path, before))
    monkeypatch.setattr(store, "_blocks", blocks)
    mirror(file, tmp_path)
    assert [one.name for one in file.path.parent.iterdir()] == ["file"]
    assert file.path.read_bytes() == b"b" * 5000


def test_two_who_ask_at_once_read_it_once(s3, tmp_path, children, requests):
    """Processes, as the ranks of a machine are."""
    put(s3, "file", os.urandom(100_000))
    file = place("s3://bucket/file", tmp_path)
    counts = tmp_path / "counts"

    def ask():
        mirror(file, tmp_path)
        with counts.open("a") as out:
            out.write("r" * len(requests) + "\n")

    assert children.ends(children.begin(ask), children.begin(ask)) == [0, 0]
    assert sorted(counts.read_text().split("\n")) == ["", "", "r"]


def test_a_folder_that_is_being_written(s3, tmp_path):
    put(s3, "run/best/params.json", b"{}")
    put(s3, "run/best/.incomplete", b"")
    for url in ("s3://bucket/run/best", "s3://bucket/run"):
        with pytest.raises(StoreError, match=r"run/best is not whole.*wmtp_modules\.sync"):
            mirror(place(url, tmp_path), tmp_path)


def test_wrong_credentials(s3, tmp_path, refuse_keys):
    put(s3, "file", b"x")
    refuse_keys()
    with pytest.raises(StoreError, match=r"s3://bucket/file cannot.*AWS_ACCESS_KEY_ID") as caught:
        mirror(place("s3://bucket/file", tmp_path), tmp_path)
    assert "testing-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_credentials(s3, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(store, "_file_system", store._file_system.__wrapped__)  # a new one
    with pytest.raises(StoreError, match=r"s3://bucket/file .*without credentials.*AWS_PROFILE"):
        mirror(place("s3://bucket/file", tmp_path), tmp_path)


@pytest.mark.parametrize("url", ["s3://nowhere/file", "s3://nowhere"])
def test_a_bucket_that_is_not_there(s3, tmp_path, url):
    with pytest.raises(StoreError, match=rf"{url} .*no bucket nowhere: create it"):
        mirror(place(url, tmp_path), tmp_path)


def test_nothing_of_that_name(s3, tmp_path):
    with pytest.raises(StoreError, match="s3://bucket/none is not there: correct the name"):
        mirror(place("s3://bucket/none", tmp_path), tmp_path)


def test_nobody_answers(s3, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(StoreError, match=rf"s3://bucket/file cannot be reached at .*:{port}"):
        mirror(place("s3://bucket/file", tmp_path), tmp_path)
    assert time.monotonic() - began < 30


def test_no_space(s3, tmp_path, monkeypatch):
    put(s3, "file", b"x" * 1000)

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(StoreError, match=r"s3://bucket/file does not fit .*storage\.cache"):
        mirror(place("s3://bucket/file", tmp_path), tmp_path)


def test_a_disk_that_is_full_and_then_is_not(s3, small_disk, requests):
    content = os.urandom(3_000_000)
    put(s3, "file", content)
    disk = small_disk(1000)
    with pytest.raises(StoreError, match=rf"s3://bucket/file does not fit on the disk of {disk}"):
        mirror(place("s3://bucket/file", disk), disk)
    assert not place("s3://bucket/file", disk).path.exists()
    small_disk(5000)
    mirror(place("s3://bucket/file", disk), disk)
    assert place("s3://bucket/file", disk).path.read_bytes() == content
    assert [start > 0 for _, start in requests] == [False, True]  # it went on from there


class Dropping(threading.Thread):
    """Passes connections on to a server; cuts the first answers that are longer than ``after``."""

    def __init__(self, server: str, after: int, cuts: int) -> None:
        super().__init__(daemon=True)
        host, port = server.removeprefix("http://").split(":")
        self._to, self._after = (host, int(port)), after
        self.cuts = cuts
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def run(self) -> None:
        while True:
            mine, _ = self._listening.accept()
            other = socket.create_connection(self._to)
            for source, sink, limit in ((mine, other, None), (other, mine, self._after)):
                threading.Thread(target=self._pump, args=(source, sink, limit), daemon=True).start()

    def _pump(self, source, sink, limit) -> None:
        passed = 0
        try:
            while data := source.recv(4096):
                passed += len(data)
                if limit is not None and passed > limit and self.cuts:
                    self.cuts -= 1
                    break
                sink.sendall(data)
        except OSError:
            return  # the other direction has been cut
        finally:
            for one in (source, sink):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)


def test_connections_that_drop_in_the_middle(s3, s3_server, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BLOCK", 20_000)
    content = os.urandom(200_000)
    put(s3, "file", content)
    proxy = Dropping(s3_server, after=10_000, cuts=3)
    proxy.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    file = place("s3://bucket/file", tmp_path)
    mirror(file, tmp_path)
    assert file.path.read_bytes() == content
    assert proxy.cuts == 0


@pytest.mark.parametrize(
    "url", ["s3://", "s3://b//x", "s3://b/../c", "hf://org", "hf://datasets/org"]
)
def test_no_name_of_anything(url, tmp_path):
    with pytest.raises(ValueError, match=r"write s3://BUCKET|names no repository"):
        path_of(url, tmp_path)


def test_stores_with_buckets_of_one_name(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one:9000")
    one = path_of("s3://bucket/x", tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://two:9000")
    assert path_of("s3://bucket/x", tmp_path) != one


def test_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    def download(repo, repo_type, revision, local_dir, allow_patterns):
        assert (repo, repo_type, revision) == ("org/name", "model", "main")
        assert allow_patterns == ["best", "best/*"]
        (local_dir / "best").mkdir(parents=True)
        (local_dir / "best/params.json").write_text("{}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    best = place("hf://org/name@main/best", tmp_path)
    mirror(best, tmp_path)
    assert (best.path / "params.json").exists()

    def fails(*args, **kwargs):
        raise OSError("no route\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(StoreError, match=r"hf://org/name cannot be copied.*no route\): check"):
        mirroring.mirror(place("hf://org/name", tmp_path), tmp_path)
