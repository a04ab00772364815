"""Self-speculative against plain decoding: a trained model, and random weights as a control.

    uv run python benchmarks/decode_speed.py

Trains a model of 12 trunk blocks and 4 heads on a generated family of Python functions, then lets
it write functions that it has not seen, from their first lines. Both decodings run by turns, prompt
by prompt, in one process, to the function's end. One thread: at this size a second one waits.
"""

import itertools
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import hardware
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.generation.generate import Request, generate
from wmtp_modules.generation.measure import measure_decoding
from wmtp_modules.loss.mtp_loss import mtp_labels
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.quickstarts.stdlib import train_tokenizer

TARGET = 2.0  # times plain decoding in wall-clock, greedy, batch 1
N_TRUNK, N_HEADS, WIDTH = 12, 4, 64
STEPS, BATCH, LR, WARM_UP = 450, 16, 3e-3, 50
N_PROMPTS, REPEATS, VOCAB = 12, 5, 448

NOUNS = ["price", "score", "age", "size", "point", "mark", "weight", "step", "rate", "cost"]
CHANGES = [("add", "+", "to"), ("subtract", "-", "from"), ("multiply", "*", "into")]
TESTS = [("above", ">"), ("below", "<")]


def functions() -> list[tuple[str, str]]:
    """Every member of the family, as first line and rest; the first line determines the rest."""
    made = []
    for noun, n in itertools.product(NOUNS, range(2, 60)):
        for verb, sign, preposition in CHANGES:
            made.append(
                (
                    f"def {verb}_{n}_{preposition}_{noun}s({noun}s):\n",
                    f'    """{verb.title()} {n} {preposition} each of the {noun}s."""\n'
                    f"    result = []\n"
                    f"    for {noun} in {noun}s:\n"
                    f"        result.append({noun} {sign} {n})\n"
                    f"    return result\n",
                )
            )
        for word, sign in TESTS:
            made.append(
                (
                    f"def count_{noun}s_{word}_{n}({noun}s):\n",
                    f'    """Return how many of the {noun}s are {word} {n}."""\n'
                    f"    count = 0\n"
                    f"    for {noun} in {noun}s:\n"
                    f"        if {noun} {sign} {n}:\n"
                    f"            count += 1\n"
                    f"    return count\n",
                )
            )
            made.append(
                (
                    f"def first_{noun}_{word}_{n}({noun}s):\n",
                    f'    """Return the first of the {noun}s that is {word} {n}, or None."""\n'
                    f"    for {noun} in {noun}s:\n"
                    f"        if {noun} {sign} {n}:\n"
                    f"            return {noun}\n"
                    f"    return None\n",
                )
            )
    return made


