"""Where what a URL names lies on this machine: one path in the cache for each URL.

``s3://bucket/data`` is ``CACHE/s3/bucket/data``, ``hf://org/name`` is ``CACHE/hf/org/name``, and
what is written ``CACHE/runs/s3/bucket/run``: it may be ahead of the store. A store with an endpoint
of its own has another first folder: two may have buckets of one name.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from wmtp_modules.config.secrets import hidden

S3, HF = "s3://", "hf://"


@dataclass(frozen=True)
class Place:
    """A URL and its path. ``kind`` is "read", "run" (an output folder) or "folder" (a table)."""

    url: str
    path: Path
    kind: str = "read"


def is_url(text: object) -> bool:
    """Whether a value names something in a store."""
    return isinstance(text, str) and text.startswith((S3, HF))


def default_cache() -> Path:
    """``storage.cache`` where nothing sets it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wmtp"


def endpoint() -> str | None:
    """The address of an S3 store that is not AWS, as boto3 reads it."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def path_of(url: str, cache: Path, kind: str = "read") -> Path:
    """The path of a URL that is read or written, see ``Place``.

    Raises:
        ValueError: if it names no bucket or repository, leads out of its folder, or nothing can be
            written there.
    """
    scheme, rest = url[:5], url[5:].rstrip("/")
    parts = rest.split("/")
    if (scheme == S3 and "@" in parts[0]) or ":" in parts[0]:
        raise ValueError(
            f"{hidden(url)}: the URL of a store names no user, password or port: credentials and "
            "AWS_ENDPOINT_URL are set in the environment, see docs/storage.md"
        )
    if not all(parts) or {".", ".."} & {*parts} or "\\" in rest:
        raise ValueError(
            f"{url} is not the name of something in a store: write s3://BUCKET/NAME or hf://ORG/NAME"
        )
    if scheme == HF and len(parts) < (3 if parts[0] in ("datasets", "models") else 2):
        raise ValueError(
            f"{url} names no repository: write hf://ORG/NAME, or hf://datasets/ORG/NAME"
        )
    if scheme == HF and kind != "read":
        raise ValueError(f"{url}: nothing is written there: name a folder, or s3://BUCKET/NAME")
    first = scheme[:2]
    if scheme == S3 and (own := endpoint()):
        first += "-" + hashlib.sha256(own.rstrip("/").encode()).hexdigest()[:8]
    top = cache.expanduser().absolute()
    return (top if kind == "read" else top / "runs") / first / rest


def bucket_and_key(url: str) -> tuple[str, str]:
    """``s3://bucket/some/key`` in two; the key may be empty."""
    bucket, _, key = url[len(S3) :].partition("/")
    return bucket, key.strip("/")
