"""One page about a training config, before machines are rented for it.

    wmtp doctor CONFIG [--ranks N] [--tokens-per-s X] [key=value ...]

Says what would be read, trained and needed, and what would answer. Needs no GPU; trains nothing,
and writes nothing but the cache of tokenised rows. Of large data it reads a part, and says so.
What would stop the run stands again at the end, and makes the exit code 1.
"""

import argparse
import importlib.util
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config

from wmtp_modules.cli.checks import problems_of, recipe_for
from wmtp_modules.config.check import ConfigError
from wmtp_modules.config.file import read_config
from wmtp_modules.config.secrets import guard_output, hidden
from wmtp_modules.data import rows
from wmtp_modules.data.loader import packs_of_epoch
from wmtp_modules.data.packing import PackedDataset
from wmtp_modules.memory.step import estimate_step, load_recipe
from wmtp_modules.reports.weights_page import token_texts
from wmtp_modules.run import controls, plan
from wmtp_modules.run.figures import epoch_lines
from wmtp_modules.run.model import checked_model_args, model_without_values
from wmtp_modules.run.resume import packs_per_step
from wmtp_modules.run.storing import localized, urls
from wmtp_modules.weighting.token_weighting import TokenWeighting

GIB = 2**30
SAMPLE_BYTES = 30_000_000  # of a source; tokenising it takes some ten seconds on one core
SHOWN_ROWS, SHOWN_TOKENS = 2, 96
# Bytes of a parameter in a training state: fp32 and AdamW's two moments.
STATE_BYTES = 12
EXTRA_HEADS = {
    "isolated": "heads 1 to K - 1 train beside trunk and head 0, which they do not touch",
    "only": "heads 1 to K - 1 train; trunk, head 0, embedding, norm and output are frozen",
}
PACKAGES = ("torch", "torchtune", "torchao", "mlflow", "datasets", "transformers", "triton")


class Page:
    """Prints lines below the titles of their parts; notes what would stop the run."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def part(self, title: str, lines: Callable[[], Iterator[str]], comes_later: str = "") -> None:
        """Print a part as its lines come; an error of the user's in it is a problem.

        Unless something that the run makes first may be missing: ``comes_later`` says what does.
        """
        shown = title
        try:
            for line in lines():
                print(f"{shown:12}{hidden(line)}", flush=True)
                shown = ""
        except (ValueError, OSError, SystemExit) as error:
            told = hidden(" ".join(str(error).split()))
            if not comes_later:
                self.problems.append(f"{title}: {told}")
            word = f"not yet, {comes_later}" if comes_later else "PROBLEM"
            print(f"{shown:12}{word}: {told}", flush=True)


def config_part(cfg: DictConfig, recipe: ModuleType) -> Iterator[str]:
    """The runs that the recipe would make of a config that it takes."""
    yield f"{Path(str(recipe.__file__)).name} takes it"
    for one in plan.required_runs(cfg, lambda required: None):
        state = "is there" if plan.finished(one) else "is made first"
        yield f"requires {one.output_dir}, which {state}"
    runs = all_runs(cfg)
    names = ", ".join(controls.name_of(one) for one in runs)
    told = f"{len(runs)} run{'s' * (len(runs) > 1)}: {names}"
    yield f"{told}; {cfg.max_steps:,} steps where nothing else is said"
    yield f"output in {cfg.output_dir}"


def all_runs(cfg: DictConfig) -> list[DictConfig]:
    return controls.runs_of(cfg, TokenWeighting.NAMES)


@contextmanager
def heard(log: logging.Logger) -> Iterator[list[str]]:
    """What a logger says meanwhile, which is not shown."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    was = log.handlers, log.propagate
    log.handlers, log.propagate = [listener], False
    try:
        yield said
    finally:
        log.handlers, log.propagate = was


