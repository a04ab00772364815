"""Reading: what a URL names is copied into the cache once, verified, and found there from then on.

One process copies, others wait for it. What a connection that dropped or a kill has left is
continued. Beside the cache, ``.records`` holds size, etag and sha256 of each file as it was copied.
"""

import hashlib
import json
import shutil
from pathlib import Path

from wmtp_modules.files import new_file, only_writer, read_json
from wmtp_modules.storage import store
from wmtp_modules.storage.places import HF, Place, bucket_and_key
from wmtp_modules.storage.store import StoreError

INCOMPLETE = ".incomplete"  # an object beside those of a folder that is not whole


def mirror(place: Place, cache: Path) -> None:
    """Have the newest content of a place's URL, an object or all below it, at its path.

    Raises:
        StoreError: if it is not there, not whole, or cannot be read or kept.
    """
    records = cache.expanduser().absolute() / ".records"
    with store.errors_of(place.url, cache):
        records.mkdir(parents=True, exist_ok=True)
    bucket, _ = bucket_and_key(place.url)
    with only_writer(records / f"{place.url[:2]}-{bucket}"):
        if place.url.startswith(HF):
            _from_hub(place)
        else:
            _from_store(place, records)


def _from_store(place: Place, records: Path) -> None:
    url, path = place.url.rstrip("/"), place.path
    one = store.look(url)
    found = {"": one} if one else store.objects_in(url)
    if not found:
        raise StoreError(f"{url} is not there: correct the name, or wait until it is written")
    refuse_incomplete(url, found)
    with store.errors_of(url, records.parent):
        if one and path.is_dir():  # it was a folder in the store
            shutil.rmtree(path)
        for above in () if one else (path, *path.parents):  # or an object
            if above.is_file():
                above.unlink()
    for name, there in found.items():
        its_url, file = (f"{url}/{name}", path / name) if name else (url, path)
        record = records / f"{hashlib.sha256(str(file).encode()).hexdigest()[:32]}.json"
        if _has(file, there, record):
            continue
        part = store.part_of(file, there)
        with store.errors_of(its_url, records.parent):
            sha256 = store.gather(its_url, there, part)
            part.replace(file)
            known = {"url": its_url, "size": there.size, "etag": there.etag, "sha256": sha256}
            with new_file(record) as unfinished:
                unfinished.write_text(json.dumps(known | {"mtime_ns": file.stat().st_mtime_ns}))
    here = [file for file in path.rglob("*") if file.is_file()] if not one else []
    for file in here:
        if file.relative_to(path).as_posix() not in found:  # no longer in the store
            file.unlink()


def _has(file: Path, there: store.Object, record: Path) -> bool:
    if not file.is_file() or not record.exists():
        return False
    known, now = read_json(record), file.stat()
    is_same = (known["size"], known["etag"]) == (there.size, there.etag)
    return is_same and (now.st_size, now.st_mtime_ns) == (known["size"], known["mtime_ns"])


def refuse_incomplete(url: str, found: dict[str, store.Object]) -> None:
    """StoreError if a folder below a URL is being written, or was left so."""
    for name in found:
        if name.rpartition("/")[2] == INCOMPLETE:
            folder = f"{url}/{name}".removesuffix(f"/{INCOMPLETE}")
            raise StoreError(
                f"{folder} is not whole: a run is writing it, or was stopped while it did. Wait, "
                "or finish it where that run was (python -m wmtp_modules.sync RUN_DIR)"
            )


def _from_hub(place: Place) -> None:
    """huggingface_hub copies, verifies and continues by itself."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    parts = place.url.removeprefix(HF).rstrip("/").split("/")
    kind = {"datasets": "dataset", "models": "model"}.get(parts[0])
    owner, name, *inside = parts[1:] if kind else parts
    name, _, revision = name.partition("@")
    below, folder = "/".join(inside), place.path
    for _ in inside:
        folder = folder.parent
    try:
        snapshot_download(
            f"{owner}/{name}",
            repo_type=kind or "model",
            revision=revision or None,
            local_dir=folder,
            allow_patterns=[below, f"{below}/*"] if below else None,
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise StoreError(
            f"{place.url} cannot be copied from the hub ({type(error).__name__}: {reason}): check "
            "the name, the network and HF_TOKEN, and that the disk has room"
        ) from error
    if not place.path.exists():
        raise StoreError(f"{place.url} is not in that repository: correct what follows its name")
