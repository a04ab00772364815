"""Says that memory ran out in a training step, and which settings need less."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig

from wmtp_modules.config.rules import checkpointing_of, set_checkpointing, shards_of, what_waits
from wmtp_modules.run.figures import TrainingError, peak_memory_gib

COMMAND = "python -m wmtp_modules.estimate_memory"

# What a RuntimeError says that is one of these but not a class of its own.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",  # outside the caching allocator: a context, NCCL's buffers
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's or this machine's memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def helpful_settings(cfg: DictConfig, ranks: int) -> dict[str, tuple[dict, int]]:
    """Settings that need less memory for the same tokens in a step, where they are not set yet.

    Returns:
        By how it is written, what to merge into the config and the number of ranks.
    """
    found: dict[str, tuple[dict, int]] = {}
    order = ("auto", "none", "selective", "full")  # what is auto may be none
    for how in order[1 + max(1, order.index(checkpointing_of(cfg))) :]:
        found[f"activation_checkpointing={how}"] = (set_checkpointing(how), ranks)
    if cfg.batch_size > 1:
        half = cfg.batch_size // 2
        steps = math.ceil(cfg.gradient_accumulation_steps * cfg.batch_size / half)
        change = {"batch_size": half, "gradient_accumulation_steps": steps}
        found[f"batch_size={half} gradient_accumulation_steps={steps}"] = (change, ranks)
    if cfg.tokenizer.max_seq_len >= 4:
        half = cfg.tokenizer.max_seq_len // 2
        found[f"tokenizer.max_seq_len={half}"] = ({"tokenizer": {"max_seq_len": half}}, ranks)
    if cfg.get("reference") and cfg.reference.mode == "online":
        found["reference.mode=cached"] = ({"reference": {"mode": "cached"}}, ranks)
    if cfg.get("lora") is not None and not cfg.lora.get("quantize_base"):
        found["lora.quantize_base=true"] = ({"lora": {"quantize_base": True}}, ranks)
    if what_waits(cfg, ranks) == "all":
        found["sync_each_batch=true"] = ({"sync_each_batch": True}, ranks)
    elif cfg.get("reshard_after_forward") is False and ranks > 1:
        found["reshard_after_forward=true"] = ({"reshard_after_forward": True}, ranks)
    if shards_of(cfg.get("data_parallel_shard"), ranks) < ranks:
        found["data_parallel_shard=null"] = ({"data_parallel_shard": None}, ranks)
    elif cfg.fp32_master_weights:  # without them there is one rank
        found[f"{2 * ranks} ranks"] = ({}, 2 * ranks)
    return found


def out_of_memory_sentence(
    cfg: DictConfig, model_args: dict, *, ranks: int, peak_gib: float
) -> str:
    """The step's shapes, the peak, settings that need less, and the command that estimates them."""
    settings = "; ".join(helpful_settings(cfg, ranks)) or "a smaller model"
    config_file = Path(cfg.output_dir) / "config.yaml"
    return (
        f"out of memory in a step of {cfg.batch_size} rows x {cfg.tokenizer.max_seq_len} tokens x "
        f"{model_args['n_future_tokens']} heads on each of {ranks} ranks (vocabulary "
        f"{model_args['vocab_size']}, {cfg.dtype}); the peak so far is {peak_gib:.1f} GiB. What "
        f"needs less: {settings}. `{COMMAND} --config {config_file} --ranks {ranks}` predicts the "
        "peak of each, and of others with key=value"
    )


@contextmanager
def explain_out_of_memory(
    cfg: DictConfig, model_args: dict, device: torch.device
) -> Iterator[None]:
    """Raise TrainingError with ``out_of_memory_sentence`` where the block runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        peak, ranks = peak_memory_gib(device), dist.get_world_size()
        sentence = out_of_memory_sentence(cfg, model_args, ranks=ranks, peak_gib=peak)
        raise TrainingError(sentence) from error


@contextmanager
def explain_too_large() -> Iterator[None]:
    """Raise ValueError where memory runs out while a model is made; a decorator as well."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            "out of memory while the model was made, before any step: take a smaller `model`, more "
            f"ranks, or a larger machine; `{COMMAND}` says what a config needs"
        ) from error
