"""What a run needs to go on: sharded model and optimizer, and each rank's own position.

A state is a folder ``step_000123`` made by ``torch.distributed.checkpoint``; beside its shards
each rank keeps its data position and random state. It is written under a temporary name and
renamed when all ranks are done.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LRScheduler
from torchtune.training.metric_logging import flatten_dict

from wmtp_modules.training.distributed import patient_barrier

# What may change when a run goes on: where it lies, its length, and what does not touch its sums.
FREE_KEYS = (
    *("output_dir", "resume_from_checkpoint", "max_steps", "run_val_every_n_steps"),
    *("save_every_n_steps", "log_every_n_steps", "metric_logger", "profiler", "controls"),
    *("requires", "prepare", "compile", "enable_activation_checkpointing"),
    "allow_uninformative_critic",
)
# Where tables and critics lie: what is in them is proven when they are opened.
FREE_PATHS = ("table_dir", "batch_tokens", "critic.checkpoint_dir")


def save_training_state(
    parent: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, own: dict[str, Any]
) -> Path:
    """Write ``parent/step_<step>`` on all ranks together and drop older states.

    Args:
        parent: folder of a run's states.
        step: optimizer steps done.
        model: sharded model.
        optimizer: its optimizer.
        own: this rank's part: plain values and tensors.
    """
    rank = dist.get_rank()
    final = parent / f"step_{step:06d}"
    partial = parent / f"step_{step:06d}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    patient_barrier()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial)
    torch.save(own, partial / f"rank_{rank}.pt")
    patient_barrier()
    if rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        drop_training_states(parent, keep=final)
    patient_barrier()
    return final


def drop_training_states(parent: Path, keep: Path | None = None) -> None:
    """Delete the states below ``parent``, half-written ones too, and nothing else there."""
    for folder in parent.glob("step_*"):
        if folder != keep and re.fullmatch(r"step_\d+(\.partial)?", folder.name):
            shutil.rmtree(folder)


def newest_training_state(parent: Path) -> Path | None:
    """The complete state with the most steps below ``parent``, or None."""
    complete = [p for p in parent.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return max(complete, key=lambda p: int(p.name.removeprefix("step_")), default=None)


def load_training_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Fill model and optimizer in place and return this rank's part.

    Raises:
        ValueError: if the state was written by another number of ranks.
    """
    own = _own_part(folder)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return own


def _own_part(folder: Path) -> dict[str, Any]:
    """What this rank put into a state."""
    saved_world = len(list(folder.glob("rank_*.pt")))
    if saved_world != dist.get_world_size():
        raise ValueError(
            f"{folder} was written by {saved_world} ranks and cannot be resumed by "
            f"{dist.get_world_size()}: start as many"
        )
    return torch.load(folder / f"rank_{dist.get_rank()}.pt", weights_only=True)


def resolved(cfg: DictConfig) -> dict:
    """The config as plain values, to keep in a state and to compare with."""
    return OmegaConf.to_container(cfg, resolve=True)


def check_same_run(folder: Path, cfg: DictConfig) -> None:
    """Make sure that a state is of this very run, but for what may change (``FREE_KEYS``).

    Args:
        folder: a state whose own parts hold ``step`` and the ``resolved`` ``config``.
        cfg: config of the run that goes on.

    Raises:
        ValueError: if another key differs, more steps are done than the run shall have, or the
            number of ranks is another.
    """
    own = _own_part(folder)
    before, now = (
        flatten_dict({key: value for key, value in one.items() if key not in FREE_KEYS})
        for one in (own["config"], resolved(cfg))
    )
    differences = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.endswith(FREE_PATHS)
    ]
    if differences:
        raise ValueError(
            f"{folder} was written under another config ({'; '.join(differences)}): set these "
            "back, or start another run with resume_from_checkpoint: false and another output_dir"
        )
    if own["step"] > cfg.max_steps:
        raise ValueError(
            f"{folder} has {own['step']} steps done, more than max_steps {cfg.max_steps}: raise it"
        )


def resume_schedule_(scheduler: LRScheduler, state: dict) -> None:
    """Go on in a schedule at the saved step, with the rates that this schedule has there.

    The saved ones are those of the schedule it was: 0 at its end, which may have moved.
    """
    scheduler.load_state_dict(state)
    scheduler.last_epoch -= 1
    scheduler.step()


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of the generators that dropout and the like draw from on a device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put the generators where ``random_state`` found them."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
