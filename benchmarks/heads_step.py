"""Processor time and memory of a step that trains heads 1 to 3 only, against a full step.

    uv run python benchmarks/heads_step.py

One process, CPU, fp32, on a Llama with heads that are copies of its last block, as ``convert --to
mtp`` makes it: forward, backward, clipping and AdamW, as in the recipes. All are stepped in turn in
one run, so that the ratio holds when the machine's speed drifts; what is counted is processor time,
in which other programs do not count. Beside them: heads that are isolated, and both kinds with
distillation.
"""

import argparse
import sys
import time
from itertools import pairwise

import torch
from common import hardware

from wmtp_modules.loss.distill import Distill
from wmtp_modules.loss.mtp_loss import mtp_labels
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.head_groups import head_groups, scale_and_clip_
from wmtp_modules.parallel.sharding import init_weights_

LIMIT = 0.6
K = 4
# extra_heads and distillation of each kind of step; the first is what the others are held against.
KINDS = {
    "full": ("full", 0.0),
    "only": ("only", 0.0),
    "only, distilled": ("only", 0.5),
    "isolated": ("isolated", 0.0),
    "full, distilled": ("full", 0.5),
}


class Kind:
    """A model and its steps; ``seconds`` has each part of each step."""

    def __init__(self, args: argparse.Namespace, extra_heads: str, weight: float) -> None:
        self.model = mtp_llama2(
            vocab_size=args.vocab,
            num_layers=args.trunk + K,
            n_future_tokens=K,
            num_heads=8,
            num_kv_heads=8,
            embed_dim=args.width,
            max_seq_len=args.tokens,
        )
        init_weights_(self.model, seed=0)
        for head in self.model.heads[1:]:
            head.load_state_dict(self.model.heads[0].state_dict())
        self.model.set_extra_heads(extra_heads)
        self.distill = Distill(weight)
        self.groups = head_groups(self.model)
        self.alphas_K = sum(group.alphas_K for group in self.groups)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.seconds: dict[str, list[float]] = {}
        self.bytes: dict[str, int] = {}

    def step(self, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        """As in the recipes, with weights known beforehand."""
        mask, times = labels >= 0, [time.process_time()]
        loss, _, _ = self.model(
            tokens, labels, token_weights_BTK=self.alphas_K * mask, distill=self.distill
        )
        times.append(time.process_time())
        loss.backward()
        times.append(time.process_time())
        scale_and_clip_(self.groups, mask.sum((0, 1)), 1, 1.0)
        self.bytes["gradients"] = sum(
            p.grad.nbytes for p in self.model.parameters() if p.grad is not None
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(time.process_time())
        states = self.optimizer.state.values()
        self.bytes["optimizer"] = sum(x.nbytes for one in states for x in one.values())
        parts = dict(zip(("forward", "backward", "update"), pairwise(times), strict=True))
        for name, (start, end) in (parts | {"step": (times[0], times[-1])}).items():
            self.seconds.setdefault(name, []).append(end - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--trunk", type=int, default=12)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"{hardware()}\n$ python {' '.join(sys.argv)}\n")
    print(
        f"D={args.width}, V={args.vocab}, {args.trunk} trunk blocks + {K} heads, {args.rows} x "
        f"{args.tokens} tokens, fp32, {args.rounds} rounds after 2\n"
        "processor seconds (median); ratio to full in pairs (quartiles); MiB after the step"
    )
    torch.manual_seed(0)
    tokens = torch.randint(args.vocab, (args.rows, args.tokens))
    doc = torch.zeros_like(tokens)
    labels = mtp_labels(tokens, doc >= 0, doc, K)
    kinds = {name: Kind(args, *how) for name, how in KINDS.items()}
    for _ in range(args.rounds + 2):
        for kind in kinds.values():
            kind.step(tokens, labels)
    parts = ("forward", "backward", "update", "step")
    print(f"{'':17}{''.join(f'{part:>10}' for part in parts)}   ratio               grads    AdamW")
    full, medians = kinds["full"].seconds["step"][2:], {}
    for name, kind in kinds.items():
        of_parts = [sorted(kind.seconds[part][2:])[args.rounds // 2] for part in parts]
        ratios = sorted(b / a for a, b in zip(full, kind.seconds["step"][2:], strict=True))
        n, mib = len(ratios), [size / 2**20 for size in kind.bytes.values()]
        medians[name] = ratios[n // 2]
        print(
            f"{name:17}{''.join(f'{part:10.3f}' for part in of_parts)}   {ratios[n // 2]:.3f} "
            f"({ratios[n // 4]:.3f}-{ratios[3 * n // 4]:.3f}){mib[0]:9.1f}{mib[1]:9.1f}"
        )
    good = medians["only"] <= LIMIT
    print(f"{'PASS' if good else 'FAIL'}: a step of heads only takes at most {LIMIT} of a full one")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
