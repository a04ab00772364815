"""Finds out at the start whether several hosts see the files of one run.

Every rank writes its part of a training state, a table and an evaluation into folders that all of
them read. Data and checkpoints may be copies, but then of the same: each rank loads its own part of
them, and what differs between hosts would mix without a word.
"""

import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from wmtp_modules.parallel.process_group import is_first_of_host, n_hosts, patiently_gathered
from wmtp_modules.run.storing import TABLES, as_named

# A client of NFS may not look again for a minute where it found nothing.
PATIENCE_S = 65.0
MOST_FILES = 10_000  # of a folder that are compared
BEGINNING = 2**20  # bytes of a file


def check_hosts(cfg: DictConfig) -> None:
    """Compare what the hosts of a run see; a collective, which does nothing on one host.

    Raises:
        ValueError: on all ranks, if what the run writes is not shared, or what it reads is not the
            same on all hosts.
    """
    if n_hosts() == 1:
        return
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    leaves = dict(_leaves(values, ""))
    written = {key: path for key, path in leaves.items() if key.endswith(TABLES)}
    written |= {"output_dir": values["output_dir"]}
    if values.get("prepare") and values.get("assets_dir"):
        written |= {"assets_dir": values["assets_dir"]}
    shown = as_named(written)
    if problem := _not_shared(written, shown):
        raise ValueError(problem)
    above = [*map(Path, written.values())]
    read = {
        key: path
        for key, path in leaves.items()
        if key not in written and not any(one in (Path(path), *Path(path).parents) for one in above)
    }
    if problem := _not_the_same(read):
        raise ValueError(problem)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, one in value.items():
            if name != "_component_":
                yield from _leaves(one, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from _leaves(one, f"{key}[{i}]")
    elif isinstance(value, str) and 0 < len(value) < 4096 and "\0" not in value:
        yield key, value


def _not_shared(folders: dict[str, str], shown: dict[str, str]) -> str | None:
    """Which folder another host does not share with rank 0's, told on all ranks."""
    marks = {key: f".shared_{uuid.uuid4().hex}" for key in folders}
    error = None
    if dist.get_rank() == 0:
        try:
            for key, folder in folders.items():
                Path(folder).mkdir(parents=True, exist_ok=True)
                (Path(folder) / marks[key]).touch()
        except OSError as caught:
            error = str(caught)
    marks, error, first = patiently_gathered((marks, error, socket.gethostname()))[0]
    if error:
        return error
    missing = None
    if is_first_of_host():
        until = time.monotonic() + PATIENCE_S
        for key, folder in folders.items():
            while missing is None and marks[key] not in _names(folder):
                if time.monotonic() > until:
                    missing = key
                time.sleep(0.1)
    found = patiently_gathered((missing, socket.gethostname()))
    if dist.get_rank() == 0:
        for key, folder in folders.items():
            (Path(folder) / marks[key]).unlink(missing_ok=True)
    for key, host in found:
        if key:
            own = folders[key] if shown[key] == folders[key] else f"{folders[key]} (storage.cache)"
            return (
                f"{key}: host {host} does not see what host {first} writes in {own}: name a folder "
                "on a file system that all hosts share, docs/nodes.md"
            )
    return None


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _not_the_same(paths: dict[str, str]) -> str | None:
    """Which path is something else on another host, told on all ranks."""
    seen = {key: _look(Path(path)) for key, path in paths.items()} if is_first_of_host() else None
    found = patiently_gathered((seen, socket.gethostname()))
    own, first = found[0]
    for theirs, host in found[1:]:
        for key, path in paths.items() if theirs else ():
            there, here = theirs.get(key), own.get(key)
            if there == here:
                continue
            what = f"is on host {host} and not on host {first}"
            if not there:
                what = f"is on host {first} and not on host {host}"
            elif here:
                what = f"is another one on host {host} than on host {first}"
            return (
                f"{key}: {path} {what}: copy it, or put it on a file system that all hosts share, "
                "docs/nodes.md"
            )
    return None


def _look(path: Path) -> str | None:
    """A digest of names, sizes and the files' beginnings; None if nothing is there."""
    try:
        if not path.exists():
            return None
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        digest = hashlib.sha256()
        for file in files[:MOST_FILES]:
            name = file.name if file == path else file.relative_to(path)
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(BEGINNING if len(files) < 100 else 0))
        return digest.hexdigest()
    except OSError:  # a file that leaves meanwhile, or that only its reader may open
        return None
