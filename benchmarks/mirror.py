"""A large object from an S3 server on loopback: mirrored into the cache against a plain copy.

    uv run python benchmarks/mirror.py --mb 2000

The server is moto's, in a process of its own; but the object's content comes from a file, as moto
copies all of it for every range. ``--each`` limits a connection to so many MB/s: what a store far
away does. The plain copy is s3fs's ``get_file``, the client of the mirror, into a file that is then
synced, as the mirror's is. Pairs alternate; the median of plain seconds over mirrored ones has to
be at least 0.8. Then two processes ask at once: the server must send the object once.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from common import hardware

LIMIT = 0.8
KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
URL = "s3://bucket/object.bin"


def serve(
    queue: multiprocessing.Queue,
    sent: "multiprocessing.sharedctypes.Synchronized",
    source: Path,
    each: float,
) -> None:
    """An S3 server that counts the bytes of the object's content that it sends."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)

    def counting(environ: dict, start_response: object) -> object:
        if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".bin"):
            return content_of(environ, start_response)
        return application(environ, start_response)

    def content_of(environ: dict, start_response: Callable) -> Iterator[bytes]:
        size = source.stat().st_size
        first, _, last = environ.get("HTTP_RANGE", "bytes=0-")[len("bytes=") :].partition("-")
        start, end = int(first), min(int(last or size), size - 1) + 1
        headers = {"Content-Length": str(end - start)}
        headers |= {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
        start_response("206 Partial Content", list(headers.items()))
        with source.open("rb") as file:
            file.seek(start)
            while start < end:
                block = file.read(min(2**20, end - start))
                start += len(block)
                with sent.get_lock():
                    sent.value += len(block)
                yield block
                if each:
                    time.sleep(len(block) / 1e6 / each)

    server = make_server("127.0.0.1", 0, counting, threaded=True)
    queue.put(server.server_port)
    server.serve_forever()


def mirrored(cache: Path) -> float:
    from wmtp_modules.storage.mirror import mirror
    from wmtp_modules.storage.places import Place, path_of

    started = time.perf_counter()
    mirror(Place(URL, path_of(URL, cache)), cache)
    return time.perf_counter() - started


def copied(file: Path) -> float:
    from wmtp_modules.storage.store import _file_system

    system = _file_system(os.getpid(), os.environ["AWS_ENDPOINT_URL"])
    started = time.perf_counter()
    system.get_file(URL.removeprefix("s3://"), str(file))
    with file.open("rb") as written:
        os.fsync(written.fileno())
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--each", type=float, default=0.0, help="MB/s of a connection; 0: no limit")
    args = parser.parse_args()
    os.environ.update(KEYS)
    spawn = multiprocessing.get_context("spawn")
    queue, sent = spawn.Queue(), spawn.Value("q", 0)
    folder = Path(tempfile.mkdtemp(prefix="wmtp_mirror_"))
    what = queue, sent, folder / "source.bin", args.each
    server = spawn.Process(target=serve, args=what, daemon=True)
    server.start()
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{queue.get(timeout=120)}"
    try:
        print(hardware())
        found = measure(folder, args.mb * 10**6, args.pairs, sent, spawn)
    finally:
        shutil.rmtree(folder)
        server.kill()
    print(json.dumps(found))
    sys.exit(0 if found["ratio"] >= LIMIT and found["sent_for_two"] == 1.0 else 1)


def measure(folder: Path, size: int, pairs: int, sent: object, spawn: object) -> dict:
    from wmtp_modules.storage import store

    source = folder / "source.bin"
    with source.open("wb") as file:
        for start in range(0, size, 10**7):
            file.write(os.urandom(min(10**7, size - start)))
    store._call("create_bucket", Bucket="bucket")
    store.put(source, URL)
    seconds: dict[str, list[float]] = {"plain": [], "mirror": []}
    for n in range(pairs):
        seconds["plain"].append(copied(folder / "plain.bin"))
        seconds["mirror"].append(mirrored(folder / f"cache_{n}"))
        (folder / "plain.bin").unlink()
        shutil.rmtree(folder / f"cache_{n}")
    before, both = sent.value, folder / "both"
    asking = [spawn.Process(target=mirrored, args=(both,)) for _ in range(2)]
    for one in asking:
        one.start()
    for one in asking:
        one.join()
    assert [one.exitcode for one in asking] == [0, 0]
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["mirror"], strict=True)]
    return {
        "mb": size / 10**6,
        **{f"{name}_s": [round(s, 2) for s in all_of_it] for name, all_of_it in seconds.items()},
        "ratio": round(median(ratios), 3),
        "sent_for_two": round((sent.value - before) / size, 3),
    }


if __name__ == "__main__":
    main()
