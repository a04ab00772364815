"""Collectives of one FSDP2 backward, and every gradient against one process.

    uv run python benchmarks/fsdp_collectives.py

Two gloo ranks, two trunk blocks, four heads and one output: 8 units with the embedding. The same
processes and checks are tests in tests/distributed/test_fsdp.py.
"""

import importlib.util
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
from common import hardware

PATH = Path(__file__).parents[1] / "tests" / "parallel" / "test_fsdp.py"


def load_test_module():
    spec = importlib.util.spec_from_file_location("test_fsdp", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def worker(rank, *args):
    load_test_module().worker(rank, *args)


def main():
    test_fsdp = load_test_module()
    print(hardware())
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.pt"
        mp.spawn(worker, args=(test_fsdp.ARGS, Path(folder) / "store", results), nprocs=2)
        out = torch.load(results, weights_only=True)
    want = test_fsdp.reference_gradients(test_fsdp.ARGS)
    out.pop("with a value head")  # a ninth unit, for the tests
    for (fold, accumulation), (grads, counts) in out.items():
        worst = max(((grads[n] - w).norm() / w.norm()).item() for n, w in want.items())
        print(
            f"{'weights folded in' if fold else 'per-token losses '}, {accumulation} micro-batch: "
            f"{counts['all_gather_single']:3} all-gathers (bound {11 * accumulation}), "
            f"{counts['reduce_scatter_single']:3} reduce-scatters (bound {8 * accumulation}), "
            f"largest gradient difference {worst:.1e}"
        )


if __name__ == "__main__":
    main()