def batches(
    rows: list[list[int]], rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless tokens_BT and labels_BTK, one function a row."""
    while True:
        chosen = rng.sample(rows, BATCH)
        T = max(map(len, chosen))
        tokens_BT = torch.tensor([row + [0] * (T - len(row)) for row in chosen])
        doc_BT = torch.tensor([[0] * len(row) + [-1] * (T - len(row)) for row in chosen])
        yield tokens_BT, mtp_labels(tokens_BT, doc_BT == 0, doc_BT, N_HEADS)


def train(model: MTPTransformer, rows: list[list[int]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS)),
    )
    start = time.perf_counter()
    for step, (tokens_BT, labels_BTK) in enumerate(batches(rows, random.Random(0)), 1):
        losses_BTK = model(tokens_BT, labels_BTK)
        kept_BTK = labels_BTK >= 0
        loss = (losses_BTK * kept_BTK).sum() / kept_BTK.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in (1, STEPS // 4, STEPS // 2, STEPS):
            seconds = time.perf_counter() - start
            print(f"  step {step:4}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
        if step == STEPS:
            return


def report(
    name: str, model: MTPTransformer, tokenizer: Llama2Tokenizer, requests: list[Request], **how
) -> float:
    """Print one line; the speed-up."""
    settings = dict(temperature=0.0, top_p=1.0, top_k=0, stop=(), dtype=torch.float32)
    found = measure_decoding(model, tokenizer, requests, repeats=REPEATS, **settings | how)
    ratios = [
        plain / fast
        for plain, fast in zip(
            found["plain_seconds"], found["self_speculative_seconds"], strict=True
        )
    ]
    shares = " ".join(f"{share:.2f}" for share in found["acceptance_per_head"])
    print(
        f"{name:34}{found['tokens_per_forward']:8.2f}   {shares}"
        f"{found['plain_tokens_per_s']:10.0f}{found['self_speculative_tokens_per_s']:10.0f}"
        f"{found['speedup']:9.2f}x  {min(ratios):.2f}-{max(ratios):.2f}"
        f"   {'yes' if found['identical'] else 'no'}",
        flush=True,
    )
    return found["speedup"]


def main() -> None:
    torch.set_num_threads(1)
    print(hardware())
    print(" ".join(["python", *sys.argv]))
    members = functions()
    random.Random(0).shuffle(members)
    heldout, training = members[:200], members[200:]
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(Path(folder), [first + rest for first, rest in training[:2000]], VOCAB)
        tokenizer = Llama2Tokenizer(f"{folder}/tokenizer.model")
    rows = [tokenizer.encode(first + rest) for first, rest in training]
    prompts = [tuple(tokenizer.encode(first, add_eos=False)) for first, _ in heldout]
    longest = max(map(len, rows))

    def build() -> MTPTransformer:
        torch.manual_seed(0)
        return mtp_llama2(
            vocab_size=tokenizer.vocab_size,
            num_layers=N_TRUNK + N_HEADS,
            n_future_tokens=N_HEADS,
            num_heads=4,
            num_kv_heads=4,
            embed_dim=WIDTH,
            max_seq_len=longest + 64,
        )

    model = build()
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{N_TRUNK} trunk blocks, {N_HEADS} heads, width {WIDTH}, {size / 1e6:.2f}M parameters; "
        f"{len(rows)} functions, the longest of {longest} tokens, {len(heldout)} held out"
    )
    train(model, rows)
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    max_new_tokens = longest
    done = generate(
        model,
        tokenizer,
        requests,
        decoding="self_speculative",
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        stop=(),
        dtype=torch.float32,
    )
    right = sum(g.text == rest for g, (_, rest) in zip(done, heldout, strict=True))
    tokens = sum(len(g.tokens) for g in done) / len(done)
    print(f"held out: {right} of {len(done)} written exactly, {tokens:.0f} tokens each")
    print(
        f"{N_PROMPTS} held-out prompts (random weights: 4), {REPEATS} repeats: medians, and the "
        "range of the ratio; prefill included"
    )
    print(
        f"{'':34}{'tokens/':>8}   {'kept guesses of':15}{'plain':>9}{'self-spec.':>12}"
        f"{'ratio':>6}\n{'':34}{'forward':>8}   {'heads 1 2 3':15}{'tokens/s':>9}{'tokens/s':>12}"
        f"{'':18}identical"
    )
    few = requests[:N_PROMPTS]
    settings = dict(max_new_tokens=max_new_tokens)
    reached = report("trained, greedy, batch 1", model, tokenizer, few, batch_size=1, **settings)
    report(
        "trained, temperature 0.8, batch 1",
        model,
        tokenizer,
        few,
        batch_size=1,
        temperature=0.8,
        **settings,
    )
    report("trained, greedy, batch 4", model, tokenizer, few, batch_size=4, **settings)
    report("trained, greedy, batch 12", model, tokenizer, few, batch_size=12, **settings)
    report("random weights, greedy, batch 1", build(), tokenizer, few[:4], batch_size=1, **settings)
    print(
        f"{'PASS' if reached >= TARGET else 'FAIL'}: greedy, batch 1: {reached:.2f}x, "
        f"at least {TARGET}x"
    )


if __name__ == "__main__":
    main()
