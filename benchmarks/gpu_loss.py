"""Exactness, time and memory of the loss on bf16 operands, against bf16 products and fp64.

    python3 benchmarks/gpu_loss.py
    uv run python benchmarks/gpu_loss.py --device cpu

Needs torch and nothing else. The truth is computed in fp64 from the same bf16 operands. "bf16
products" is the same code with every matrix product rounded to bf16, as it was at first. The ways
are timed in turn.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path
from statistics import quantiles
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import hardware

from wmtp_modules.loss import linear_cross_entropy as module
from wmtp_modules.loss.linear_cross_entropy import linear_cross_entropy

LIMIT = 1e-5  # of the loss of a token


def bf16_products():
    """The functions of before: a product is rounded, then cast."""
    patches = {
        "_logits": lambda h, w: (h @ w.t()).float(),
        "_product": lambda a, b: a.bfloat16() @ b.bfloat16(),
        "_pieces": lambda w: [slice(0, len(w))],
    }
    stack = contextlib.ExitStack()
    for name, function in patches.items():
        stack.enter_context(mock.patch.object(module, name, function))
    return stack


def folded(hidden, weight, labels, token_weights):
    return linear_cross_entropy(hidden, weight, labels, token_weights)


def per_token(hidden, weight, labels, token_weights):
    losses = linear_cross_entropy(hidden, weight, labels)
    return (losses * token_weights).sum(), losses


def step(way, hidden, weight, labels, token_weights):
    """Losses and both gradients, behind a factor as a run's number of targets is."""
    hidden.grad = weight.grad = None
    total, losses = way(hidden, weight, labels, token_weights)
    (total / 333).backward()
    return losses.detach(), hidden.grad, weight.grad


@torch.no_grad()
def truth(hidden, weight, labels, token_weights, chunk=512):
    """The same in fp64, a chunk of tokens at a time."""
    weight64, parts = weight.double(), []
    weight_grad = torch.zeros_like(weight64)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        hidden64, label = hidden[rows].double(), labels[rows, None]
        log_p = (hidden64 @ weight64.t()).log_softmax(-1)
        losses = -log_p.gather(1, label).squeeze(1)
        grad = log_p.exp_().scatter_add_(1, label, -torch.ones_like(label, dtype=torch.float64))
        grad *= token_weights[rows, None].double() / 333
        parts.append((losses, grad @ weight64))
        weight_grad += grad.t() @ hidden64
    losses, hidden_grad = map(torch.cat, zip(*parts, strict=True))
    return losses, hidden_grad, weight_grad


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, help="4096, on a CPU 256")
    parser.add_argument("--width", type=int, help="4096, on a CPU 1024")
    parser.add_argument("--vocab", type=int, help="32000, on a CPU 4000")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    N = args.tokens or (4096 if on_gpu else 256)
    D = args.width or (4096 if on_gpu else 1024)
    V = args.vocab or (32_000 if on_gpu else 4000)
    print(hardware() + (f", {torch.cuda.get_device_name()}" if on_gpu else ""))
    print(f"N={N}, D={D}, V={V}, bf16 operands, {args.rounds} rounds after 3")

    torch.manual_seed(0)
    made = {"device": args.device, "dtype": torch.bfloat16}
    hidden = torch.randn(N, D, **made).requires_grad_()
    weight = (torch.randn(V, D, **made) * 2 / D**0.5).requires_grad_()
    labels = torch.randint(V, (N,), device=args.device)
    problem = hidden, weight, labels, torch.rand(N, device=args.device) * 2
    want = truth(*problem)
    ways = {
        f"{name}, {way.__name__}": (way, context)
        for way in (folded, per_token)
        for name, context in (("bf16 products", bf16_products), ("ours", contextlib.nullcontext))
    }
    found, seconds = {}, {name: [] for name in ways}
    for name, (way, context) in ways.items():
        before = 0
        if on_gpu:
            hidden.grad = weight.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with context():
            losses, *grads = step(way, *problem)
        peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
        error = (losses.double() - want[0]).abs()
        relative = [
            float((got.double() - wanted).norm() / wanted.norm())
            for got, wanted in zip(grads, want[1:], strict=True)
        ]
        scale = [
            float((got.double() * wanted).sum() / wanted.square().sum() - 1)
            for got, wanted in zip(grads, want[1:], strict=True)
        ]
        found[name] = float(error.max()), float(error.mean()), *relative, *scale, peak
    del want
    for round_ in range(args.rounds + 3):
        for name, (way, context) in ways.items():
            with context():
                if on_gpu:
                    torch.cuda.synchronize()
                started = time.perf_counter()
                step(way, *problem)
                if on_gpu:
                    torch.cuda.synchronize()
            if round_ >= 3:
                seconds[name].append(time.perf_counter() - started)
    print(
        f"{'way':26}{'loss error max':>15}{'mean':>9}{'hidden grad':>12}{'weight grad':>12}"
        f"{'their scales - 1':>20}{'MiB':>7}{'ms (quartiles)':>26}"
    )
    for name, (most, mean, hidden_error, weight_error, *scale, peak) in found.items():
        low, middle, high = (1000 * x for x in quantiles(seconds[name], n=4))
        print(
            f"{name:26}{most:15.1e}{mean:9.1e}{hidden_error:12.1e}{weight_error:12.1e}"
            f"{scale[0]:10.1e}{scale[1]:10.1e}{peak / 2**20:7.0f}"
            f"{middle:10.2f} ({low:.2f}-{high:.2f})"
        )
    for way in ("folded", "per_token"):
        pairs = zip(seconds[f"ours, {way}"], seconds[f"bf16 products, {way}"], strict=True)
        low, middle, high = quantiles([a / b for a, b in pairs], n=4)
        print(f"time of ours / bf16 products, {way}: {middle:.3f} (quartiles {low:.3f}-{high:.3f})")
    ok = all(found[f"ours, {way}"][0] <= LIMIT for way in ("folded", "per_token"))
    ok &= all(abs(scale) < 1e-4 for name in found if "ours" in name for scale in found[name][4:6])
    print("PASS" if ok else "FAIL", f"loss within {LIMIT} of fp64, gradients scaled alike")


if __name__ == "__main__":
    main()