class Data:
    """The rows of a config's data set, or of a part of it."""

    def __init__(self, cfg: DictConfig, name: str) -> None:
        if not Path(cfg.tokenizer.path).is_file():
            raise ValueError(f"there is no {cfg.tokenizer.path}")
        self.tokenizer = config.instantiate(cfg.tokenizer)
        with heard(rows.log) as self.said, rows.sampled(SAMPLE_BYTES) as part:
            self.rows: datasets.Dataset = config.instantiate(cfg[name], self.tokenizer)
        self.share = part.share

    def lines(self) -> Iterator[str]:
        """What was read, duplicates, and the first rows as the model will see them."""
        if self.share < 1:
            yield f"from the first {self.share:.2%} of its bytes; the rest is like it, or not"
        yield from (part for line in self.said for part in line.split("; "))
        tokens = self.rows.select_columns("tokens").with_format("arrow")
        whole = [hash(row.as_py().__repr__()) for row in tokens[:]["tokens"]]
        if twice := len(whole) - len({*whole}):
            yield f"{twice:,} rows are there twice"
        supervised = np.concatenate(self.rows.with_format("numpy")[:]["keep"])
        yield f"{supervised.mean():.1%} of the tokens are supervised"
        for i in range(min(SHOWN_ROWS, len(self.rows))):
            yield f"row {i}, supervised tokens in «»:"
            yield from (f"  {line}" for line in self._shown(self.rows[i]).splitlines())

    def _shown(self, row: dict) -> str:
        tokens, keep = row["tokens"][:SHOWN_TOKENS], row["keep"][:SHOWN_TOKENS]
        text, is_open = "", False
        for piece, kept in zip(token_texts(self.tokenizer, tokens), keep, strict=True):
            if kept != is_open:
                text, is_open = text + ("«" if kept else "»"), kept
            text += piece
        rest = len(row["tokens"]) - len(tokens)
        return text + "»" * is_open + (f" ... and {rest} more tokens" if rest > 0 else "")


def epochs_part(cfg: DictConfig, data: Data, ranks: int) -> Iterator[str]:
    """How many epochs the steps make."""
    packs = PackedDataset(data.rows, max_seq_len=cfg.tokenizer.max_seq_len, seed=cfg.seed)
    each = packs_per_step(cfg, ranks)
    taken = max(1, packs_of_epoch(len(packs), ranks * cfg.batch_size, each))
    if data.share < 1:
        epochs = cfg.max_steps * each / (taken / data.share)
        yield f"about {epochs:.2g} epochs in {cfg.max_steps:,} steps, by the part that was read"
        return
    yield from filter(None, epoch_lines(packs, taken, each, cfg.max_steps, 0))


def model_part(cfg: DictConfig) -> Iterator[str]:
    """Its shape, where from, and whether vocabulary and tokenizer agree."""
    args = checked_model_args(cfg)
    source = cfg.checkpointer.checkpoint_dir if cfg.checkpointer else "nothing: made anew"
    n = parameters(cfg) / 1e6
    yield f"{n:,.1f} M parameters, {args['n_future_tokens']} heads, from {source}"
    how = cfg.get("extra_heads") or "full"
    what = "in adapters, which train" if cfg.get("lora") is not None else "train"
    if cfg.get("lora") is not None or how != "full":
        yield f"{parameters(cfg, trained=True) / 1e6:,.1f} M parameters {what}"
    if how != "full":
        yield f"extra_heads {how}: {EXTRA_HEADS[how]}"
    shape = ", ".join(f"{key} {value}" for key, value in args.items() if key != "n_future_tokens")
    yield shape
    yield f"vocabulary {args['vocab_size']:,}, as {cfg.tokenizer.path} has it"


def parameters(cfg: DictConfig, *, trained: bool = False) -> int:
    if not trained:
        with torch.device("meta"):
            return sum(one.numel() for one in config.instantiate(cfg.model).parameters())
    return sum(one.numel() for one in model_without_values(cfg).parameters() if one.requires_grad)


