"""Predicted against measured peak memory of one rank's training step, over settings.

    uv run python benchmarks/memory_estimate.py

Every row trains the Rho-1 recipe in fresh processes on the CPU and measures its second and third
optimizer step, each from the end of the update before to the end of its own. Measured is what the
kernel says: the high-water mark of resident memory, reset before the step, less file pages, less
anonymous memory before the recipe starts. glibc is told to give memory back at once
(MALLOC_MMAP_THRESHOLD_). One row is measured a second way, by the allocations that torch's profiler
records. Predicted is what ``wmtp_modules.estimate_memory`` says of the same config.

Needs 3 GiB of memory. The limit is 15 % on every row.
"""

import argparse
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import anonymous_bytes, hardware
from omegaconf import DictConfig, OmegaConf
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchtune.models.llama2._model_utils import scale_hidden_dim_for_mlp

from wmtp_modules.checkpoints.names import parameter_shapes
from wmtp_modules.checkpoints.write import write_meta
from wmtp_modules.memory.step import Estimate, estimate_step, load_recipe, recipe_of
from wmtp_modules.quickstarts.stdlib import stdlib_files, train_tokenizer

ROOT = Path(__file__).parents[1]
LIMIT = 0.15
STEPS = 3  # the first makes the optimizer's state and is not measured
VOCABULARY, WIDTH = 4000, 512
MIB = 2**20

# Name, ranks, what the row changes in the config below.
ROWS = [
    ("1 rank, 4 x 512 tokens", 1, {}),
    ("batch_size 8", 1, {"batch_size": 8}),
    ("batch_size 2 x 2", 1, {"batch_size": 2, "gradient_accumulation_steps": 2}),
    ("max_seq_len 1024", 1, {"tokenizer": {"max_seq_len": 1024}}),
    ("selective checkpointing", 1, {"activation_checkpointing": "selective"}),
    ("checkpointing", 1, {"activation_checkpointing": "full"}),
    (
        "checkpointing, batch_size 16",
        1,
        {"activation_checkpointing": "full", "batch_size": 16},
    ),
    # A CPU without bf16 instructions is slow at it: one row of tokens.
    ("bf16 compute, batch_size 1", 1, {"dtype": "bf16", "batch_size": 1}),
    ("rho1, online reference", 1, {"weighting": {"name": "rho1"}}),
    ("2 ranks", 2, {}),
    (
        "2 ranks, bf16, checkpointing",
        2,
        {"dtype": "bf16", "batch_size": 1, "activation_checkpointing": "full"},
    ),
    ("2 ranks, rho1, online reference", 2, {"weighting": {"name": "rho1"}}),
    ("LoRA", 1, {"lora": {"rank": 16}}),
    ("LoRA, checkpointing", 1, {"lora": {"rank": 16}, "activation_checkpointing": "full"}),
    ("QLoRA", 1, {"lora": {"rank": 16, "quantize_base": True}}),
    (
        "QLoRA, bf16, checkpointing",
        1,
        {
            "lora": {"rank": 16, "quantize_base": True},
            "dtype": "bf16",
            "activation_checkpointing": "full",
        },
    ),
    ("2 ranks, QLoRA", 2, {"lora": {"rank": 16, "quantize_base": True}}),
]

PROFILED = ROWS[0][0]


def make_assets(folder: Path) -> DictConfig:
    """Tokenizer, data and a next-token reference; the config that all rows start from."""
    texts = [file.read_text(errors="replace") for file in stdlib_files()[:60]]
    train_tokenizer(folder, texts, VOCABULARY)
    lines = [text[i : i + 800] for text in texts for i in range(0, len(text) - 800, 800)]
    for name, rows in {"train": lines[:400], "heldout": lines[400:404]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    args = {
        "vocab_size": VOCABULARY,
        "num_layers": 6,
        "n_future_tokens": 4,
        "num_heads": 8,
        "num_kv_heads": 8,
        "embed_dim": WIDTH,
        "max_seq_len": 2048,
    }
    reference = args | {"num_layers": 3, "n_future_tokens": 1, "intermediate_dim": 1536}
    reference |= {"norm_eps": 1e-5, "rope_base": 10_000.0}
    shapes = parameter_shapes(reference).items()
    tensors = ((key, torch.empty(shape).normal_(std=0.02)) for key, shape in shapes)
    write_meta(tensors, reference, folder / "reference", folder / "tokenizer.model")
    base = args | {"intermediate_dim": scale_hidden_dim_for_mlp(WIDTH)}
    base |= {"norm_eps": 1e-5, "rope_base": 10_000.0}
    tensors = (
        (key, torch.empty(shape).normal_(std=0.02)) for key, shape in parameter_shapes(base).items()
    )
    write_meta(tensors, base, folder / "base", folder / "tokenizer.model")

    cfg = OmegaConf.load(ROOT / "configs" / "quickstart" / "base.yaml")
    for key in ("prepare", "requires", "controls", "metric_logger"):
        cfg.pop(key, None)
    rows_of = {"_component_": "wmtp_modules.data.rows_dataset"}
    return cfg | {
        "assets_dir": str(folder),  # where the tokenizer is
        "model": {"_component_": "wmtp_modules.models.mtp_llama2", **args},
        "tokenizer": {"max_seq_len": 512},
        "dataset": rows_of | {"source": f"{folder}/train.jsonl"},
        "dataset_val": rows_of | {"source": f"{folder}/heldout.jsonl"},
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "weighting": {"name": "uniform"},
        "reference": {
            "mode": "online",
            "checkpointer": {"checkpoint_dir": f"{folder}/reference"},
            "table_dir": f"{folder}/scores",
            "batch_tokens": 4096,
        },
        "activation_checkpointing": "none",
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": f"{folder}/logs",
        },
    }


