"""What counting tokens per forward costs in a validation: losses alone against both, in turn.

    uv run python benchmarks/validation.py

Processor time of one core; PASS if the median ratio stays below the limit. The result is kept in
benchmarks/results/validation.txt.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import hardware
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.models import mtp_llama2
from wmtp_modules.quickstarts.stdlib import stdlib_files, train_tokenizer
from wmtp_modules.run.figures import heldout_figures, heldout_losses

LIMIT, REPEATS = 1.15, 10
RESULTS = Path("benchmarks/results/validation.txt")
# Width, vocabulary, positions, rows, batches: the quickstart's model, and one with the shape of a
# Llama's last layers.
SIZES = ((96, 1024, 64, 16, 20), (512, 32000, 512, 1, 3))


def ratio_of(
    tokenizer: Llama2Tokenizer, D: int, V: int, T: int, B: int, n: int
) -> tuple[float, float, float]:
    """Median seconds of losses alone, and median, smallest and largest ratio of both to them."""
    torch.manual_seed(0)
    shape = {"num_layers": 6, "n_future_tokens": 4, "num_heads": 4, "num_kv_heads": 4}
    model = mtp_llama2(vocab_size=V, embed_dim=D, max_seq_len=T, **shape)
    doc_BT = torch.zeros(B, T, dtype=torch.int64)
    batch = {
        "tokens": torch.randint(3, tokenizer.vocab_size, (B, T)),
        "doc": doc_BT,
        "keep": doc_BT >= 0,
        "input_pos": torch.arange(T).expand(B, T),
        "noise": doc_BT > 0,
    }

    def seconds(validate) -> float:
        start = time.process_time()
        validate()
        return time.process_time() - start

    ways = (
        lambda: heldout_losses(model, [batch] * n),
        lambda: heldout_figures(model, [batch] * n, tokenizer),
    )
    alone, ratios = [], []
    for turn in range(REPEATS + 1):  # the first one warms up
        order = ways if turn % 2 else ways[::-1]
        spent = dict(zip(order, map(seconds, order), strict=True))
        if turn:
            alone.append(spent[ways[0]])
            ratios.append(spent[ways[1]] / spent[ways[0]])
    print(f"ratios {' '.join(f'{x:.3f}' for x in ratios)}")
    return statistics.median(alone), statistics.median(ratios), max(ratios)


def main() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(Path(folder), [p.read_text() for p in stdlib_files()[:20]], 512)
        tokenizer = Llama2Tokenizer(f"{folder}/tokenizer.model")
    lines, worst = [hardware()], 0.0
    for D, V, T, B, n in SIZES:
        seconds, ratio, most = ratio_of(tokenizer, D, V, T, B, n)
        worst = max(worst, ratio)
        lines.append(
            f"width {D}, vocabulary {V:,}, {B * T * n:,} positions: losses alone {seconds:.2f} s, "
            f"with tokens per forward x {ratio:.3f} (median of {REPEATS}, at most {most:.3f})"
        )
    lines.append(f"{'PASS' if worst <= LIMIT else 'FAIL'}: at most x {LIMIT:.2f}")
    text = "\n".join(lines)
    print(text)
    RESULTS.write_text(text + "\n")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
