"""What a run needs to resume: sharded model and optimizer, its position, each rank's own part.

A state is a folder ``step_000123`` on a file system that all ranks share:

- shards and ``.metadata`` of ``torch.distributed.checkpoint``: tensors of the model that train,
  and the optimizer's;
- ``run.pt``: what is the same on all ranks; ``rank_<r>.pt``: random state of one;
- ``manifest.json``: size and sha256 of every other file.

It is copied at once and written while training continues, under a temporary name, every file
synced, and renamed when complete. So what has the name is complete, unless something damaged it
since, which the manifest tells.
"""

import json
import logging
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wmtp_modules.files import disk_errors, file_hash, sync
from wmtp_modules.parallel.process_group import all_gathered

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# What is frozen comes from the checkpoint again. That no other key is missing is DCP's to say.
TRAINED = dcp_state.StateDictOptions(ignore_frozen_params=True, strict=False)


class TrainingStates:
    """The states of one run. Every rank makes one and calls the same methods in the same order.

    Args:
        parent: their folder, shared by all ranks.
        keep_last: states to keep. Damaged ones do not count and are never deleted: they are renamed
            to ``step_000123.damaged`` when the run that passed them over saves.
    """

    def __init__(self, parent: Path, keep_last: int) -> None:
        self._parent = parent
        self._keep_last = keep_last
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        # Threads that write talk over a group of their own, and may take long.
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        pinned = torch.cuda.is_available()  # copies from the GPU at full speed, buffers kept
        self._stager = DefaultStager(StagingOptions(pinned, False, False, False))
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="training_state")
        self._writing: Future | None = None
        self._damaged: set[str] = set()
        self.last_step: int | None = None  # of the newest that was saved or loaded
        self.seconds = 0.0  # that the slowest took until it was on the disk

    # --------------------------------------------------------------- writing

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        run: dict,
        own: dict,
        keep_older: bool = False,
    ) -> None:
        """Copy a state, which is written while the caller goes on; waits for the one before.

        Args:
            run: plain values and tensors, the same on all ranks.
            own: this rank's.
            keep_older: delete none of the older ones, whatever ``keep_last`` says.

        Raises:
            OSError: if the one before could not be written, or this one cannot be begun.
        """
        self.wait()
        started = time.perf_counter()
        tensors, plain = _split(model, optimizer)
        partial = self._parent / f"step_{step:06d}.partial"
        with _one_sentence_for(partial):
            self._on_rank_zero(lambda: _make_anew(partial))
        run = {"world": self._world, "optimizer": plain, **run}
        written: Any = dcp.async_save(
            tensors,
            storage_writer=_Writer(partial),
            async_stager=self._stager,
            process_group=self._group,
        )

        def finish() -> None:
            self._finish(written, partial, run, own, keep_older)
            self.seconds = max(self.seconds, time.perf_counter() - started)

        self._writing = self._writer.submit(finish)
        self.last_step = step

    def wait(self) -> None:
        """Wait until the last state is complete; OSError, on all ranks, if it cannot be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @property
    def has_failed(self) -> bool:
        """Whether ``wait`` would raise at once; ranks see it at different times."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def drop_all(self) -> None:
        """Delete the states, half-written ones too, and nothing else in their folder."""
        self._on_rank_zero(lambda: _drop(self._parent, r"step_\d+(\.partial|\.dropped)?"))

    def close(self) -> None:
        """Wait, and give threads and buffers back."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._stager.close()

    def _finish(
        self, written: Future, partial: Path, run: dict, own: dict, keep_older: bool
    ) -> None:
        """Everything after the shards, in the thread that writes."""

        def own_files() -> dict[str, dict]:
            try:
                written.result()
            except CheckpointException as error:  # DCP's text is the traceback of every rank
                raise next(iter(error.failures.values()))[0] from error
            _save(own, partial / f"rank_{self._rank}.pt")
            mine = [*partial.glob(f"__{self._rank}_*"), partial / f"rank_{self._rank}.pt"]
            if self._rank == 0:
                _save(run, partial / "run.pt")
                mine += [partial / ".metadata", partial / "run.pt"]
            return {f.name: {"size": f.stat().st_size, "sha256": file_hash(f)} for f in mine}

        try:
            with _one_sentence_for(partial):
                files = self._together(own_files)
                self._on_rank_zero(lambda: self._publish(partial, files, keep_older))
        except OSError:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _publish(self, partial: Path, files: dict[str, dict], keep_older: bool) -> None:
        final = partial.with_suffix("")
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
        sync(partial / MANIFEST)
        sync(partial)
        while self._damaged:  # a later start would take them for sound ones that are older
            _set_aside(self._parent / self._damaged.pop())
        partial.rename(final)
        sync(self._parent)
        _drop(self._parent, r"step_\d+(\.partial|\.dropped)")  # what a kill left
        if not keep_older:
            done = [path for path in saved_states(self._parent) if step_of(path) <= step_of(final)]
            for path in sorted(done, key=step_of)[: -self._keep_last]:
                # First renamed: what a kill leaves must not look like a state.
                shutil.rmtree(path.rename(path.with_name(f"{path.name}.dropped")))

    # --------------------------------------------------------------- reading

    def newest(self) -> Path | None:
        """The sound state with the most steps, None without any; ValueError if all are damaged."""
        found = sorted(self._on_rank_zero(lambda: saved_states(self._parent)), key=step_of)
        problems = []
        for folder in reversed(found):
            problem = self._damage(folder)
            if problem is None:
                return folder
            self._damaged.add(folder.name)
            problems.append(f"{folder} is damaged ({problem})")
            if self._rank == 0:
                log.warning("%s: it is passed over and kept", problems[-1])
        if problems:
            raise ValueError(
                f"no training state can be resumed: {'; '.join(problems)}. Bring one back from a "
                f"copy, or move {self._parent} away to start over"
            )
        return None

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a state, the same on all ranks."""

        def read_manifest() -> dict | str:
            try:
                files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
                return {_file_name(name): (f["size"], f["sha256"]) for name, f in files.items()}
            except FileNotFoundError:
                return f"it has no {MANIFEST}"
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                return f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"

        files = self._on_rank_zero(read_manifest)
        if isinstance(files, str):
            return files
        problem = None
        for name, (size, digest) in [*files.items()][self._rank :: self._world]:
            path = folder / name
            try:
                if not path.is_file():
                    problem = f"{name} is missing"
                elif path.stat().st_size != size:
                    problem = f"{name} has {path.stat().st_size} bytes, not {size}"
                elif file_hash(path) != digest:
                    problem = f"the content of {name} has changed"
            except OSError as error:  # a bad block, or no right to read it
                problem = f"{name} cannot be read: {error.strerror or error}"
        return next(filter(None, all_gathered(problem, self._group)), None)

    def load(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Fill model and optimizer in place, whatever the number of ranks that saved.

        Returns:
            The run's part, and this rank's own; None if no rank of this number had saved.

        Raises:
            ValueError: if the state holds anything but tensors and plain values, or not those of
                this model and optimizer.
        """
        run = read_run(folder)
        if run["optimizer"]:
            # Makes the tensors that will be filled.
            dcp_state.get_optimizer_state_dict(model, optimizer, options=TRAINED)
        tensors, _ = _split(model, optimizer)
        try:
            dcp.load(
                tensors,
                storage_reader=_SafeReader(folder),
                planner=_TensorsOnly(),
                process_group=self._group,
            )
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise ValueError(
                f"{folder} does not hold this model and optimizer ({cause}): it was written by "
                "another run, or by something else"
            ) from cause
        if plain := run["optimizer"]:
            # Its tensors are filled already.
            made = dcp_state.get_optimizer_state_dict(model, optimizer, options=TRAINED)
            state: Any = made["state"]
            for key, value in plain["values"].items():
                parameter, name = key.rsplit("/", 1)
                state[parameter][name] = value
            rest = {"state": state, "param_groups": plain["param_groups"]}
            dcp_state.set_state_dict(
                model,
                optimizer,
                model_state_dict=tensors["model"],
                optim_state_dict=rest,
                options=TRAINED,
            )
        else:
            dcp_state.set_model_state_dict(model, tensors["model"], options=TRAINED)
        self.last_step = run["step"]
        path = folder / f"rank_{self._rank}.pt"
        return run, (_load_plain(path) if path.exists() else None)

    # ---------------------------------------------------------- among the ranks

    def _together(self, work: Callable[[], dict]) -> dict:
        """Do a part on every rank; its union on all, or what went wrong on any, on all."""
        error, outcome = None, {}
        try:
            outcome = work()
        except Exception as caught:  # whatever it is, the others must not wait for ever
            error, outcome = caught, f"rank {self._rank}: {caught or type(caught).__name__}"
        outcomes = all_gathered(outcome, self._group)
        for one in outcomes:
            if isinstance(one, str):
                raise OSError(one) from error
        return {key: value for one in outcomes for key, value in one.items()}

    def _on_rank_zero(self, work: Callable[[], Any]) -> Any:
        """Do it on rank 0; its result, or what went wrong, on all."""
        done = self._together(lambda: {"result": work()} if self._rank == 0 else {})
        return done["result"]


def read_run(folder: Path) -> dict[str, Any]:
    """What is the same on all ranks in a state, such as its step and config."""
    return _load_plain(folder / "run.pt")


def saved_states(parent: Path) -> list[Path]:
    """The complete ones in a folder, sound or damaged, in no order."""
    return [path for path in parent.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]


def step_of(folder: Path) -> int:
    """Optimizer steps done in a state, by its name."""
    return int(folder.name.removeprefix("step_"))


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _set_aside(folder: Path) -> None:
    """Keep a damaged state under a name that no start looks at."""
    aside, n = folder.with_name(f"{folder.name}.damaged"), 1
    while aside.exists():
        aside, n = folder.with_name(f"{folder.name}.damaged{n}"), n + 1
    folder.rename(aside)
    log.warning("The damaged %s is kept as %s", folder, aside.name)


def _drop(parent: Path, pattern: str) -> None:
    for folder in parent.glob("step_*"):
        if re.fullmatch(pattern, folder.name):
            shutil.rmtree(folder)


@contextmanager
def _one_sentence_for(partial: Path) -> Iterator[None]:
    """Say which state could not be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the training state {partial.with_suffix('')} could not be written ({error}). Earlier "
            "states are untouched: make room or repair the disk, and continue with "
            "resume_from_checkpoint=true"
        ) from error


