"""Predict the peak memory of a training config without running it.

    uv run python -m wmtp_modules.estimate_memory --config configs/rho1/7b.yaml --ranks 8

Needs no GPU, no checkpoint and no data: the recipe's own step runs with tensors without contents.
"""

import argparse
import json
import sys
from types import ModuleType
from typing import get_args

from omegaconf import DictConfig

from wmtp_modules.config.check import ConfigError
from wmtp_modules.config.file import merged, read_config
from wmtp_modules.config.rules import checkpointing_of, set_checkpointing, shards_of
from wmtp_modules.memory.step import Estimate, estimate_step, estimate_trunk, load_recipe, recipe_of
from wmtp_modules.models.checkpointing import Checkpointing
from wmtp_modules.run.out_of_memory import helpful_settings

GIB, MIB = 2**30, 2**20
SHOWN = 3  # settings that help
SPARE = 0.1  # of memory, for a GPU's context, libraries and fragmentation


def check(cfg: DictConfig, ranks: int, recipe: ModuleType) -> None:
    """Check that the recipe would run the config on so many ranks; ValueError if not."""
    if ranks < 1:
        raise ConfigError(f"--ranks: must be at least 1, got {ranks}")
    recipe.check(cfg)
    shards_of(cfg.get("data_parallel_shard"), ranks)
    if ranks > 1 and not cfg.fp32_master_weights:
        raise ConfigError("fp32_master_weights: false is for one rank: give --ranks 1 or keep them")


def best_settings(
    cfg: DictConfig, ranks: int, now: Estimate, recipe: ModuleType
) -> dict[str, Estimate]:
    """The settings that need least, and less than now, each by how it is written."""
    others = {
        name: estimate_step(merged(cfg, change), other_ranks, recipe)
        for name, (change, other_ranks) in helpful_settings(cfg, ranks).items()
    }
    best = sorted(others.items(), key=lambda item: item[1].peak)[:SHOWN]
    return {name: other for name, other in best if other.peak < now.peak}


def lightest(
    cfg: DictConfig, ranks: int, gib: float, recipe: ModuleType
) -> tuple[Checkpointing, dict[str, float]]:
    """The lightest checkpointing with a tenth of so much memory to spare, else ``full``.

    Returns:
        Its name, and predicted peaks in GiB by name, up to it.
    """
    peaks: dict[str, float] = {}
    for how in get_args(Checkpointing):
        peaks[how] = estimate_step(merged(cfg, set_checkpointing(how)), ranks, recipe).peak / GIB
        if peaks[how] <= (1 - SPARE) * gib:
            break
    return how, peaks


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


def main(
    argv: list[str] | None = None, *, prog: str = "python -m wmtp_modules.estimate_memory"
) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Predict the peak memory of one rank of a training config, rho1 or critic, "
        "without running it: no GPU, checkpoint or data is needed.",
        epilog="Any key of the file can be set by key=value, and taken out by ~key.",
    )
    parser.add_argument(
        "--config", metavar="FILE", required=True, help="YAML file of the run, or wmtp/NAME"
    )
    parser.add_argument(
        "--recipe", metavar="FILE", help="a copied recipe; by default ours for this config"
    )
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument(
        "--fit",
        type=float,
        metavar="GIB",
        help="say which activation_checkpointing is the lightest that leaves a tenth of so much "
        "memory free, as auto does",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON, in GiB")
    args, overrides = parser.parse_known_args(argv)
    try:
        cfg = read_config(["--config", args.config, *overrides])
        recipe = load_recipe(args.recipe or recipe_of(cfg))
        check(cfg, args.ranks, recipe)
        if args.fit is not None:
            how, peaks = lightest(cfg, args.ranks, args.fit, recipe)
            if args.json:
                print(json.dumps({"activation_checkpointing": how, "peaks_gib": peaks}))
                return 0
            for name, peak in peaks.items():
                print(f"{name:12}{peak:8.2f} GiB")
            if peaks[how] > (1 - SPARE) * args.fit:
                print(f"None leaves a tenth of {args.fit:g} GiB free.")
            print(f"activation_checkpointing: {how}")
            return 0
        if checkpointing_of(cfg) == "auto" and not args.json:
            print("activation_checkpointing: auto as none; --fit GIB says what it is there")
        now = estimate_step(cfg, args.ranks, recipe)
        if not args.json:
            print_table(cfg, args.ranks, now)
            print("\nWhat helps most", flush=True)
        helps = best_settings(cfg, args.ranks, now, recipe)
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
