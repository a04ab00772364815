"""Shards the multi-token-prediction model with FSDP2, and fills or casts its parameters."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from wmtp_modules.models.mtp_transformer import MTPTransformer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # a config's names


def shard_model(
    model: MTPTransformer, mesh: DeviceMesh, *, compute_dtype: torch.dtype
) -> MTPTransformer:
    """Shard each trunk block, each head, the output and the embedding as one FSDP2 unit each.

    The heads and the output come last in the forward and first in the backward, so they stay
    gathered between the two; only trunk blocks are gathered twice. A step without accumulation
    takes units + trunk blocks all-gathers and one reduce-scatter per unit.

    Gradients are reduced in fp32. Inputs are not cast: the embedding already makes activations in
    ``compute_dtype``, and a cast would round fp32 token weights to bf16.

    Args:
        compute_dtype: of the gathered parameters; the sharded ones keep theirs.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for unit in (*model.heads, model.output, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


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
