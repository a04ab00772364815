"""What a run needs to go on: sharded model and optimizer, and each rank's own position.

A state is a folder ``step_000123`` made by ``torch.distributed.checkpoint``; beside its shards
each rank keeps its data position and random state. It is written under a temporary name and
renamed when all ranks are done.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from wmtp_modules.training.distributed import patient_barrier


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
        for older in parent.iterdir():
            if older != final:
                shutil.rmtree(older)
    patient_barrier()
    return final


def newest_training_state(parent: Path) -> Path | None:
    """The complete state with the most steps below ``parent``, or None."""
    return max((p for p in parent.glob("step_*") if p.suffix != ".partial"), default=None)


def load_training_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Fill model and optimizer in place and return this rank's part.

    Raises:
        ValueError: if the state was written by another number of ranks.
    """
    own_file = folder / f"rank_{dist.get_rank()}.pt"
    saved_world = len(list(folder.glob("rank_*.pt")))
    if saved_world != dist.get_world_size():
        raise ValueError(
            f"{folder} was written by {saved_world} ranks and cannot be resumed by "
            f"{dist.get_world_size()}: start as many"
        )
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return torch.load(own_file, weights_only=True)
