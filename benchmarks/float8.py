"""Losses with float8 products in the blocks beside fp32 ones, as a CPU emulates them.

    uv run python benchmarks/float8.py

A small model learns the source of Python's standard library from the same start on the same
batches, with and without float8. What float8 saves in time only a GPU of compute capability 8.9
can show; here operands are rounded as there and multiplied in fp32.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from statistics import mean

import torch
from common import hardware

from wmtp_modules.loss.mtp_loss import mtp_labels
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.float8 import float8_blocks_
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.quickstarts.stdlib import stdlib_files, train_tokenizer

BATCH, T, VOCABULARY, LR = 8, 64, 1024, 2e-3
HELDOUT = 32  # rows
RECIPES = (None, "tensorwise", "rowwise")


def rows_of_library() -> torch.Tensor:
    """Rows of T tokens, int64 [N, T]."""
    texts = [path.read_text("utf-8", "ignore") for path in stdlib_files()]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(Path(folder), texts[::8], VOCABULARY)
        ids = torch.tensor([token for text in tokenizer.encode(texts[::4]) for token in text])
    return ids[: len(ids) // T * T].view(-1, T)


def losses_of(model: MTPTransformer, tokens_BT: torch.Tensor) -> torch.Tensor:
    kept, doc = torch.ones_like(tokens_BT, dtype=torch.bool), torch.zeros_like(tokens_BT)
    labels_BTK = mtp_labels(tokens_BT, kept, doc, model.n_future_tokens)
    return model(tokens_BT, labels_BTK).sum() / (labels_BTK >= 0).sum()


def train(model: MTPTransformer, rows: torch.Tensor, steps: int, seed: int) -> tuple[float, float]:
    """Mean training loss of the last tenth of the steps, and the held-out loss."""
    chosen = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    last = []
    for step in range(steps):
        at = torch.randint(len(rows) - HELDOUT, (BATCH,), generator=chosen)
        loss = losses_of(model, rows[at])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 0.9 * steps:
            last.append(loss.item())
    with torch.no_grad():
        return mean(last), losses_of(model, rows[-HELDOUT:]).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(hardware())
    rows = rows_of_library()
    print(f"{args.steps} steps of {BATCH} x {T} tokens; training loss at the end, held-out loss")
    differences: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        start = mtp_llama2(
            vocab_size=VOCABULARY, num_layers=6, n_future_tokens=4, num_heads=4, num_kv_heads=4,
            embed_dim=128, max_seq_len=T, intermediate_dim=352,
        )  # fmt: skip
        without = 0.0
        for recipe in RECIPES:
            model = copy.deepcopy(start)
            if recipe:
                float8_blocks_(model, recipe, device=torch.device("cpu"))
            training, heldout = train(model, rows, args.steps, seed)
            told = ""
            if recipe:
                differences.setdefault(recipe, []).append(heldout - without)
                told = f"  held-out {heldout - without:+.4f}"
            else:
                without = heldout
            print(
                f"seed {seed}  {recipe or 'fp32':11}{training:8.4f}{heldout:9.4f}{told}", flush=True
            )
    for recipe, found in differences.items():
        told = f"{min(found):+.4f} to {max(found):+.4f}"
        print(f"{recipe}: held-out loss {mean(found):+.4f} in the mean, {told}")


if __name__ == "__main__":
    main()
