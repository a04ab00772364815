"""Collectives of one FSDP2 backward, and every gradient against one process.

    uv run python benchmarks/fsdp_collectives.py

Two gloo ranks, two trunk blocks, four heads and one output: 8 units with the embedding. Then four
ranks as two nodes of two, and what crosses nodes in each of a step's two micro-batches. The same
processes and checks are tests, tests/parallel/test_fsdp.py and test_hybrid.py.
"""

import importlib.util
import os
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
from common import hardware

TESTS = Path(__file__).parents[1] / "tests" / "parallel"
ROWS = {  # of what is printed: data_parallel_shard and sync_each_batch
    "sharded over all 4, each micro-batch": (None, True),
    "the same, reshard_after_forward: false": (None, None),
    "sharded over all 4, once a step": (None, False),
    "2 replicas of 2 shards, each micro-batch": (2, True),
    "2 replicas of 2 shards, once a step": (2, False),
}


def load_test_module(name="test_fsdp"):
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def worker(rank, *args):
    load_test_module().worker(rank, *args)


def hybrid_worker(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="localhost", MASTER_PORT="29477")
    load_test_module("test_hybrid").four_ranks(rank, folder)


def print_hybrid(folder):
    mp.spawn(hybrid_worker, args=(folder,), nprocs=4)
    found, values, _ = torch.load(folder / "out.pt", weights_only=False)
    test_hybrid = load_test_module("test_hybrid")
    test_fsdp = test_hybrid.two_ranks_file()
    rows = test_fsdp.batch(test_hybrid.ROWS)
    test_fsdp.batch = lambda _: rows
    want, size = (
        test_fsdp.reference_gradients(test_fsdp.ARGS),
        sum(v.numel() for v in values.values()),
    )
    names = {"all_gather_single": "gathers", "reduce_scatter_single": "reduce-scatters"}
    names |= {"all_reduce": "all-reduces"}
    print(
        "\n4 ranks, 2 nodes of 2: collectives across nodes (inside one) in micro-batch 1 / 2 of "
        "a step;\nelements that a rank brings to those across nodes, in parts of the model"
    )
    for text, case in ROWS.items():
        grads, _, counts = found[case]
        worst = max(((grads[n] - w).norm() / w.norm()).item() for n, w in want.items())
        told = [
            " / ".join(
                f"{one.get((n, 'across'), 0)} ({one.get((n, 'inside'), 0)})" for one in counts
            )
            + f" {names[n]}"
            for n in names
        ]
        share = sum(one.get(("elements", "across"), 0) for one in counts) / size
        print(f"{text:41} {', '.join(told)}; {share:.2f}; largest gradient difference {worst:.1e}")


def main():
    test_fsdp = load_test_module()
    print(hardware())
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.pt"
        mp.spawn(worker, args=(test_fsdp.ARGS, Path(folder) / "store", results), nprocs=2)
        out = torch.load(results, weights_only=True)
    want = test_fsdp.reference_gradients(test_fsdp.ARGS)
    for (fold, accumulation), (grads, counts) in out.items():
        worst = max(((grads[n] - w).norm() / w.norm()).item() for n, w in want.items())
        print(
            f"{'weights folded in' if fold else 'per-token losses '}, {accumulation} micro-batch: "
            f"{counts['all_gather_single']:3} all-gathers (bound {11 * accumulation}), "
            f"{counts['reduce_scatter_single']:3} reduce-scatters (bound {8 * accumulation}), "
            f"largest gradient difference {worst:.1e}"
        )
    with tempfile.TemporaryDirectory() as folder:
        print_hybrid(Path(folder))


if __name__ == "__main__":
    main()
