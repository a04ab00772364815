"""Processor time of a LoRA step against a full step of the same shape.

    uv run python benchmarks/lora_step.py

One process, CPU, fp32: forward, backward, clipping and AdamW, as in the recipes. Both are stepped
in turn in one run, so that the ratio holds when the machine's speed drifts; what is counted is
processor time, in which other programs do not count. LoRA has rank 16 on every linear layer of
trunk and heads.
"""

import argparse
import sys
import time
from itertools import pairwise

import torch
from common import hardware

from wmtp_modules.loss.mtp_loss import head_alphas, mtp_labels
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.lora import LoRA
from wmtp_modules.parallel.sharding import init_adapters_, init_weights_

LIMIT = 0.8


def build(args: argparse.Namespace, lora: LoRA | None) -> tuple:
    model = mtp_llama2(
        vocab_size=args.vocab,
        num_layers=args.trunk + 4,
        n_future_tokens=4,
        num_heads=8,
        num_kv_heads=8,
        embed_dim=args.width,
        max_seq_len=args.tokens,
    )
    init_weights_(model, seed=0)
    if lora:
        model.add_lora(lora, adapter_dtype=torch.float32)
        init_adapters_(model, 0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4, fused=True)


def step(model, optimizer, tokens, labels, weights, seconds: dict[str, list[float]]) -> None:
    """As in the recipes, with weights known beforehand; the time of each part is added."""
    times = [time.process_time()]
    total, _ = model(tokens, labels, token_weights_BTK=weights)
    times.append(time.process_time())
    (total / tokens.numel()).backward()
    times.append(time.process_time())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    times.append(time.process_time())
    parts = dict(zip(("forward", "backward", "update"), pairwise(times), strict=True))
    for name, (start, end) in (parts | {"step": (times[0], times[-1])}).items():
        seconds.setdefault(name, []).append(end - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--trunk", type=int, default=12)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"{hardware()}\n$ python {' '.join(sys.argv)}\n")
    print(
        f"D={args.width}, V={args.vocab}, {args.trunk} trunk blocks + 4 heads, {args.rows} x "
        f"{args.tokens} tokens, fp32, rank {args.rank}, {args.rounds} rounds after 2"
    )
    torch.manual_seed(0)
    tokens = torch.randint(args.vocab, (args.rows, args.tokens))
    doc = torch.zeros_like(tokens)
    labels = mtp_labels(tokens, doc >= 0, doc, 4)
    weights = head_alphas(4) * (labels != -100)
    both = {"full": build(args, None), "LoRA": build(args, LoRA(rank=args.rank))}
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in both}
    for _ in range(args.rounds + 2):
        for name, (model, optimizer) in both.items():
            step(model, optimizer, tokens, labels, weights, seconds[name])
    print(f"{'':10}{'full':>9}{'LoRA':>9}  processor seconds (median); ratio of pairs (quartiles)")
    for part in ("forward", "backward", "update", "step"):
        full, lora = (seconds[name][part][2:] for name in both)
        ratios = sorted(b / a for a, b in zip(full, lora, strict=True))
        n = len(ratios)
        print(
            f"{part:10}{sorted(full)[n // 2]:9.3f}{sorted(lora)[n // 2]:9.3f}  "
            f"{ratios[n // 2]:.3f} ({ratios[n // 4]:.3f}-{ratios[3 * n // 4]:.3f})"
        )
    good = ratios[n // 2] <= LIMIT
    print(f"{'PASS' if good else 'FAIL'}: a LoRA step takes at most {LIMIT} of a full one")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
