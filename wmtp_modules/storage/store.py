"""Objects of an S3 store: listed, read, written, deleted; errors in one sentence.

Endpoint and credentials are those that boto3 would find. s3fs retries what may pass; what remains
is a ``StoreError``.
"""

import asyncio
import errno
import functools
import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp_modules.config.secrets import hidden
from wmtp_modules.storage.places import bucket_and_key, endpoint

BLOCK = 8 * 2**20  # bytes of a request, hashed and written at once
AT_ONCE = 10  # requests, as many as s3fs has connections
TRIES = 4  # in a row without a byte, where a connection drops in the middle
SHA256 = "sha256"  # in an object's metadata, of what we have written


class StoreError(OSError):
    """One sentence: which object or bucket, what happened, the way out."""


@dataclass(frozen=True)
class Object:
    size: int  # bytes
    etag: str  # without quotes


@functools.cache
def _file_system(pid: int, _endpoint: str | None) -> Any:
    """One for each process: its thread does not survive a fork."""
    import s3fs  # a second

    # Else s3fs would ask for public objects where it finds no credentials.
    return s3fs.S3FileSystem(
        anon=False,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}},
    )


def _call(method: str, **arguments: Any) -> Any:
    return _file_system(os.getpid(), endpoint()).call_s3(method, **arguments)


# ------------------------------------------------------------------------------ errors

_REFUSED = {
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401"),
    *("AccessDenied", "403", "Forbidden", "AllAccessDisabled", "InvalidClientTokenId"),
    *("AuthFailure", "TokenRefreshRequired", "RequestTimeTooSkewed"),
}


@contextmanager
def errors_of(url: str, cache: Path | None = None) -> Iterator[None]:
    """Raise what goes wrong with a URL as ``StoreError``, which names it and the way out."""
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except StoreError:
        raise
    except (OSError, BotoCoreError, ClientError, aiohttp.ClientError, TimeoutError) as error:
        raise StoreError(hidden(f"{url} {_what(url, error, cache)}")) from error


def _code(error: BaseException) -> str:
    """The store's own name for an error, empty if it has not answered."""
    response = getattr(error, "response", None)
    return response["Error"].get("Code", "") if isinstance(response, dict) else ""


def _what(url: str, error: BaseException, cache: Path | None) -> str:
    causes: list[BaseException] = [error]  # s3fs gives errors of Python for those of the store
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    code = next(filter(None, map(_code, causes)), "")
    bucket, where = bucket_and_key(url)[0], endpoint() or "AWS"
    name, reason = type(error).__name__, " ".join(str(error).split()) or type(error).__name__
    if code in ("NoSuchBucket", "InvalidBucketName"):
        return f"cannot be used: {where} has no bucket {bucket}: create it, or correct the name"
    if code in _REFUSED:
        return (
            f"cannot be used: {where} refuses the credentials ({code}): check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE, and what they may do"
        )
    if code in ("PreconditionFailed", "412"):
        return "was changed while it was read: start the same command again"
    if code in ("NoSuchKey", "404"):
        return "is not there: correct the name, or wait until it is written"
    if "Credentials" in name or name in ("ProfileNotFound", "TokenRetrievalError"):
        return (
            f"cannot be used without credentials ({reason}): set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if not code and isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"does not fit on the disk of {cache or error.filename} ({error.strerror}): make room, "
            "or set storage.cache to a larger disk, and start the same command again, which "
            "continues from what is there"
        )
    if not code and isinstance(error, OSError) and error.filename:
        return f"cannot be kept in {error.filename} ({error.strerror})"
    return (
        f"cannot be reached at {where} or the connection dropped ({code or name}: {reason[:300]}): "
        "check the network and AWS_ENDPOINT_URL, and start the same command again, which continues "
        "from what is there"
    )


# ----------------------------------------------------------------------------- objects


def look(url: str) -> Object | None:
    """An object, None if there is none of that name."""
    return found[0] if (found := _head(url)) else None


