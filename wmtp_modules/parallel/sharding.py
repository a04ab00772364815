"""Shards the multi-token-prediction model with FSDP2, and fills or casts its parameters."""

import math

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchtune.modules import RMSNorm
from torchtune.modules.peft import LoRALinear

from wmtp_modules.config.rules import Waits
from wmtp_modules.models.lora import nf4_parameters
from wmtp_modules.models.mtp_transformer import MTPTransformer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # a config's names


def shard_model(
    model: MTPTransformer,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    gather_once: bool = False,
) -> MTPTransformer:
    """Shard each trunk block, each head, the output and the embedding as one FSDP2 unit each.

    The heads and the output come last in the forward and first in the backward, so they stay
    gathered between the two; only trunk blocks are gathered twice. A step without accumulation
    takes units + trunk blocks all-gathers and one reduce-scatter per unit.

    Gradients are reduced in fp32. Inputs are not cast: the embedding already makes activations in
    ``compute_dtype``, and a cast would round fp32 token weights to bf16.

    NF4 weights stay whole on every rank: 4.1 bits a parameter are less than gathering them twice
    a step is worth.

    Args:
        mesh: of one dimension, or of two: (replicas, shards), see ``sharding_mesh``.
        compute_dtype: of the gathered parameters; the sharded ones keep theirs.
        gather_once: trunk blocks stay gathered as well until their backward: as many all-gathers
            as units. ``sync_gradients_`` needs it for ``all``.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    how = {"mesh": mesh, "mp_policy": policy, "ignored_params": nf4_parameters(model)}
    for block in model.layers:
        fully_shard(block, **how, reshard_after_forward=not gather_once)
    for unit in (*model.heads, model.output, model):
        fully_shard(unit, **how, reshard_after_forward=False)
    return model


def sync_gradients_(model: nn.Module, waits: Waits, now: bool) -> None:
    """Whether the next backward sends gradients to other nodes; before the last one of a step.

    ``replicas``: each backward adds up over its shards, and only the sum over replicas waits for
    the last one, which takes no memory. ``all``: gradients wait whole, in fp32, and parameters stay
    gathered, so that both cross the network once a step. That takes 4 bytes per parameter and those
    of its compute dtype, on every rank; the model was sharded with ``gather_once``.
    """
    if not isinstance(model, FSDPModule):  # one rank without fp32 masters
        return
    if waits == "replicas":
        model.set_requires_all_reduce(now)
    elif waits == "all":
        model.set_requires_gradient_sync(now)
        model.set_reshard_after_backward(now)


def init_weights_(model: nn.Module, seed: int) -> None:
    """Fill a model that starts from nothing as PyTorch's modules do, equal on every rank.

    A fixed deviation such as 0.02 suits a width of thousands. For one of a hundred it is a third of
    PyTorch's 1 / sqrt(3 width), and what a model learns in a few hundred steps suffers.
    TypeError if a module has parameters that nothing here fills.
    """
    with torch.random.fork_rng(devices=[]):  # parameters are on the CPU
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.reset_parameters()
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.scale)
            elif next(module.parameters(recurse=False), None) is not None:
                raise TypeError(f"{type(module).__name__} has no initial values here")


def cast_parameters_(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of parameters only: ``model.to`` would round the RoPE tables as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def init_adapters_(model: nn.Module, seed: int) -> None:
    """Fill LoRA's A as torchtune does and B with zeros, the same for any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            whole = torch.empty(module.rank, module.in_dim)
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            rows, start = local_rows(module.lora_a.weight)
            rows.copy_(whole[start : start + len(rows)])
            local_rows(module.lora_b.weight)[0].zero_()


def local_rows(parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a parameter, and the number of the first: all of a plain one's."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    local = parameter.to_local()
    with unset_fake_temporarily():  # it computes with tensors, also in a memory estimate
        _, offsets = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    assert local.shape[1:] == parameter.shape[1:], "sharded along another dimension"
    return local, offsets[0]
