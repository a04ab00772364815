"""Process group and FSDP2 sharding of the multi-token-prediction model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.run.stopping import Stopped, die_with_parent

# The process group's own time-outs name no rank, so the watchdog has this many seconds to speak.
WATCHDOG_FIRST_S = 60.0


def check_environment() -> None:
    """Look at what torchrun sets; by hand, or in a scheduler's script, it is easily mistyped.

    Raises:
        ValueError: if a variable is no number, or they do not fit together: torch would wait for a
            rank that never comes.
    """
    if "RANK" not in os.environ:
        return
    found = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ.get(name, "0" if name == "LOCAL_RANK" else "")
        if not value.isdecimal():
            raise ValueError(
                f"the environment variable {name} is {value!r}, not a whole number: start with "
                "tune run --nproc_per_node N, which sets it, or unset RANK to run one process"
            )
        found[name] = int(value)
    if not found["RANK"] < found["WORLD_SIZE"]:
        raise ValueError(
            f"the environment variable RANK is {found['RANK']}, which is not below WORLD_SIZE "
            f"{found['WORLD_SIZE']}: ranks count from 0"
        )
    if not 0 < found["MASTER_PORT"] < 2**16:
        raise ValueError(
            f"the environment variable MASTER_PORT is {found['MASTER_PORT']}, no port: take one "
            "from 1 to 65535 that is free"
        )


def init_process_group(
    device_type: str, timeout_s: float | None = None
) -> tuple[torch.device, DeviceMesh]:
    """Join torchrun's process group, or make one of a single process.

    ``tune run recipes/x.py`` without torchrun options starts the recipe with no RANK in its
    environment; the recipe still runs the same FSDP2 code, with one rank. A worker of torchrun
    ends with its launcher.

    Args:
        device_type: "cuda" or "cpu".
        timeout_s: the watchdog's time-out; a collective gives up a minute later. None: torch's
            defaults, 30 minutes on CPU and 10 on GPU.

    Returns:
        This rank's device and the one-dimensional data-parallel mesh.

    Raises:
        ValueError: if the device is not there.
    """
    if device_type not in ("cuda", "cpu"):
        raise ValueError(f"device {device_type!r} is not cuda or cpu")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda but torch sees no GPU: set device=cpu or check the driver")
    backend = "nccl" if device_type == "cuda" else "gloo"
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s + WATCHDOG_FIRST_S)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # before joining, which fails where the launcher has ended already
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    return device, init_device_mesh(device_type, (dist.get_world_size(),))


def shard_model(
    model: MTPTransformer, mesh: DeviceMesh, *, compute_dtype: torch.dtype
) -> MTPTransformer:
    """Shard each trunk block, each head, the output and the embedding as one FSDP2 unit each.

    A value head, if there is one, is another unit, which stays fp32.

    The heads and the output come last in the forward and first in the backward, so they stay
    gathered between the two; only trunk blocks are gathered twice. A step without accumulation
    takes units + trunk blocks all-gathers and one reduce-scatter per unit.

    Gradients are reduced in fp32. Inputs are not cast: the embedding makes activations in
    ``compute_dtype`` already, and a cast would round fp32 token weights to bf16.

    Args:
        model: the model, on its device or on meta.
        mesh: one-dimensional data-parallel mesh.
        compute_dtype: dtype of the gathered parameters; the sharded ones keep theirs.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if model.value_head is not None:  # before the root: gradients of what comes later are lost
        exact = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(model.value_head, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
    for unit in (*model.heads, model.output, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def all_reduce_sum(*values: torch.Tensor) -> list[torch.Tensor]:
    """Sum each tensor over ranks, all in one fp64 collective."""
    flat = torch.cat([value.detach().double().reshape(-1) for value in values])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


def init_weights_(model: nn.Module, seed: int) -> None:
    """Fill a model that starts from nothing: normal(0, 0.02), norms 1, equal on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".scale"):
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02, generator=generator)


def cast_parameters_(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of parameters only: ``model.to`` would round the RoPE tables as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@cache
def _patient_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """One for each process group that is set up; the argument is what the cache goes by."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=2))


def patient_barrier() -> None:
    """Wait for all ranks, however long one of them tokenises or scores.

    The ordinary group's time-out (10 minutes with NCCL) is meant for a hung step.
    """
    dist.barrier(group=_patient_group(dist.group.WORLD))


def share_from_rank_zero(value: Any) -> Any:
    """What rank 0 has, on all ranks, however long it took there."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_patient_group(dist.group.WORLD))
    return values[0]


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block on rank 0, then on the others, which find what it has cached."""
    if dist.get_rank() != 0:
        patient_barrier()
    try:
        yield
    except Stopped:
        raise  # the others stop as well, and may have left
    except BaseException:
        if dist.get_rank() == 0:
            patient_barrier()
        raise
    if dist.get_rank() == 0:
        patient_barrier()