def _head(url: str) -> tuple[Object, dict] | None:
    bucket, key = bucket_and_key(url)
    with errors_of(url):
        if not key:
            _call("list_objects_v2", Bucket=bucket, MaxKeys=1)
            return None
        try:
            head = _call("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:  # the answer has no body: the bucket may be what is not there
            _call("list_objects_v2", Bucket=bucket, MaxKeys=1)
            return None
    return Object(head["ContentLength"], head["ETag"].strip('"')), head


def objects_in(url: str) -> dict[str, Object]:
    """All objects below a URL, by what follows it and a slash."""
    bucket, key = bucket_and_key(url)
    prefix, found, more = f"{key}/" if key else "", {}, {}
    with errors_of(url):
        while True:
            page = _call("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            for one in page.get("Contents", []):
                name = one["Key"].removeprefix(prefix)
                if name and not name.endswith("/"):  # what consoles make for a folder
                    found[name] = Object(one["Size"], one["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}


def put(path: Path, url: str, beat: Callable[[], object] = lambda: None) -> Object:
    """Write a file as an object, which appears when it is whole; ``beat`` is called on the way.

    Raises:
        StoreError: also if the store has it in another size.
    """
    from fsspec.callbacks import Callback

    class Beat(Callback):
        def relative_update(self, inc: int = 1) -> None:
            beat()

    bucket, key = bucket_and_key(url)
    with errors_of(url):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        system = _file_system(os.getpid(), endpoint())
        system.put_file(str(path), f"{bucket}/{key}", callback=Beat(), Metadata={SHA256: digest})
    there, size = look(url), path.stat().st_size
    if there is None or there.size != size:
        raise StoreError(f"{url} was written in part (not all of {size} bytes): it is sent again")
    beat()
    return there


def put_text(text: str, url: str) -> None:
    bucket, key = bucket_and_key(url)
    with errors_of(url):
        _call("put_object", Bucket=bucket, Key=key, Body=text.encode())


def delete(url: str) -> None:
    """Delete an object, which need not be there."""
    bucket, key = bucket_and_key(url)
    with errors_of(url):
        _call("delete_object", Bucket=bucket, Key=key)


def part_of(path: Path, there: Object) -> Path:
    """Where an object is gathered that will be ``path``; another content has another one."""
    tag = re.sub(r"\W", "", there.etag)[:40]
    return path.with_name(f".{path.name}.{tag}.part")


def gather(url: str, there: Object, part: Path) -> str:
    """Read an object into a file that may hold its first bytes already; verify size and content.

    Returns:
        Its sha256.

    Raises:
        StoreError: as ``errors_of``, or if the content is not what its etag or metadata says: the
            file is then removed.
    """
    with errors_of(url, part.parent):
        part.parent.mkdir(parents=True, exist_ok=True)
        for other in part.parent.glob(".*.part"):  # of a content that was replaced in the store
            if other.stem.rpartition(".")[0] == part.stem.rpartition(".")[0] and other != part:
                other.unlink()
        found = _head(url)
        if found is None or found[0] != there:
            part.unlink(missing_ok=True)
            raise StoreError(f"{url} was changed while it was read: start the same command again")
        head = found[1]
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        is_md5 = re.fullmatch(r"[0-9a-f]{32}", there.etag) and "kms" not in head.get(
            "ServerSideEncryption", ""
        )
        expected = head.get("Metadata", {}).get(SHA256)
        with part.open("a+b") as file:
            file.seek(0)
            sums = (sha256,) if expected or not is_md5 else (sha256, md5)
            while block := file.read(BLOCK):
                for one in sums:
                    one.update(block)
            for block in _blocks(url, there, file.tell()):
                file.write(block)
                for one in sums:
                    one.update(block)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    is_sound = size == there.size and (
        sha256.hexdigest() == expected if expected else not is_md5 or md5.hexdigest() == there.etag
    )
    if not is_sound:
        part.unlink()
        raise StoreError(
            f"{url} did not arrive as it is in the store ({size} of {there.size} bytes, another "
            "checksum): start the same command again; if it stays so, the object is damaged, write "
            "it anew"
        )
    return sha256.hexdigest()


def _blocks(url: str, there: Object, start: int) -> Iterator[bytes]:
    """The rest of an object in order, by some requests at once: one alone is slow at most stores.

    What drops is asked for again from where it was.
    """
    system, (bucket, key) = _file_system(os.getpid(), endpoint()), bucket_and_key(url)
    match = f'"{there.etag}"'

    async def block_of(begin: int, end: int) -> bytes:
        got, failures = bytearray(), 0
        while True:
            before = len(got)
            rest = f"bytes={begin + before}-{end - 1}"
            try:
                answer = await system._call_s3(
                    "get_object", Bucket=bucket, Key=key, IfMatch=match, Range=rest
                )
                async with answer["Body"] as body:
                    while some := await body.read(2**20):
                        got += some
                if len(got) == end - begin:
                    return bytes(got)
                raise ConnectionError(f"it ended after {begin + len(got)} of {there.size} bytes")
            except Exception as error:
                failures = 1 if len(got) > before else failures + 1
                if _code(error.__cause__ or error) or failures == TRIES:  # the store's own answer
                    raise
                await asyncio.sleep(0.2 * 2**failures)

    coming: deque[Future] = deque()
    try:
        while start < there.size or coming:
            while start < there.size and len(coming) < AT_ONCE:
                end = min(start + BLOCK, there.size)
                coming.append(asyncio.run_coroutine_threadsafe(block_of(start, end), system.loop))
                start = end
            yield coming.popleft().result()
    finally:
        for one in coming:
            one.cancel()