def _save(value: dict, path: Path) -> None:
    with path.open("wb") as file, disk_errors():
        torch.save(value, file)
    sync(path)


def _load_plain(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} carries Python code or objects and was not opened: it is not of this package"
        ) from error


def _file_name(name: str) -> str:
    """A name from a file, which must not lead out of the folder."""
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not a file name")
    return name


# ------------------------------------------------------------- what DCP reads and writes


def _split(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Tensors of model and optimizer, each under a name of its own, and the optimizer's rest.

    An optimizer that has not stepped has nothing to save: DCP would step it to see what it will
    have, and Adam's count of steps would be one ahead.
    """
    if not optimizer.state:
        return {"model": dcp_state.get_model_state_dict(model, options=TRAINED)}, {}
    model_state, optimizer_state = dcp_state.get_state_dict(model, optimizer, options=TRAINED)
    states: Any = optimizer_state["state"]
    values = {f"{p}/{name}": value for p, one in states.items() for name, value in one.items()}
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {"values": {}, "param_groups": optimizer_state["param_groups"]}
    for name, value in values.items():
        if not torch.is_tensor(value):
            plain["values"][name] = value
        elif isinstance(value, DTensor) or not is_traceable_wrapper_subclass(value):
            tensors[name] = value
        else:  # a quantised one as the plain ones it is made of: DCP takes no others
            parts, _ = value.__tensor_flatten__()
            tensors |= {f"{name}.{part}": getattr(value, part) for part in parts}
    return {"model": model_state, "optimizer": tensors}, plain


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, which syncs its files, with the reason where a disk is full."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner):
        with disk_errors():
            return super().write_data(plan, planner)


class _TensorsOnly(dcp.DefaultLoadPlanner):
    """DCP unpickles anything that is no tensor without restriction; a state of ours has none."""

    def load_bytes(self, read_item, value) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is not a tensor")


_METADATA = "torch.distributed.checkpoint.metadata"
_METADATA_PARTS = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "TensorProperties")),
    *((_METADATA, name) for name in ("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what DCP's ``.metadata`` is made of and refuses anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _METADATA_PARTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no state holds")
        return super().find_class(module, name)


class _SafeReader(dcp.FileSystemReader):
    """DCP's reader, which would run the code of a pickle and follow names out of the folder."""

    def read_metadata(self, *args: Any, **kwargs: Any):
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            for info in metadata.storage_data.values():
                _file_name(info.relative_path)
        except Exception as error:  # whatever a damaged pickle raises
            raise ValueError(f"{path} was not opened: {error}") from error
        metadata.storage_meta.load_id = self.load_id
        return metadata
