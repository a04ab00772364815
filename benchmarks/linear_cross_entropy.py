"""Peak memory, time and exactness of the loss against the naive joint [N, K, V] logits.

    uv run python benchmarks/linear_cross_entropy.py

Time is measured in one process, the ways taken in turn, so that the ratios hold when the machine's
speed drifts. Memory is measured in a process of its own for each way: the peak of anonymous
resident memory above what was there before.
"""

import argparse
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from common import PeakAnonymousMemory, hardware

from wmtp_modules.loss.linear_cross_entropy import linear_cross_entropy


def naive(hidden, weight, labels, token_weights):
    logits = hidden @ weight.T
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return (losses.view(labels.shape) * token_weights).sum()


def folded(hidden, weight, labels, token_weights):
    return linear_cross_entropy(hidden, weight, labels, token_weights)[0]


def per_token(hidden, weight, labels, token_weights):
    return (linear_cross_entropy(hidden, weight, labels) * token_weights).sum()


def torch_chunked(hidden, weight, labels, token_weights):
    losses = F.linear_cross_entropy(
        hidden.flatten(0, -2),
        weight,
        labels.flatten(),
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return (losses.view(labels.shape) * token_weights).sum()


WAYS = {
    "naive joint": naive,
    "folded weights": folded,
    "per-token losses": per_token,
    "torch 2.13 F.linear_cross_entropy": torch_chunked,
}
LIMITS = {"folded weights": 1.05, "per-token losses": 1.35}


def problem(args):
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.heads, args.width, requires_grad=True)
    weight = (torch.randn(args.vocab, args.width) / args.width**0.5).requires_grad_()
    labels = torch.randint(args.vocab, (args.tokens, args.heads))
    return hidden, weight, labels, torch.rand(args.tokens, args.heads) * 2


def step(way, hidden, weight, labels, token_weights):
    hidden.grad = weight.grad = None
    WAYS[way](hidden, weight, labels, token_weights).backward()
    return hidden.grad, weight.grad


def peak_of(way, args):
    tensors = problem(args)
    with PeakAnonymousMemory() as peak:
        step(way, *tensors)
    print(peak.bytes)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-of", choices=WAYS, help="only print this way's peak, in bytes")
    args = parser.parse_args()
    if args.peak_of:
        return peak_of(args.peak_of, args)

    print(hardware())
    print(
        f"N={args.tokens} x {args.heads} heads, D={args.width}, V={args.vocab}, fp32, "
        f"{args.rounds} rounds"
    )
    passed = sys.argv[1:]
    memory = {
        way: int(subprocess.check_output([sys.executable, __file__, *passed, "--peak-of", way]))
        for way in WAYS
    }
    tensors = problem(args)
    want = [grad.clone() for grad in step("naive joint", *tensors)]
    errors = {
        way: max(relative(*pair) for pair in zip(step(way, *tensors), want, strict=True))
        for way in WAYS
    }
    ratios = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        seconds = {}
        for way in WAYS:
            started = time.perf_counter()
            step(way, *tensors)
            seconds[way] = time.perf_counter() - started
        for way in WAYS:
            ratios[way].append(seconds[way] / seconds["naive joint"])
    print(f"{'way':36}{'memory MB':>10}{'1/':>7}{'time ratio (min-max)':>26}{'grad error':>12}")
    ok = True
    for way in WAYS:
        ratio = sorted(ratios[way])
        middle = ratio[len(ratio) // 2]
        print(
            f"{way:36}{memory[way] / 1e6:10.0f}{memory['naive joint'] / memory[way]:7.1f}"
            f"{middle:14.2f} ({ratio[0]:.2f}-{ratio[-1]:.2f}){errors[way]:12.1e}"
        )
        if way in LIMITS:
            ok &= middle <= LIMITS[way] and errors[way] <= 1e-6
            ok &= memory[way] * 20 <= memory["naive joint"]
    print("PASS" if ok else "FAIL", "memory <= 1/20, time folded <= 1.05, per-token <= 1.35, 1e-6")


if __name__ == "__main__":
    main()
