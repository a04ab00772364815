"""The runs that one config asks for: required ones, controls, and the table of their figures."""

import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from wmtp_modules.config.check import ConfigError
from wmtp_modules.config.file import load_config, read_config
from wmtp_modules.files import new_file
from wmtp_modules.parallel.process_group import check_environment

# A rank reports what it alone found after this many seconds; torchrun ends it before where rank 0
# found the same, reported and left.
PATIENCE = 5


@contextmanager
def one_sentence(*errors: type[Exception]) -> Iterator[None]:
    """End the process with a sentence on stderr, and exit code 1, at what its user can mend.

    Of what every rank finds only rank 0 speaks. What another rank found alone has its number.

    Args:
        errors: exceptions that say all in their message; of others the traceback shows.
    """
    try:
        yield
    except errors as error:
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # the sentence gets a line of its own
        sentence, rank = f"{type(error).__name__}: {error}", os.environ.get("RANK", "0")
        if rank.isdecimal() and int(rank):
            time.sleep(PATIENCE)
            sentence = f"rank {rank}: {sentence}"
        sys.exit(sentence)


def parse(main: Callable[[DictConfig], None]) -> Callable[[], None]:
    """Decorator of a recipe's main: the config that the command line names, or one sentence."""

    @functools.wraps(main)
    def wrapper() -> None:
        with one_sentence(ValueError, OSError):
            check_environment()
            cfg = read_config(description=sys.modules[main.__module__].__doc__)
        main(cfg)

    return wrapper


def required_runs(cfg: DictConfig) -> Iterator[DictConfig]:
    """Configs that ``requires`` names, on this run's device; done ones are not run again.

    Raises:
        ConfigError: if one cannot be read.
    """
    for path in cfg.get("requires") or []:
        inherited = {key: cfg[key] for key in ("device", "assets_dir") if key in cfg}
        try:
            required = load_config(path)
        except ConfigError as error:
            raise ConfigError(f"requires: {error}") from error
        # Resuming makes a finished one a no-op and goes on with one that was killed.
        yield OmegaConf.merge(required, inherited, {"resume_from_checkpoint": True})


def control_runs(cfg: DictConfig) -> Iterator[DictConfig]:
    """This config under each other weighting that ``controls`` names: same data, same steps."""
    for name in dict.fromkeys(cfg.get("controls") or []):
        if name == cfg.weighting.name:
            continue  # the run itself
        output_dir = str(Path(cfg.output_dir) / "controls" / name)
        yield OmegaConf.merge(cfg, {"weighting": {"name": name}, "output_dir": output_dir})


def write_summary(output_dir: Path, summary: dict) -> None:
    """Write ``summary.json``, whole or not at all: its being there marks a run as complete.

    Raises:
        ValueError: if a figure is NaN or infinite, which JSON cannot hold.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=1, allow_nan=False)
    with new_file(output_dir / "summary.json") as unfinished:
        unfinished.write_text(text)


def is_done(cfg: DictConfig) -> bool:
    """Whether this very config has run to its end in its ``output_dir``."""
    files = [Path(cfg.output_dir) / name for name in ("config.yaml", "summary.json")]
    if not all(file.exists() for file in files):
        return False
    saved, wanted = load_config(files[0]), OmegaConf.to_container(cfg, resolve=True)
    return OmegaConf.to_container(saved) | {"resume_from_checkpoint": None} == wanted | {
        "resume_from_checkpoint": None
    }


def print_losses(losses: dict[str, list[float]], steps: int) -> None:
    """Held-out loss per head of every run, as a table.

    Args:
        losses: K losses of each run by name; ``base`` is before training.
        steps: optimizer steps of every run.
    """
    K = len(losses["base"])
    print(f"\nHeld-out loss per head after {steps} steps (base: before)")
    print(" " * 14 + "".join(f"head {k}  " for k in range(K)) + "mean")
    for name, loss_K in losses.items():
        cells = "".join(f"{loss:6.3f}  " for loss in loss_K)
        print(f"  {name:12}{cells}{sum(loss_K) / K:6.3f}")


def print_places(output_dir: Path, summary: dict) -> None:
    """Where a run's checkpoints, picture and figures are."""
    print(f"Checkpoints  {output_dir / 'best'} and {output_dir / 'last'}")
    print(f"Curves       {output_dir / 'curves.png'}")
    print(f"Figures      {output_dir / 'summary.json'} and {output_dir / 'metrics.jsonl'}")
    if "tracking" in summary:
        print(f"MLflow       {summary['tracking']}")


# ------------------------------------------------------------ what keys have to be together


def cpp_compiler() -> str | None:
    """The compiler that ``torch.compile`` calls on a CPU: the one of $CXX, else g++."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _split_once(dataset: dict, dataset_val: dict) -> str | None:
    """Two hashes of one source do not divide it: rows would be on both sides."""
    if dataset.get("source") != dataset_val.get("source") or dataset.get("source") is None:
        return None
    defaults = {"validation_fraction": 0.0, "seed": 0}
    ours, theirs = ({**defaults, **one} for one in (dataset, dataset_val))
    differing = [key for key in defaults if ours[key] != theirs[key]]
    if theirs["validation_fraction"] and differing:
        told = " and ".join(f"{key} ({ours[key]} and {theirs[key]})" for key in differing)
        return (
            f"dataset_val: divides the source of dataset with another {told}, so that rows would "
            "be on both sides: give both the same"
        )


def _compiler_is_there(compile: bool, device: str, optimizer: dict) -> str | None:
    component = str(optimizer.get("_component_"))
    is_compiled = component.startswith("torchao.optim")  # whatever ``compile`` says
    if (compile or is_compiled) and device == "cpu" and cpp_compiler() is None:
        key, off = (
            ("compile: true", "set compile: false")
            if compile
            else (f"optimizer: {component}", "take one of torch.optim")
        )
        return (
            f"{key} needs a C++ compiler on a CPU and {os.environ.get('CXX', 'g++')!r} is not "
            f"there: install g++, name another one in the environment variable CXX, or {off}"
        )


def _bf16_parameters_learn(fp32_master_weights: bool, optimizer: dict) -> str | None:
    if not fp32_master_weights and not optimizer.get("bf16_stochastic_round"):
        return (
            "fp32_master_weights: false loses most updates of bf16 parameters: take an optimizer "
            "with bf16_stochastic_round: true (torchao.optim), or keep fp32 masters"
        )


def _bf16_parameters_are_whole(fp32_master_weights: bool) -> str | None:
    if not fp32_master_weights and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return (
            "fp32_master_weights: false is for one rank: torchao 0.15 cannot round sharded "
            "parameters stochastically; keep fp32 masters, which are sharded over the ranks"
        )


# For ``check_config``; they hold for every recipe that trains.
TRAINING_RULES = (
    _split_once,
    _compiler_is_there,
    _bf16_parameters_learn,
    _bf16_parameters_are_whole,
)
