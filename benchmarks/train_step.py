"""Cost of a weighted step against a uniform one, and of four heads against one.

    uv run python benchmarks/train_step.py

One process, CPU. The variants are stepped in turn, so that the ratios hold when the machine's
speed drifts. A Rho-1 step draws its reference losses from a table, as a run with cached scores
does, and is compared with a uniform one through the same per-token loss. A critic's step draws its
values from a table, makes weights of them, and folds these into the forward, as the uniform step
that it is compared with does with ones.
"""

import argparse
import time

import torch
from common import hardware

from wmtp_modules.loss.mtp_loss import head_alphas, mtp_labels
from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.sharding import init_weights_
from wmtp_modules.scoring.reference import align_reference
from wmtp_modules.weighting.advantage import CriticWeighting
from wmtp_modules.weighting.token_weighting import TokenWeighting

B, T = 2, 128


def build(args, n_future_tokens):
    model = mtp_llama2(
        vocab_size=args.vocab,
        num_layers=args.trunk + 4,  # equal depth: the heads count as blocks
        n_future_tokens=n_future_tokens,
        num_heads=8,
        num_kv_heads=8,
        embed_dim=args.width,
        max_seq_len=T,
    )
    init_weights_(model, seed=0)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def step(model, optimizer, weighting, folded, tokens, doc, scores_BT):
    """As in the recipes: forward, weights, backward, clip, update."""
    K = model.n_future_tokens
    labels = mtp_labels(tokens, doc >= 0, doc, K)
    mask = labels != -100
    if folded:
        log_raw = None
        if weighting.needs_scores:
            good = torch.ones_like(scores_BT)
            log_raw = weighting.log_raw(
                scores_BT / 8, good, doc >= 0, doc, floor=0.05, mean=0.0, std=1.0
            )
        weights, _ = weighting(None, mask, doc, log_raw, step=0, scale_K=[1.0] * K)
        total, _ = model(tokens, labels, token_weights_BTK=head_alphas(K) * weights)
    else:
        losses = model(tokens, labels)
        reference = align_reference(scores_BT, K) if weighting.needs_scores else None
        weights, _ = weighting(losses, mask, doc, reference, step=0)
        total = (head_alphas(K) * weights * losses).sum()
    (total / (mask.sum() / K)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--trunk", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(hardware())
    print(
        f"D={args.width}, V={args.vocab}, {args.trunk} trunk blocks + 4 heads, {B} x {T} tokens, "
        f"fp32, {args.rounds} rounds after 2"
    )
    torch.manual_seed(0)
    tokens = torch.randint(args.vocab, (B, T))
    doc = (torch.arange(T) >= T // 3).long().expand(B, -1)
    reference = torch.rand(B, T) * 8
    four, one = build(args, 4), build(args, 1)
    variants = {
        "n=4 uniform": (*four, TokenWeighting("uniform"), False),
        "n=4 rho1 topk": (*four, TokenWeighting("rho1", selection="topk"), False),
        "n=4 rho1 soft": (*four, TokenWeighting("rho1", selection="soft"), False),
        "n=1 uniform": (*one, TokenWeighting("uniform"), False),
        "folded uniform": (*four, CriticWeighting("uniform"), True),
        "folded value": (*four, CriticWeighting("critic"), True),
        "folded gae": (*four, CriticWeighting("critic", advantage="gae"), True),
    }
    seconds = {name: [] for name in variants}
    for round_ in range(args.rounds + 2):
        for name, variant in variants.items():
            started = time.perf_counter()
            step(*variant, tokens, doc, reference)
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - started)
    ok = True
    for name, base, limit in (
        ("n=4 rho1 topk", "n=4 uniform", 1.03),
        ("n=4 rho1 soft", "n=4 uniform", 1.03),
        ("n=4 uniform", "n=1 uniform", 1.10),
        ("folded value", "folded uniform", 1.03),
        ("folded gae", "folded uniform", 1.03),
    ):
        pairs = zip(seconds[name], seconds[base], strict=True)
        ratios = sorted(a / b for a, b in pairs)
        middle = ratios[len(ratios) // 2]
        quartiles = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        print(
            f"{name:14} / {base:14} {middle:.3f} (quartiles {quartiles[0]:.3f}-{quartiles[1]:.3f})"
            f"  limit {limit}"
        )
        ok &= middle <= limit
    print("PASS" if ok else "FAIL")


if __name__ == "__main__":
    main()
