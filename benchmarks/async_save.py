"""What saving a training state while training goes on costs a step, beside waiting for the disk.

    uv run python benchmarks/async_save.py

Two gloo ranks train a model of 3.5M parameters. Blocks of 20 steps take turns: no save, a save at
the first step that is written meanwhile, and a save that is waited for. All three kinds of one
round see the same machine.
"""

import argparse
import os
import shutil
import socket
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import hardware

from wmtp_modules.loss.mtp_loss import mtp_labels
from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.process_group import init_process_group
from wmtp_modules.parallel.sharding import init_weights_, shard_model
from wmtp_modules.run.training_state import TrainingStates

STEPS = 20  # per save
LIMIT = 1.05
B, T = 4, 64


def rank_main(rank: int, port: int, rounds: int, folder: str, results) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _, mesh = init_process_group("cpu")
    model = mtp_llama2(
        vocab_size=2048,
        num_layers=6,
        n_future_tokens=4,
        num_heads=8,
        num_kv_heads=8,
        embed_dim=192,
        max_seq_len=T,
    )
    init_weights_(model, 0)
    shard_model(model, mesh, compute_dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    states = TrainingStates(Path(folder), keep_last=1)
    generator = torch.Generator().manual_seed(rank)

    def train_step() -> None:
        tokens = torch.randint(2048, (B, T), generator=generator)
        keep, doc = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.int64)
        losses = model(tokens, mtp_labels(tokens, keep, doc, 4))
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def block(kind: str, step: int) -> float:
        dist.barrier()
        start = time.perf_counter()
        for i in range(STEPS):
            train_step()
            if i == 0 and kind != "none":
                states.save(step, model, optimizer, {"step": step}, {})
                if kind == "waited for":
                    states.wait()
        seconds = time.perf_counter() - start
        states.wait()  # not in the time: over after a few steps, unless it says so
        return seconds

    train_step()
    for kind in ("written meanwhile", "none"):  # warm
        block(kind, 0)
    for n in range(rounds):
        for i, kind in enumerate(("none", "written meanwhile", "waited for")):
            seconds = block(kind, 3 * n + i + 1)  # each save has a name of its own
            if rank == 0:
                results.append((kind, seconds, states.seconds))
    states.close()
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output_dir", default="runs/async_save")
    args = parser.parse_args()
    print(hardware())
    shutil.rmtree(args.output_dir, ignore_errors=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.Manager().list()
    mp.spawn(rank_main, args=(port, args.rounds, args.output_dir, results), nprocs=2)
    (state,) = Path(args.output_dir).glob("step_*")
    size = sum(file.stat().st_size for file in state.iterdir()) / 2**20
    blocks: dict[str, list[float]] = {}
    for kind, seconds, _ in results:
        blocks.setdefault(kind, []).append(seconds)
    step = statistics.median(blocks["none"]) / STEPS
    print(
        f"state of {size:.0f} MiB, step of {step:.2f} s, a save every {STEPS} steps; the slowest "
        f"save took {max(seconds for *_, seconds in results):.2f} s until it was on the disk"
    )
    for kind in ("written meanwhile", "waited for"):
        ratios = [a / b for a, b in zip(blocks[kind], blocks["none"], strict=True)]
        print(
            f"{kind:18} step time x {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f} in {args.rounds} rounds)"
        )
        if kind == "written meanwhile":
            passed = statistics.median(ratios) <= LIMIT
    print(f"{'PASS' if passed else 'FAIL'}: at most x {LIMIT}")
    shutil.rmtree(args.output_dir)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