def memory_part(cfg: DictConfig, recipe: ModuleType, ranks: int) -> Iterator[str]:
    """Predicted peak of a rank, and what is written to the disk."""
    peak = estimate_step(cfg, ranks, recipe).peak
    yield f"{peak / GIB:.2f} GiB at the peak of each of {ranks} ranks, predicted"
    if cfg.device == "cuda":
        yield "a GPU's context, libraries and fragmentation come on top: leave a tenth"
    n = parameters(cfg)
    state, model = (
        STATE_BYTES * parameters(cfg, trained=True),
        (2 if cfg.dtype == "bf16" else 4) * n,
    )
    runs = len(all_runs(cfg))
    # A state is written before the oldest is dropped.
    needs = runs * ((cfg.keep_last + 1) * state + 2 * model)
    folder = Path(cfg.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    yield (
        f"on the disk: a state {state / GIB:.2f} GiB, best/ and last/ {model / GIB:.2f} GiB each; "
        f"{runs} x the run: up to {needs / GIB:.2f} GiB, free are {free / GIB:.1f} GiB"
    )
    if needs > free:
        raise ValueError(f"{folder} has too little room: lower keep_last, or take another disk")


def tracking_part(cfg: DictConfig) -> Iterator[str]:
    """Whether MLflow's store and the stores of files answer."""
    from wmtp_modules.tracking.store import open_client, problem_of, set_defaults, sqlite_file

    set_defaults()
    logger = cfg.get("metric_logger") or {}
    named = logger.get("tracking_uri") or OmegaConf.select(cfg, "tracking.uri")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or named
    if not uri:
        yield "no MLflow store: metrics.jsonl has the figures"
    elif (file := sqlite_file(uri)) and not file.exists():
        yield f"MLflow {uri} is made with the first run"
    else:
        try:
            open_client(uri)
        except Exception as error:  # whatever MLflow, a driver or a server may raise
            if OmegaConf.select(cfg, "tracking.required"):
                raise ValueError(problem_of(uri, error)) from error
            yield f"{problem_of(uri, error)}: the run would go on without it"
        else:
            yield f"MLflow {hidden(uri)} answers"
    for url in urls():
        from wmtp_modules.storage import store  # only who has one needs it

        found = store.objects_in(url) or store.look(url)
        yield f"{hidden(url)} answers, {'and is there' if found else 'and holds nothing yet'}"


def machine_part(cfg: DictConfig) -> Iterator[str]:
    """What is installed, and what of it a step would use."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    yield f"Python {platform.python_version()}, {', '.join(found)}"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield f"GPUs: {', '.join(gpus) or 'none here'}; {len(os.sched_getaffinity(0))} processors"
    if cfg.compile:
        compiler = "triton" if cfg.device == "cuda" else "a C++ compiler"
        has = importlib.util.find_spec("triton") if cfg.device == "cuda" else shutil.which("g++")
        yield f"compile: {compiler} is {'there' if has else 'missing here'}"


def time_part(cfg: DictConfig, data: Data, ranks: int, per_s: float | None) -> Iterator[str]:
    """How long it takes at a given speed."""
    packs = PackedDataset(data.rows, max_seq_len=cfg.tokenizer.max_seq_len, seed=cfg.seed)
    a_pack = packs.n_tokens / len(packs)
    tokens = packs_per_step(cfg, ranks) * a_pack
    runs = len(all_runs(cfg))
    all_of_it = tokens * cfg.max_steps * runs
    yield f"{tokens:,.0f} tokens a step, {all_of_it / 1e6:,.1f} M in all ({runs} x the run)"
    if per_s:
        hours = all_of_it / per_s / 3600
        yield f"{hours:,.1f} hours at {per_s:,.0f} tokens/s of all ranks, but for validation, saves"
    else:
        yield "--tokens-per-s X, of all ranks together, tells the hours"


def main(argv: list[str] | None = None, *, prog: str = "python -m wmtp_modules.doctor") -> int:
    """Run the command line; returns the exit code."""
    guard_output()
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or wmtp/NAME")
    parser.add_argument("--recipe", metavar="FILE", help="if not the one that CONFIG names")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--tokens-per-s", type=float, metavar="X", help="of all ranks together")
    args, overrides = parser.parse_known_args(argv)
    started, page = time.monotonic(), Page()
    try:
        file = recipe_for(args.config, args.recipe)
        found, missing = problems_of(args.config, list(overrides), file, files=False)
        found += [f"{key}: must be given a value" for key in missing]
        cfg = localized(read_config(["--config", args.config, *overrides]))
        if "max_steps" not in cfg:
            raise ConfigError(f"{args.config} trains nothing: `wmtp check` says what can be said")
        recipe = load_recipe(file)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {hidden(str(error))}", file=sys.stderr)
        return 1
    if found:
        page.problems += [f"Config: {hidden(told)}" for told in found]
    else:  # else nothing below can be relied on
        _all_parts(page, cfg, recipe, args)
    page.part("Machine", lambda: machine_part(cfg))
    many = "s" * (len(page.problems) != 1)
    print(f"\n{len(page.problems)} problem{many}, looked at in {time.monotonic() - started:.0f} s")
    for told in page.problems:
        print(f"- {told}")
    return 1 if page.problems else 0


def _all_parts(page: Page, cfg: DictConfig, recipe: ModuleType, args: argparse.Namespace) -> None:
    makes = [key for key in ("prepare", "requires") if cfg.get(key)]
    later = f"the run makes it ({' and '.join(makes)})" if makes else ""
    page.part("Config", lambda: config_part(cfg, recipe))
    read: dict[str, Data] = {}
    for title, name in (("Data", "dataset"), ("Held out", "dataset_val")):
        page.part(title, lambda name=name: _data_lines(cfg, name, read), later)
    page.part("Model", lambda: model_part(cfg), later)
    if data := read.get("dataset"):
        page.part("Epochs", lambda: epochs_part(cfg, data, args.ranks))
        page.part("Time", lambda: time_part(cfg, data, args.ranks, args.tokens_per_s))
    page.part("Memory", lambda: memory_part(cfg, recipe, args.ranks))
    page.part("Tracking", lambda: tracking_part(cfg))


def _data_lines(cfg: DictConfig, name: str, read: dict[str, Data]) -> Iterator[str]:
    read[name] = Data(cfg, name)
    yield from read[name].lines()


if __name__ == "__main__":
    sys.exit(main())
