"""Checks that a saved state belongs to this run, and restores schedule and random state."""

import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.optim.lr_scheduler import LRScheduler
from torchtune.training.metric_logging import flatten_dict

from wmtp_modules.config.secrets import without_secrets
from wmtp_modules.run.storing import as_named
from wmtp_modules.run.training_state import read_run, saved_states, step_of

# What may change when a run continues: where it lies, its length, and what does not touch its sums.
FREE_KEYS = (
    *("output_dir", "resume_from_checkpoint", "max_steps", "run_val_every_n_steps", "replay"),
    *("save_every_n_steps", "keep_last", "log_every_n_steps", "metric_logger", "tracking"),
    "registry",
    *("max_hours", "collective_timeout_s", "max_skipped_steps", "controls", "requires", "prepare"),
    "storage",  # where this machine keeps its copies
    "control",  # what it changes stands in the keys themselves
    *("profiler", "compile", "allow_uninformative_critic"),
    *("activation_checkpointing", "enable_activation_checkpointing"),
    # Only their product with the number of ranks counts, see ``check_same_run``.
    *("batch_size", "gradient_accumulation_steps"),
    *("dataloader_workers", "reshard_after_forward"),
    *("data_parallel_shard", "sync_each_batch"),  # a state has whole parameters, however sharded
)
# Keys of earlier versions, which had no effect while they were off.
REMOVED_KEYS = ("auxiliary_value_coef", "auxiliary_value_lr")
# Where tables and critics lie: what is in them is proven when they are opened.
FREE_PATHS = ("table_dir", "batch_tokens", "critic.checkpoint_dir", "lora.save_adapter_only")


def resolved(cfg: DictConfig) -> dict:
    """The config as plain values."""
    return cast(dict, OmegaConf.to_container(cfg, resolve=True))


def kept(cfg: DictConfig) -> dict:
    """The same without secrets, stores by their URLs, for what a run writes."""
    return without_secrets(as_named(resolved(cfg)))


def packs_per_step(config: dict | DictConfig, world: int) -> int:
    return world * config["batch_size"] * config["gradient_accumulation_steps"]


def check_same_run(folder: Path, cfg: DictConfig, world: int) -> dict[str, Any]:
    """The run's part of a state, if it is of this run but for what may change (``FREE_KEYS``).

    Another number of ranks is the same run if a step sees as many packs as before.

    Raises:
        ValueError: if another key differs, more steps are done than the run should have, or a step
            would see another number of packs.
    """
    run = read_run(folder)
    free = {*FREE_KEYS, *(key for key in REMOVED_KEYS if not run["config"].get(key))}
    before, now = (
        flatten_dict({key: value for key, value in one.items() if key not in free})
        for one in (without_secrets(run["config"]), kept(cfg))
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
    packs_before, packs = packs_per_step(run["config"], run["world"]), packs_per_step(cfg, world)
    if packs_before != packs:
        raise ValueError(
            f"{folder} was written with {packs_before} packs in a step, and {world} ranks x "
            f"batch_size {cfg.batch_size} x gradient_accumulation_steps "
            f"{cfg.gradient_accumulation_steps} are {packs}: choose them so that it stays "
            f"{packs_before}"
        )
    if run["step"] > cfg.max_steps:
        raise ValueError(
            f"{folder} has {run['step']} steps done, more than max_steps {cfg.max_steps}: raise it"
        )
    return run


def check_packing(folder: Path, run: dict[str, Any], packing: str) -> None:
    """ValueError if the rows of the state's epoch are packed otherwise now, see ``PackedDataset``.

    Its position in the data would be another one: some rows would come again, others not at all.
    """
    if run.get("packing") != packing:
        raise ValueError(
            f"{folder} was saved by a version that packs rows in another way, so its place in the "
            "data is not known here: continue it with that version, or start another run with "
            "resume_from_checkpoint: false and another output_dir"
        )


def notes_on_resume(
    run: dict[str, Any], cfg: DictConfig, world: int, epoch_packs: int
) -> list[str]:
    """What a user should know when ranks share the (about) ``epoch_packs`` packs otherwise."""
    notes = []
    if run["world"] != world:
        notes.append(
            f"It was saved by {run['world']} ranks and continues with {world}: the packs come in "
            "the same order, random states begin anew"
        )
    before, now = run["world"] * run["config"]["batch_size"], world * cfg.batch_size
    if before != now:
        note = f"Joint micro-batches have {now} packs, before {before}: "
        if cfg.weighting.name == "uniform":
            note += "uniform weights do not depend on that"
        else:
            note += (
                f"the weights of {cfg.weighting.name} do, so losses differ from those of an "
                "uninterrupted run. Keep ranks x batch_size to have the same"
            )
        if epoch_packs < packs_per_step(cfg, world):
            note += ". An epoch is shorter than a step and now ends at another pack"
        notes.append(note)
    return notes


def note_on_length(before: dict, cfg: DictConfig, old_lr: float, new_lr: float) -> list[str]:
    """What becomes of the schedule of a run that continues with another ``max_steps``."""
    if before["max_steps"] == cfg.max_steps:
        return []
    is_shorter = cfg.max_steps < before["max_steps"]
    return [
        f"max_steps was {before['max_steps']} and is {cfg.max_steps}: the run gets "
        f"{'shorter' if is_shorter else 'longer'}, its schedule ends at the new last step, and the "
        f"learning rate goes on at {new_lr:.3g} instead of {old_lr:.3g}"
    ]


def check_not_begun(output_dir: Path) -> None:
    """ValueError if starting over would delete an interrupted run."""
    parent = output_dir / "training_state"
    if saved_states(parent) and not (output_dir / "summary.json").exists():
        steps = max(map(step_of, saved_states(parent)))
        raise ValueError(
            f"{output_dir} holds a run that was interrupted after step {steps} or later: set "
            "resume_from_checkpoint=true to continue it, take another output_dir, or delete "
            f"{parent} to start over"
        )


def check_not_ended(output_dir: Path) -> None:
    """ValueError if starting without a training state would delete a complete run."""
    summary = output_dir / "summary.json"
    if summary.exists():
        raise ValueError(
            f"{output_dir} holds a run that is complete, under another config or on other data, "
            "and no training state to continue from: take another output_dir, or delete "
            f"{summary} to start over"
        )


def resume_schedule_(scheduler: LRScheduler, state: dict) -> None:
    """Continue at the saved step with the new schedule's rate, as its end may have moved."""
    scheduler.load_state_dict(state)
    scheduler.last_epoch -= 1
    scheduler.step()


def random_state(device: torch.device) -> dict[str, Any]:
    """States of the generators of Python, NumPy and torch, on the CPU and on a GPU."""
    name, keys, *numbers = cast(tuple, np.random.get_state())
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *numbers),
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    name, keys, *numbers = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *numbers))
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
