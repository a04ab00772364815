"""The runs that one config asks for: required ones, then its own in turn, and their table."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torchtune import config

from wmtp_modules.config.check import ConfigError
from wmtp_modules.config.environment import of_required
from wmtp_modules.config.file import load_config, merged
from wmtp_modules.files import alone_in, new_file
from wmtp_modules.parallel.process_group import patient_barrier
from wmtp_modules.run.controls import name_of, overrides_of
from wmtp_modules.run.figures import TrainingError
from wmtp_modules.run.out_of_memory import explain_out_of_memory
from wmtp_modules.run.resume import check_not_begun, kept
from wmtp_modules.run.start import exit_with_message
from wmtp_modules.run.stopping import StopRequests
from wmtp_modules.run.storing import localized

HELDOUT = ("heldout_loss", "tokens_per_forward", "acceptance")  # in a summary, by run
FEW_STEPS = 60  # the quickstarts' differences in docs/results.md are of 80 and more


def required_runs(cfg: DictConfig, check: Callable[[DictConfig], None]) -> list[DictConfig]:
    """Configs that ``requires`` names, on this device, checked; ConfigError if one is not valid."""
    runs = []
    for path in cfg.get("requires") or []:
        inherited = {key: cfg[key] for key in ("device", "assets_dir") if key in cfg}
        if cfg.get("data_parallel_shard") is not None:
            inherited["data_parallel_shard"] = cfg.data_parallel_shard
        try:
            required = merged(OmegaConf.create(of_required(cfg)), load_config(path))
        except ConfigError as error:
            raise ConfigError(f"requires: {error}") from error
        # Resuming makes a finished one a no-op and continues one that was killed.
        runs.append(localized(merged(required, inherited, {"resume_from_checkpoint": True})))
        check(runs[-1])
    return runs


@contextmanager
def in_turn(folder: str | Path) -> Iterator[None]:
    """Make on all ranks what other runs may make as well, such as a required run or a critic.

    Another run that is at it is waited for: what it has made is found then.
    """
    with alone_in(folder, wait=True) if dist.get_rank() == 0 else nullcontext():
        patient_barrier()
        yield


def prepare(cfg: DictConfig, runs: list[DictConfig]) -> None:
    """What comes before all runs of a config, on all ranks.

    Makes sure that none of ``runs``, controls included, would delete one that was interrupted, then
    makes what the key ``prepare`` names, such as the quickstart's data.
    """
    if not cfg.resume_from_checkpoint:
        with exit_with_message(ValueError):  # now, not when the controls have had their hours
            for one in runs:
                check_not_begun(Path(one.output_dir))
    if cfg.get("prepare") and dist.get_rank() == 0:
        with exit_with_message(ValueError, OSError):
            config.instantiate(cfg.prepare)
    patient_barrier()


def train(
    recipe: Any, cfg: DictConfig, stops: StopRequests, beside: dict[str, Path], started: float
) -> dict:
    """Train what a recipe has set up, then write its summary; Stopped when it has saved and ends.

    The recipe has ``model_args``, ``device``, ``watchdog``, ``train``, ``finish``, and ``draw`` for
    rank 0 where the run fails; one that stops has drawn itself.
    ``beside`` are metrics files of the runs before, drawn in the same picture; ``started`` is
    ``time.perf_counter()`` when the run's setup began.
    """
    with (
        exit_with_message(TrainingError, OSError),
        explain_out_of_memory(cfg, recipe.model_args, recipe.device),
        stops.step_by_step(),
        recipe.watchdog,
    ):
        try:
            recipe.train()
        except TrainingError:
            if dist.get_rank() == 0:
                recipe.draw()
            raise
    seconds = round(time.perf_counter() - started, 1)
    with exit_with_message(OSError):
        # "seconds" of the run that has controls becomes the sum of all.
        summary = recipe.finish(beside) | {"seconds": seconds, "run_seconds": seconds}
        if dist.get_rank() == 0:
            write_summary(Path(cfg.output_dir), summary)
    return summary


def run_all(runs: list[DictConfig], run: Callable[[DictConfig, dict[str, Path]], dict]) -> dict:
    """Controls first, then the run itself: a claim about weighting is a claim against them.

    ``run`` makes one, given the metrics files of those before, and returns its summary.

    Returns:
        The last one's summary with the held-out figures of all by their names, what each control
        changes, and the seconds that all took.
    """
    summary, seconds, metrics = {}, 0.0, {}
    by_name: dict[str, dict] = {key: {} for key in HELDOUT}
    for cfg in runs:
        with in_turn(cfg.output_dir):
            summary = run(cfg, metrics)
        # A run that was there may know controls that are no more.
        its_own = "base", name_of(cfg)
        for key, found in by_name.items():
            found |= {name: x for name, x in summary.get(key, {}).items() if name in its_own}
        seconds += summary.get("run_seconds", summary["seconds"])
        metrics[name_of(cfg)] = Path(cfg.output_dir) / "metrics.jsonl"
    changes = {name_of(cfg): overrides_of(cfg) for cfg in runs[:-1]}
    summary = {key: value for key, value in summary.items() if key != "controls"}
    more = {"controls": changes} if changes else {}
    return summary | by_name | {"seconds": round(seconds, 1)} | more


def write_summary(output_dir: Path, summary: dict) -> None:
    """Write ``summary.json``, which marks a run as complete; ValueError for a figure not finite."""
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=1, allow_nan=False)
    with new_file(output_dir / "summary.json") as unfinished:
        unfinished.write_text(text)


def finished(cfg: DictConfig) -> dict | None:
    """The summary of this very config if it has run to its end in its ``output_dir``."""
    files = [Path(cfg.output_dir) / name for name in ("config.yaml", "summary.json")]
    if not all(file.exists() for file in files):
        return None
    places = ("resume_from_checkpoint", "storage", "tracking", "metric_logger", "registry")
    how = ("data_parallel_shard", "sync_each_batch", "reshard_after_forward")
    how += ("dataloader_workers", "activation_checkpointing", "enable_activation_checkpointing")
    same: dict = dict.fromkeys((*places, *how))  # not what it computes
    if not cfg.get("controls"):  # what a control's run had beside it is of no matter to it
        same["controls"] = None
    if kept(load_config(files[0])) | same != kept(cfg) | same:
        return None
    return json.loads(files[1].read_text())


def finished_run(config_file: str, **inherited: str) -> Path | None:
    """The folder of another run once it is finished, else None; ConfigError if it cannot be read.

    ``inherited`` is what the run that requires it passes on, such as ``assets_dir``.
    """
    asking = OmegaConf.create({"requires": [config_file], **inherited})
    (cfg,) = required_runs(asking, check=lambda cfg: None)
    return None if finished(cfg) is None else Path(cfg.output_dir)


def print_losses(summary: dict) -> None:
    """Print K held-out losses of every run by name, as a table; ``base`` is before training.

    Beside them stand the tokens per forward of its own greedy decoding (``run/acceptance.py``).
    What a control changes besides the weighting that gives it its name stands behind its losses.
    """
    losses, changes = summary["heldout_loss"], summary.get("controls", {})
    K, width = len(losses["base"]), max(12, *map(len, losses))
    tokens = summary.get("tokens_per_forward", {})
    print(f"\nHeld-out loss per head after {summary['steps']} steps (base: before)")
    head = "".join(f"head {k}  " for k in range(K)) + "mean" + "    tokens/forward" * bool(tokens)
    print(" " * (width + 2) + head)
    for name, loss_K in losses.items():
        cells = "".join(f"{loss:6.3f}  " for loss in loss_K)
        told = changes.get(name, {})
        told = {} if told == {"weighting.name": name} else told
        after = "".join(f"  {key}={value}" for key, value in told.items())
        fast = f"{tokens[name]:.2f}" if name in tokens else "-"  # older runs have none
        after = f"  {fast:>14}" * bool(tokens) + after
        print(f"  {name:{width}}{cells}{sum(loss_K) / K:6.3f}{after}")
    if summary["steps"] < FEW_STEPS and len(losses) > 2:
        print(f"{summary['steps']} steps are too few to judge a weighting by: docs/results.md")


def print_places(output_dir: Path, summary: dict) -> None:
    """Where a run's checkpoints, picture and figures are."""
    print(f"Checkpoints  {output_dir / 'best'} and {output_dir / 'last'}")
    print(f"Page         {output_dir / 'run.html'}")
    print(f"Curves       {output_dir / 'curves.png'}")
    print(f"Figures      {output_dir / 'summary.json'} and {output_dir / 'metrics.jsonl'}")
    if "tracking" in summary:
        print(f"MLflow       {summary['tracking']}")
