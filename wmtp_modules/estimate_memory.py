"""Predict the peak memory of a training config without running it.

    uv run python -m wmtp_modules.estimate_memory --config configs/rho1/7b.yaml --ranks 8

Needs no GPU, no checkpoint and no data.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.config.check import (
    Above,
    AtLeast,
    Component,
    ConfigError,
    Optional,
    check_config,
)
from wmtp_modules.config.file import load_config, read_config
from wmtp_modules.memory.explain import SHOWN, helpful_settings
from wmtp_modules.memory.step import Estimate, estimate_step, estimate_trunk
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.weighting.advantage import CriticWeighting
from wmtp_modules.weighting.token_weighting import TokenWeighting

GIB, MIB = 2**30, 2**20

# What memory depends on. A recipe's config has more keys, and a copy of a recipe its own.
SCHEMA = {
    "device": ("cuda", "cpu"),
    "dtype": ("bf16", "fp32"),
    "fp32_master_weights": bool,
    "seed": AtLeast(int, 0),
    "model": Component(makes=MTPTransformer),
    "tokenizer": Component(
        keys={"path": str, "max_seq_len": AtLeast(int, 2)}, makes=Llama2Tokenizer
    ),
    "batch_size": AtLeast(int, 1),
    "gradient_accumulation_steps": AtLeast(int, 1),
    "weighting": TokenWeighting,
    "reference": Optional(
        {
            "mode": ("cached", "online"),
            "checkpointer": {"checkpoint_dir": str},
            "table_dir": str,
            "batch_tokens": AtLeast(int, 1),
        }
    ),
    "optimizer": Component(
        given=("params",), keys={"lr": Optional(Above(float, 0))}, makes=torch.optim.Optimizer
    ),
    "clip_grad_norm": Above(float, 0),
    "enable_activation_checkpointing": bool,
}
CRITIC_SCHEMA = SCHEMA | {
    "stages": list[str],
    "weighting": CriticWeighting,
    "critic": Optional(dict),
    "auxiliary_value_coef": Optional(AtLeast(float, 0)),
    "auxiliary_value_lr": Optional(Above(float, 0)),
}
ALIKE = 0.85  # from here on an unknown key is a mistyped one of ours, not the recipe's own


def check(cfg: DictConfig, ranks: int, added: Iterable[str] = ()) -> None:
    """Whether the config is one of a training recipe, as far as memory goes.

    Args:
        cfg: the config.
        ranks: size of the process group.
        added: top-level keys that the command line gave and the file does not have: a mistyped one
            must not go unnoticed.

    Raises:
        ConfigError: with everything that is wrong.
    """
    if ranks < 1:
        raise ConfigError(f"--ranks: has to be at least 1, it is {ranks}")
    schema = CRITIC_SCHEMA if "stages" in cfg else SCHEMA
    own = [key for key in cfg if not difflib.get_close_matches(key, schema, cutoff=ALIKE)]
    check_config(cfg, dict.fromkeys(set(own) - set(added), Any) | schema)
    if ranks > 1 and not cfg.fp32_master_weights:
        raise ConfigError("fp32_master_weights: false is for one rank: give --ranks 1 or keep them")


def best_settings(cfg: DictConfig, ranks: int, now: Estimate) -> dict[str, Estimate]:
    """The settings that need least, and less than now, each by how it is written."""
    others = {
        name: estimate_step(cast(DictConfig, OmegaConf.merge(cfg, change)), other_ranks)
        for name, (change, other_ranks) in helpful_settings(cfg, ranks).items()
    }
    best = sorted(others.items(), key=lambda item: item[1].peak)[:SHOWN]
    return {name: other for name, other in best if other.peak < now.peak}


def print_table(cfg: DictConfig, ranks: int, now: Estimate) -> None:
    stage = "the policy stage" if "stages" in cfg else "training"
    print(
        f"Predicted peak of {stage}, one of {ranks} rank{'s' * (ranks > 1)}: "
        f"{cfg.batch_size} rows x {cfg.tokenizer.max_seq_len} tokens, {cfg.dtype}"
    )
    for part, size in now.parts.items():
        print(f"  {part:46}{_readable(size)}")
    print(f"  {'peak':46}{_readable(now.peak)}, in the {now.where}")
    print("A GPU's context, libraries and fragmentation come on top: leave a tenth.")
    if "stages" in cfg and cfg.get("critic"):
        trunk = estimate_trunk(cfg)
        print("\nBefore it, stages critic and values with the frozen trunk whole on each rank")
        print(f"  {'at most, if rows are that long':46}{_readable(trunk.peak)}")


def _readable(size: int) -> str:
    return f"{size / GIB:8.2f} GiB" if size >= GIB else f"{size / MIB:8.0f} MiB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m wmtp_modules.estimate_memory",
        description="Predict the peak memory of one rank of a training config, rho1 or critic, "
        "without running it: no GPU, checkpoint or data is needed.",
        epilog="Any key of the file can be set by key=value, and taken out by ~key.",
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML file of the run")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, in GiB")
    return parser


def _added_keys(config_file: str, overrides: Sequence[str]) -> set[str]:
    if not overrides:  # the file may be a pipe, which can be read once
        return set()
    keys = {override.lstrip("~").partition("=")[0].partition(".")[0] for override in overrides}
    return keys - set(load_config(config_file))


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args, overrides = _parser().parse_known_args(argv)
    try:
        cfg = read_config(["--config", args.config, *overrides])
        check(cfg, args.ranks, _added_keys(args.config, overrides))
        now = estimate_step(cfg, args.ranks)
        if not args.json:
            print_table(cfg, args.ranks, now)
            print("\nWhat helps most", flush=True)
        helps = best_settings(cfg, args.ranks, now)
        if args.json:
            found = {name: other.peak / GIB for name, other in helps.items()}
            print(json.dumps({"peak_gib": now.peak / GIB, "where": now.where, "helps": found}))
            return 0
        for name, other in helps.items():
            print(f"  {name:46}{_readable(other.peak)}")
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
