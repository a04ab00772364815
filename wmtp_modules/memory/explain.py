"""Telling that memory ran out, and what to do about it.

Estimates are made by ``wmtp_modules.estimate_memory`` in a process of its own: this one has just
run out of memory, and its process group is the real one.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from wmtp_modules.run.figures import TrainingError, peak_memory_gib

COMMAND = "python -m wmtp_modules.estimate_memory"
ESTIMATE_SECONDS = 300  # a 7B model's take one or two minutes
SHOWN = 3  # settings in one message

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

    Args:
        cfg: config of a recipe that trains.
        ranks: size of the process group.

    Returns:
        By how it is written, what to merge into the config and the number of ranks.
    """
    found = {}
    if not cfg.enable_activation_checkpointing:
        change = {"enable_activation_checkpointing": True}
        found["enable_activation_checkpointing=true"] = (change, ranks)
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
    if cfg.fp32_master_weights:  # without them there is one rank
        found[f"{2 * ranks} ranks"] = ({}, 2 * ranks)
    return found


def out_of_memory_sentence(
    cfg: DictConfig, model_args: dict, *, ranks: int, peak_gib: float
) -> str:
    """What to tell the user of a run that ran out of memory. Takes a minute or two at 7B.

    Args:
        cfg: the run's config, checked.
        model_args: ``MTPTransformer.args`` of the model.
        ranks: size of the process group.
        peak_gib: peak of this rank's memory so far, GiB.

    Returns:
        The step's shapes, the peak and the settings that help, each with its estimated peak; if no
        estimate can be made, the settings and why.
    """
    said = (
        f"out of memory in a step of {cfg.batch_size} rows x {cfg.tokenizer.max_seq_len} tokens x "
        f"{model_args['n_future_tokens']} heads on each of {ranks} ranks (vocabulary "
        f"{model_args['vocab_size']}, {cfg.dtype}); the peak so far is {peak_gib:.1f} GiB"
    )
    config_file = Path(cfg.output_dir) / "config.yaml"
    command = f"`{COMMAND} --config {config_file} --ranks {ranks} key=value` predicts others"
    try:
        found = _estimates(cfg, ranks)
    except Exception as error:  # whatever is wrong with an estimate, memory is what the user needs
        reason = " ".join(str(error).split()) or type(error).__name__
        settings = "; ".join(list(helpful_settings(cfg, ranks))[:SHOWN])
        return f"{said}. What helps: {settings} (no estimates: {reason}). {command}"
    settings = "; ".join(f"{name} ({gib:.1f} GiB)" for name, gib in found["helps"].items())
    settings = settings or "a smaller model"
    now = f"the estimate for this config is {found['peak_gib']:.1f} GiB"
    return f"{said}, {now}. What helps most: {settings}. {command}"


@contextmanager
def explain_out_of_memory(
    cfg: DictConfig, model_args: dict, *, ranks: int, device: torch.device
) -> Iterator[None]:
    """Turn running out of memory into a sentence; see ``out_of_memory_sentence``.

    Raises:
        TrainingError: where the block ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        peak = peak_memory_gib(device)
        sentence = out_of_memory_sentence(cfg, model_args, ranks=ranks, peak_gib=peak)
        raise TrainingError(sentence) from error


def _estimates(cfg: DictConfig, ranks: int) -> dict:
    """What the command prints for this config. Without a GPU: there is no memory left on it."""
    command = [sys.executable, "-m", "wmtp_modules.estimate_memory", "--config", "/dev/stdin"]
    run = subprocess.run(
        [*command, "--ranks", str(ranks), "--json"],
        input=OmegaConf.to_yaml(cfg),
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=ESTIMATE_SECONDS,
    )
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or [f"exit code {run.returncode}"]
        raise ValueError(last[0])
    return json.loads(run.stdout.splitlines()[-1])
