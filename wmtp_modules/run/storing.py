"""What a config names in a store: its paths on this machine, brought there before the run begins.

``read_config`` is followed by ``localized``, which puts paths in place of URLs; nothing after it
knows a URL. ``arrive`` reads what is read, ``followed`` brings up what is written.
"""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from wmtp_modules.config.check import ConfigError
from wmtp_modules.config.environment import refuse_variables
from wmtp_modules.config.secrets import hidden, remember
from wmtp_modules.run.stopping import Stopped
from wmtp_modules.storage.places import Place, default_cache, is_url, path_of

# Blocks whose URLs are no files; of trackers, and of what says where stores are.
NO_FILES = ("metric_logger", "tracking", "registry", "storage")
# Keys of paths, of which no other URL may become a folder "gs:".
FOLDERS = ("output_dir", "table_dir", "checkpoint_dir", "path", "assets_dir")
OTHER_URL = re.compile(r"[A-Za-z][\w+.-]+:/")
TABLES = ("table_dir", "critic.checkpoint_dir")  # read and written, by what their key ends in

_places: dict[str, Place] = {}  # of this process's configs, by URL


def localized(cfg: DictConfig) -> DictConfig:
    """A config with paths in place of the URLs of a store; ValueError if one is of no use here.

    Nothing is read yet. What lies below ``output_dir`` lies below its path. The endpoint and the
    scratch disk of ``storage`` hold for this process from here on; AWS_ENDPOINT_URL goes before.
    """
    refuse_variables(cfg)
    _remember_secrets(cfg)
    if own := OmegaConf.select(cfg, "storage.endpoint"):
        os.environ.setdefault("AWS_ENDPOINT_URL", own)
    if scratch := OmegaConf.select(cfg, "storage.scratch"):
        folder = Path(scratch).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    cache, top = cache_of(cfg), [key for key in cfg if key == "output_dir"]
    _localize(cfg, top, "", cache, True)  # first: others may lie in it
    # Then what stands there as a URL, and last what others' values make one.
    for interpolated in (False, True):
        _localize(cfg, [*cfg], "", cache, interpolated)
    return cfg


def _remember_secrets(node: DictConfig | ListConfig) -> None:
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        try:
            value = node[key]
        except OmegaConfBaseException:  # the check of the config says so
            continue
        if isinstance(value, DictConfig | ListConfig):
            _remember_secrets(value)
        else:
            remember(value, str(key))


def cache_of(cfg: DictConfig) -> Path:
    """The folder that mirrors stores: ``storage.cache``, else one of the user."""
    return Path(OmegaConf.select(cfg, "storage.cache") or default_cache()).expanduser().absolute()


def _localize(
    node: DictConfig | ListConfig, keys: list, above: str, cache: Path, interpolated: bool
) -> None:
    raw: Any = OmegaConf.to_container(node, resolve=False)
    for key in keys:
        dotted = f"{above}{key}"
        if dotted in NO_FILES or OmegaConf.is_missing(node, key):
            continue
        if isinstance(raw[key], dict | list):
            inner = node[key]
            inside = [*inner] if isinstance(inner, DictConfig) else [*range(len(inner))]
            _localize(inner, inside, f"{dotted}.", cache, interpolated)
        elif key in FOLDERS and OTHER_URL.match(str(raw[key])) and not is_url(raw[key]):
            raise ConfigError(
                f"{dotted}: {raw[key]} is neither a path nor a URL that is known here: write "
                "s3://BUCKET/NAME, hf://ORG/NAME to read, or a folder"
            )
        elif is_url(raw[key]) or (interpolated and OmegaConf.is_interpolation(node, key)):
            try:
                value = node[key]
            except OmegaConfBaseException:  # the check of the config says so
                continue
            if is_url(value):
                is_table = dotted.endswith(TABLES)
                # What a pattern finds lies in the folder above it, which comes whole.
                is_read = not is_table and dotted != "output_dir"
                value, pattern = _above_pattern(value) if is_read else (value, "")
                kind = "run" if dotted == "output_dir" else "folder" if is_table else "read"
                node[key] = str(_placed(value.rstrip("/"), kind, cache).path / pattern)