# ------------------------------------------------------------------ inside a fresh process


def status_bytes(*names: str) -> list[int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return [int(kib[name]) * 1024 for name in names]


def train_and_measure(config_file: str, out: Path, profiled: bool) -> None:
    """Train as one rank, write the peak of each step but the first and end the process."""
    recipe = str(ROOT / "recipes" / "rho1_wmtp_distributed.py")
    runpy.run_path(recipe, run_name="imported")  # what importing takes is not the step's
    before = anonymous_bytes()
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    peaks = []

    def after_update(*_) -> None:
        high, files, shared = status_bytes("VmHWM", "RssFile", "RssShmem")
        peaks.append(high - files - shared - before)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        if len(peaks) == STEPS:
            if profiled:
                profiler.stop()
                profiler.export_chrome_trace(f"{out}.trace")
                peaks[1:] = largest_allocations(Path(f"{out}.trace"))
            rank = os.environ.get("RANK", 0)
            Path(f"{out}.{rank}").write_text(json.dumps(peaks[1:]))
            os._exit(0)  # what comes after, saving included, is of no interest here

    register_optimizer_step_post_hook(after_update)
    if profiled:
        profiler.start()
    sys.argv = [recipe, "--config", config_file]
    runpy.run_path(recipe, run_name="__main__")


def largest_allocations(trace: Path) -> list[int]:
    """Most bytes that torch had allocated on the CPU in each step but the first."""
    events = json.loads(trace.read_text())["traceEvents"]
    ends = sorted(
        event["ts"] + event["dur"]
        for event in events
        if event.get("name", "").startswith("Optimizer.step")
    )
    ends = [*ends[: STEPS - 1], math.inf]  # the last hook runs before the last step has ended
    allocated = [
        (event["ts"], event["args"]["Total Allocated"])
        for event in events
        if event.get("name") == "[memory]"
    ]
    return [
        max(total for ts, total in allocated if start <= ts <= end)
        for start, end in itertools.pairwise(ends)
    ]


# ------------------------------------------------------------------------------ the table


def measure(config_file: Path, ranks: int, out: Path, *, profiled: bool = False) -> list[int]:
    """Bytes of each measured step, of the rank that needs most."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), __file__]
    command += ["--measure", str(config_file), "--out", str(out), *["--profiled"] * profiled]
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=os.environ | at_once, capture_output=True, text=True)
    if done.returncode:  # what a run says of itself is in the way of the table otherwise
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    of_ranks = [json.loads(file.read_text()) for file in out.parent.glob(f"{out.name}.?")]
    return [max(peaks) for peaks in zip(*of_ranks, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=len(ROWS), help="only the first so many")
    parser.add_argument("--only", default="", help="only rows with this in their name")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a fresh process is told
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        train_and_measure(args.measure, args.out, args.profiled)

    print(f"{hardware()}\n$ python {' '.join(sys.argv)}\n")
    print("Peak of one rank's step, MiB; measured: mean of two steps; spread: their difference")
    print(f"{'row':33}{'predicted':>10}{'where':>10}{'measured':>10}{'spread':>8}{'ratio':>7}")
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = make_assets(folder)
        rows = [row for row in ROWS[: args.rows] if args.only in row[0]]
        for i, (name, ranks, changes) in enumerate(rows):
            row = folder / f"row{i}"
            cfg = OmegaConf.merge(base, changes, {"output_dir": str(row)})
            if "lora" in cfg:  # adapters lie on a checkpoint
                cfg.checkpointer = {"checkpoint_dir": str(folder / "base")}
            config_file = folder / f"row{i}.yaml"
            OmegaConf.save(cfg, config_file)
            predicted = estimate_step(cfg, ranks, load_recipe(recipe_of(cfg)))
            good &= show(name, predicted, measure(config_file, ranks, folder / f"row{i}_measured"))
            if name == PROFILED and args.rows == len(ROWS):
                allocated = measure(config_file, ranks, folder / "profiled", profiled=True)
                good &= show("  by torch's profiler", predicted, allocated)
    print(f"{'one GPU, 7B':33}{'not measured':>30}")
    print(f"\n{'PASS' if good else 'FAIL'}: every row within {LIMIT:.0%}")
    return 0 if good else 1


def show(name: str, predicted: Estimate, peaks: list[int]) -> bool:
    measured, spread = sum(peaks) / len(peaks), max(peaks) - min(peaks)
    ratio = predicted.peak / measured
    print(
        f"{name:33}{predicted.peak / MIB:10.0f}{predicted.where:>10}{measured / MIB:10.0f}"
        f"{spread / MIB:8.0f}{ratio:7.2f}",
        flush=True,
    )
    return abs(ratio - 1) <= LIMIT


if __name__ == "__main__":
    sys.exit(main())
