"""Makes the model that a config names ready to train: precision, checkpointing, compile, shards."""

from typing import cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import config, training

from wmtp_modules.checkpoints.read import Checkpoint, check_model, load_into
from wmtp_modules.config.keys import Distilled, Lora
from wmtp_modules.config.rules import checkpointing_of, what_waits
from wmtp_modules.loss.distill import Distill
from wmtp_modules.models.checkpointing import checkpoint_blocks_
from wmtp_modules.models.float8 import float8_blocks_
from wmtp_modules.models.lora import ALL_LINEAR, LoRA
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.parallel.process_group import sharding_mesh
from wmtp_modules.parallel.sharding import (
    DTYPES,
    cast_parameters_,
    init_adapters_,
    init_weights_,
    shard_model,
)
from wmtp_modules.run.out_of_memory import explain_too_large


def checked_model_args(cfg: DictConfig) -> dict:
    """Arguments of the config's model, which fits its tokenizer, its rows and its checkpoint.

    Raises:
        ValueError: if it does not; found before anything is tokenised or loaded.
    """
    model = model_without_values(cfg)
    K, asked = model.n_future_tokens, [key for key in ("extra_heads", "distill") if cfg.get(key)]
    if K == 1 and asked and cfg.get(asked[0]) != "full":
        raise ValueError(
            f"{asked[0]}: the model has n_future_tokens 1, so there are no further heads to train: "
            f"set model.n_future_tokens to at least 2, or {asked[0]}: null"
        )
    folder = cfg.checkpointer.checkpoint_dir if cfg.checkpointer else None
    check_model(model.args, cfg.tokenizer.path, cfg.tokenizer.max_seq_len, folder)
    return model.args


def model_without_values(cfg: DictConfig) -> MTPTransformer:
    """The config's model on the meta device, with its adapters and with what is frozen so."""
    with torch.device("meta"):
        model = config.instantiate(cfg.model)
        if lora := lora_of(cfg):
            model.add_lora(lora, adapter_dtype=torch.float32)
    model.set_extra_heads(cfg.get("extra_heads") or "full")
    return model


def distill_of(cfg: DictConfig) -> Distill:
    """The config's distillation; of weight 0 if there is none."""
    if cfg.get("distill") is None:
        return Distill()
    block = Distilled(**cast(dict, OmegaConf.to_container(cfg.distill, resolve=True)))
    return Distill(**block.model_dump())


def lora_of(cfg: DictConfig) -> LoRA | None:
    """The config's adapters; None if the whole model trains."""
    if cfg.get("lora") is None:  # an empty block is one of defaults
        return None
    block = Lora(**cast(dict, OmegaConf.to_container(cfg.lora, resolve=True))).model_dump()
    targets = block.pop("targets")
    base = cfg.checkpointer.checkpoint_dir if cfg.checkpointer else None
    return LoRA(**block, targets=targets if targets == ALL_LINEAR else tuple(targets), base=base)


@explain_too_large()
def make_model(cfg: DictConfig, mesh: DeviceMesh, device: torch.device) -> MTPTransformer:
    """The model to train, sharded over the ranks and filled from its checkpoint; a collective.

    Masters stay fp32 and compute runs in ``dtype``: at a learning rate of 1e-5 most updates of a
    bf16 parameter round to nothing. Pure bf16 needs stochastic rounding to be of use. What does
    not train, under ``lora`` or ``extra_heads: only``, has no masters.

    Raises:
        ValueError: if the checkpoint does not hold this model, or memory does not.
    """
    compute_dtype = DTYPES[cfg.dtype]
    with torch.device("meta" if cfg.checkpointer else "cpu"):
        model = config.instantiate(cfg.model)
    if not cfg.checkpointer:  # from nothing: made whole, and equal on all ranks
        init_weights_(model, cfg.seed)
    master_dtype = torch.float32 if cfg.fp32_master_weights else compute_dtype
    lora, extra_heads = lora_of(cfg), cfg.get("extra_heads") or "full"
    cast_parameters_(model, compute_dtype if lora or extra_heads == "only" else master_dtype)
    if lora:
        model.add_lora(lora, adapter_dtype=master_dtype)
    if cfg.get("float8"):
        float8_blocks_(model, cfg.float8, device=device)
    model.set_extra_heads(extra_heads)
    model.distill = distill_of(cfg)
    if extra_heads == "only":
        cast_parameters_(model.heads[1:], master_dtype)
    if cfg.compile:
        # Before they are wrapped: packed rows on CUDA have a flex-attention mask, which breaks a
        # block's graph, and a break inside a checkpointed region makes all of it eager.
        for block in (*model.layers, *model.heads):
            block.compile()
        model.output.loss_impl = "compiled"
    how = checkpointing_of(cfg)  # auto where nothing was chosen, as in a replay
    checkpoint_blocks_(model, "full" if how == "auto" else how, compiled=cfg.compile)
    if cfg.fp32_master_weights:
        mesh = sharding_mesh(mesh, cfg.get("data_parallel_shard"))
        once = what_waits(cfg, mesh.size()) == "all" or cfg.get("reshard_after_forward") is False
        shard_model(model, mesh, compute_dtype=compute_dtype, gather_once=once)
    elif not cfg.checkpointer and device.type != "cpu":  # one rank, nothing to shard or to cast
        model.to(device)
    if cfg.checkpointer:
        load_into(model, cfg.checkpointer.checkpoint_dir, device=device)
    if lora:
        init_adapters_(model, cfg.seed)
    if extra_heads == "only" and cfg.checkpointer:
        start = Checkpoint(cfg.checkpointer.checkpoint_dir, model.n_future_tokens)
        model.read_frozen = start.read
    return model.train()


def make_optimizer(cfg: DictConfig, model: MTPTransformer) -> tuple[Optimizer, LRScheduler]:
    """The config's optimizer, and its rate: linear warm-up, then half a cosine down to 0."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = config.instantiate(cfg.optimizer, trained)
    schedule = training.get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=cfg.num_warmup_steps, num_training_steps=cfg.max_steps
    )
    return optimizer, schedule


@explain_too_large()
def frozen_model(cfg: DictConfig, device: torch.device) -> MTPTransformer:
    """The checkpoint's model, whole on each rank and in compute precision."""
    with torch.device("meta"):
        model = config.instantiate(cfg.model)
    cast_parameters_(model, DTYPES[cfg.dtype])
    load_into(model, cfg.checkpointer.checkpoint_dir, device=device)
    return model.eval().requires_grad_(False)
