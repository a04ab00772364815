"""Joins the process group; sums, shares and waits over its ranks; ends with its launcher."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wmtp_modules.config.rules import shards_of

# The process group's own time-outs name no rank, so the watchdog has this many seconds to speak.
WATCHDOG_FIRST_S = 60.0
PR_SET_PDEATHSIG = 1  # prctl(2)


def check_environment() -> None:
    """Check what torchrun sets, which is easily mistyped by hand or in a scheduler's script.

    Raises:
        ValueError: if a variable is not a number, or they do not fit together: torch would wait for
            a rank that never comes.
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
            f"the environment variable MASTER_PORT is {found['MASTER_PORT']}, not a port: "
            "take a free one from 1 to 65535"
        )


def local_device(device_type: str) -> torch.device:
    """This rank's "cuda" or "cpu" device; ValueError if it is not there."""
    if device_type not in ("cuda", "cpu"):
        raise ValueError(f"device {device_type!r} is not cuda or cpu")
    if device_type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device is cuda but torch sees no GPU: set device=cpu or check the driver")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def init_process_group(
    device_type: str, timeout_s: float | None = None
) -> tuple[torch.device, DeviceMesh]:
    """Join torchrun's process group, or make one of a single process.

    ``tune run recipes/x.py`` without torchrun options sets no RANK; the recipe then runs the same
    FSDP2 code with one rank. A worker of torchrun ends with its launcher.

    Args:
        device_type: "cuda" or "cpu".
        timeout_s: the watchdog's; a collective gives up a minute later. None: torch's defaults.

    Returns:
        This rank's device and the one-dimensional data-parallel mesh.

    Raises:
        ValueError: if the device is not there.
    """
    device = local_device(device_type)
    backend = "nccl" if device_type == "cuda" else "gloo"
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s + WATCHDOG_FIRST_S)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # before joining, which fails where the launcher has ended already
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    return device, init_device_mesh(device_type, (dist.get_world_size(),))


def sharding_mesh(mesh: DeviceMesh, data_parallel_shard: int | None) -> DeviceMesh:
    """The mesh that a model is sharded over; a collective the first time.

    Args:
        mesh: one-dimensional, of all ranks.
        data_parallel_shard: as for ``shards_of``. Torchrun numbers ranks node by node, so that as
            many as a node has share one model, and each node holds a replica.

    Returns:
        The same where a model is sharded over all ranks, else one of (replicas, shards).
    """
    shards = shards_of(data_parallel_shard, mesh.size())
    if shards == mesh.size():
        return mesh
    return _hybrid_mesh(dist.group.WORLD, mesh.device_type, shards)


@cache
def _hybrid_mesh(world: dist.ProcessGroup, device_type: str, shards: int) -> DeviceMesh:
    """One per process group, whose time-out its groups get: torch gives them its default."""
    shape = dist.get_world_size() // shards, shards
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicas", "shards"))
    options: Any = world._get_backend(torch.device(device_type)).options
    for group in mesh.get_all_groups() if options else ():  # the memory estimator's moves nothing
        distributed_c10d._set_pg_timeout(options._timeout, group)
    return mesh


def die_with_parent() -> None:
    """Have this process sent SIGTERM when its parent ends, whatever ended that; Linux only.

    A launcher that is killed with -9 passes nothing on to its workers. A parent that ended before
    is not noticed: joining the process group then fails, as its store was the launcher's.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it ended meanwhile
        os.kill(os.getpid(), signal.SIGTERM)


def all_reduce_sum(*values: torch.Tensor) -> list[torch.Tensor]:
    """Sum each tensor over ranks, all in one fp64 collective."""
    flat = torch.cat([value.detach().double().reshape(-1) for value in values])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


def all_gathered(value: Any, group: Any = None) -> list:
    """What each rank has, by rank; a collective of the world or of ``group``."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


@cache
def _patient_group(world: dist.ProcessGroup | None) -> Any:
    """One per process group; the argument is the key of the cache."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=2))


def patient_barrier() -> None:
    """Wait for all ranks, however long one of them tokenises or scores.

    The ordinary group's time-out (10 minutes with NCCL) is meant for a hung step.
    """
    dist.barrier(group=_patient_group(dist.group.WORLD))


def patiently_gathered(value: Any) -> list:
    """As ``all_gathered``, however long one of the ranks takes."""
    return all_gathered(value, _patient_group(dist.group.WORLD))


def share_from_rank_zero(value: Any) -> Any:
    """What rank 0 has, on all ranks, however long it took there."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_patient_group(dist.group.WORLD))
    return values[0]


def n_hosts() -> int:
    """Hosts of the run, as torchrun has started it: as many ranks on each."""
    world = dist.get_world_size()
    return -(-world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))


def is_first_of_host() -> bool:
    """Whether this rank is the first one of its host."""
    return int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block on rank 0, then on the others, which find what it has cached.

    Of other hosts the first rank comes before the rest, as their cache may be another one.
    """
    turns = 2 if n_hosts() == 1 else 3
    turn = 0 if dist.get_rank() == 0 else 1 if turns == 3 and is_first_of_host() else turns - 1
    for _ in range(turn):
        patient_barrier()
    try:
        yield
    except (Exception, SystemExit):  # not when asked to stop: the others stop as well, or have left
        for _ in range(turn, turns - 1):
            patient_barrier()
        raise
    for _ in range(turn, turns - 1):
        patient_barrier()
