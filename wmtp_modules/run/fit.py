"""Chooses what `activation_checkpointing: auto` is on this machine."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torchtune.utils import get_logger, log_rank_zero

from wmtp_modules.config.file import merged
from wmtp_modules.config.rules import checkpointing_of, set_checkpointing
from wmtp_modules.config.secrets import without_secrets
from wmtp_modules.parallel.process_group import share_from_rank_zero
from wmtp_modules.run.resume import resolved

log = get_logger("INFO")

_chosen: dict[str, str] = {}  # by what is asked: a run and its controls ask the same


def fitted(cfg: DictConfig, recipe: str, device: torch.device) -> DictConfig:
    """The config with ``auto`` replaced by the lightest that fits; a collective.

    ``recipe`` is the file whose own step is estimated, by ``wmtp_modules.estimate_memory`` in a
    process of its own, while the other ranks wait. Where the estimate fails it is ``full``.
    """
    if checkpointing_of(cfg) != "auto":
        return cfg
    how = share_from_rank_zero(_choose(cfg, recipe, device) if dist.get_rank() == 0 else None)
    return merged(cfg, set_checkpointing(how))


def memory_gib(device: torch.device) -> float:
    """All of a rank's memory: a GPU's, or its share of this machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    of_machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return of_machine / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / 2**30


def _choose(cfg: DictConfig, recipe: str, device: torch.device) -> str:
    plain = without_secrets(resolved(cfg)) | {"controls": None, "output_dir": "."}
    gib = memory_gib(device)
    asked = json.dumps([plain, gib], default=str)
    if asked in _chosen:
        return _chosen[asked]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        OmegaConf.save(OmegaConf.create(plain), file)
        command = [sys.executable, "-m", "wmtp_modules.estimate_memory", "--json"]
        command += ["--config", file, "--recipe", recipe, "--fit", gib]
        command += ["--ranks", dist.get_world_size()]
        # What a launcher has told this rank is not for a process that has none.
        own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run([*map(str, command)], env=own, capture_output=True, text=True)
    try:
        said = json.loads(done.stdout)
    except ValueError:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        log_rank_zero(log, f"activation_checkpointing: full, since no estimate was made: {why}")
        return "full"
    how = _chosen[asked] = said["activation_checkpointing"]
    peaks = ", ".join(f"{name} {peak:.1f}" for name, peak in said["peaks_gib"].items())
    log_rank_zero(
        log,
        f"activation_checkpointing: {how}, the lightest with a tenth of {gib:.1f} GiB to spare "
        f"(predicted peaks in GiB: {peaks})",
    )
    return how