def _above_pattern(url: str) -> tuple[str, str]:
    """A URL up to the folder that holds what its pattern finds, and the pattern, or nothing."""
    parts = url.split("/")
    first = next((i for i, part in enumerate(parts) if i > 2 and has_magic(part)), len(parts))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _placed(url: str, kind: str, cache: Path) -> Place:
    for written in [place for place in _places.values() if place.kind != "read"]:
        if url == written.url or url.startswith(f"{written.url}/"):
            return Place(url, written.path / url.removeprefix(written.url).strip("/"), written.kind)
    return _places.setdefault(url, Place(url, path_of(url, cache, kind), kind))


def urls() -> list[str]:
    """URLs of a store that this process's configs name."""
    return [*_places]


def as_named(value: Any) -> Any:
    """The same dicts, lists and values with URLs in place of their paths, for what a run writes."""
    if isinstance(value, dict):
        return {key: as_named(one) for key, one in value.items()}
    if isinstance(value, list):
        return [as_named(one) for one in value]
    if isinstance(value, str):
        for place in _places.values():
            if value == str(place.path) or value.startswith(f"{place.path}/"):
                return place.url + value.removeprefix(str(place.path))
    return value


def _written() -> list[Place]:
    """Places that are written, none inside another."""
    every = [place for place in _places.values() if place.kind != "read"]
    return [p for p in every if not any(p.url.startswith(f"{other.url}/") for other in every)]


def arrive(cfg: DictConfig) -> None:
    """Read into the cache what configs name; each rank, of which one reads for its machine.

    Raises:
        StoreError: with the URL, what is wrong, and the way out.
    """
    from wmtp_modules.storage.mirror import mirror  # only who has a store needs it

    cache, read = cache_of(cfg), [place for place in _places.values() if place.kind == "read"]
    for place in read:
        if any(place.url.startswith(f"{other.url}/") for other in read):
            continue
        above = next((w for w in _written() if place.url.startswith(f"{w.url}/")), None)
        if place.path.is_symlink():
            place.path.unlink(missing_ok=True)
        if above is None:
            mirror(place, cache)
            continue
        # Another run of this command writes it: there it is, or will be.
        if place.path.is_dir():
            shutil.rmtree(place.path, ignore_errors=True)
        place.path.parent.mkdir(parents=True, exist_ok=True)
        place.path.symlink_to(above.path / place.url.removeprefix(above.url).strip("/"))


@contextmanager
def followed(cfg: DictConfig) -> Iterator[None]:
    """Rank 0 fetches what stores have of this run, and keeps them up to its folders.

    What is not up at the end is said in a sentence. Other ranks do nothing.

    Raises:
        StoreError: at the start, if a store cannot be used; later nothing stops the run.
        ValueError: if starting over would delete an interrupted run.
    """
    if dist.get_rank() != 0 or not (places := _written()):
        yield
        return
    from wmtp_modules.storage.background import Background
    from wmtp_modules.storage.fetch import follower_of

    own, resume = str(cfg.output_dir), bool(cfg.get("resume_from_checkpoint", True))
    thread = Background(
        [
            follower_of(place, cache_of(cfg), resume=resume or str(place.path) != own)
            for place in places
        ]
    )
    is_stopped = False
    try:
        yield
    except Stopped:
        is_stopped = True
        raise
    finally:
        rest = thread.close(is_stopped=is_stopped)
        if not rest:
            print(f"Store        {', '.join(hidden(place.url) for place in places)}")
        for told in rest:
            for bar in list(getattr(tqdm, "_instances", ())):
                bar.close()
            print(told, file=sys.stderr, flush=True)
