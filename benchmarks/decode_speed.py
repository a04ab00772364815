"""Self-speculative against plain decoding: a trained model, and random weights as a control.

    uv run python benchmarks/decode_speed.py --model DIR

Trains a model of 12 trunk blocks and 4 heads on a generated family of Python functions, or takes
the one that an earlier run left in DIR (Meta's format), then lets it write functions that it has
not seen, from their first lines. Both decodings run by turns, in one process, to the function's
end. The last rows compare batches that waiting requests enter with static ones: one prompt in
eight is a first line, the others lack less than a quarter of the rest, so that outputs are of
unlike length. One thread: at this size a second one waits.
"""

import argparse
import itertools
import math
import random
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from common import hardware
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.checkpoints.read import load_into
from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.generation.generate import Generation, Request, generate
from wmtp_modules.generation.measure import measure_decoding
from wmtp_modules.loss.mtp_loss import mtp_labels
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.quickstarts.stdlib import train_tokenizer

# In wall-clock, greedy: times plain decoding, and times static batches.
TARGETS = {"batch 1": 2.3, "batch 16": 1.3, "refill": 1.3}
N_TRUNK, N_HEADS, WIDTH = 12, 4, 64
STEPS, BATCH, LR, WARM_UP = 450, 16, 3e-3, 50
N_PROMPTS, N_BATCHED, N_REFILL, REPEATS, VOCAB = 12, 64, 128, 5, 448

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


GREEDY = dict(temperature=0.0, top_p=1.0, top_k=0, stop=(), dtype=torch.float32)


def report(
    name: str, model: MTPTransformer, tokenizer: Llama2Tokenizer, requests: list[Request], **how
) -> float:
    """Print one line; the speed-up."""
    found = measure_decoding(model, tokenizer, requests, repeats=REPEATS, **GREEDY | how)
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


def report_refill(
    model: MTPTransformer, tokenizer: Llama2Tokenizer, requests: list[Request], **how
) -> float:
    """Print one line of a decoding: static batches of 16 against slots; the speed-up."""

    def slots() -> list[Generation]:
        return generate(model, tokenizer, requests, batch_size=16, **GREEDY | how)

    def static() -> list[Generation]:
        batches = (requests[i : i + 16] for i in range(0, len(requests), 16))
        return [
            g for b in batches for g in generate(model, tokenizer, b, batch_size=16, **GREEDY | how)
        ]

    ways = {"static": static, "slots": slots}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    made = {}
    for turn in range(REPEATS + 1):  # the first warms up
        for name in reversed(ways) if turn % 2 else ways:
            start = time.perf_counter()
            made[name] = ways[name]()
            seconds[name] += [time.perf_counter() - start] if turn else []
    ratios = [a / b for a, b in zip(seconds["static"], seconds["slots"], strict=True)]
    n_tokens = sum(len(g.tokens) for g in made["slots"])
    speed = {name: n_tokens / median(took) for name, took in seconds.items()}
    same = [g.tokens for g in made["static"]] == [g.tokens for g in made["slots"]]
    ratio = speed["slots"] / speed["static"]
    print(
        f"{how['decoding']:20}{speed['static']:10.0f}{speed['slots']:10.0f}{ratio:9.2f}x  "
        f"{min(ratios):.2f}-{max(ratios):.2f}   {'yes' if same else 'no'}",
        flush=True,
    )
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of the trained model; made if missing")
    folder = parser.parse_args().model
    torch.set_num_threads(1)
    print(hardware())
    print("python benchmarks/decode_speed.py" + " --model DIR" * bool(folder))
    members = functions()
    random.Random(0).shuffle(members)
    heldout, training = members[:200], members[200:]
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary) / "model"
        found = folder.exists()
        if not found:
            train_tokenizer(
                Path(temporary), [first + rest for first, rest in training[:2000]], VOCAB
            )
        path = folder if found else Path(temporary)
        tokenizer = Llama2Tokenizer(str(path / "tokenizer.model"))
        rows = [tokenizer.encode(first + rest) for first, rest in training]
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
                max_seq_len=2 * longest,
            )

        model = build()
        size = sum(p.numel() for p in model.parameters())
        print(
            f"{N_TRUNK} trunk blocks, {N_HEADS} heads, width {WIDTH}, {size / 1e6:.2f}M parameters;"
            f" {len(rows)} functions, the longest of {longest} tokens, {len(heldout)} held out"
        )
        if found:
            load_into(model, folder, device="cpu")
        else:
            train(model, rows)
            save_meta(model, folder, tokenizer_path=path / "tokenizer.model", dtype=torch.float32)
    requests = [
        Request(tuple(tokenizer.encode(first, add_eos=False)), seed)
        for seed, (first, _) in enumerate(heldout)
    ]
    settings = dict(max_new_tokens=longest)
    done = generate(
        model, tokenizer, requests, batch_size=16, decoding="self_speculative", **GREEDY | settings
    )
    right = sum(g.text == rest for g, (_, rest) in zip(done, heldout, strict=True))
    tokens = sum(len(g.tokens) for g in done) / len(done)
    print(f"held out: {right} of {len(done)} written exactly, {tokens:.0f} tokens each")
    print(
        f"{N_PROMPTS} held-out prompts ({N_BATCHED} at batch 16, 4 with random weights), {REPEATS} "
        "repeats: medians, and the range of the ratio; prefill included"
    )
    print(
        f"{'':34}{'tokens/':>8}   {'kept guesses of':15}{'plain':>9}{'self-spec.':>12}"
        f"{'ratio':>6}\n{'':34}{'forward':>8}   {'heads 1 2 3':15}{'tokens/s':>9}{'tokens/s':>12}"
        f"{'':18}identical"
    )
    few, many = requests[:N_PROMPTS], requests[:N_BATCHED]
    reached = {}
    line = partial(report, tokenizer=tokenizer, **settings)
    reached["batch 1"] = line("trained, greedy, batch 1", model, requests=few, batch_size=1)
    line("trained, temperature 0.8, batch 1", model, requests=few, batch_size=1, temperature=0.8)
    line("trained, greedy, batch 4", model, requests=few, batch_size=4)
    reached["batch 16"] = line("trained, greedy, batch 16", model, requests=many, batch_size=16)
    line("random weights, greedy, batch 1", build(), requests=few[:4], batch_size=1)
    rng, cut = random.Random(0), []
    for request, g in zip(requests[:N_REFILL], done, strict=False):
        text, start = (*request.prompt, *g.tokens), len(request.prompt)
        if rng.random() > 1 / 8:  # most lack a little, some the whole function
            start = rng.randrange(len(text) - len(g.tokens) // 4, len(text))
        cut.append(Request(text[:start], request.seed))
    lengths = sorted(
        len(g.tokens)
        for g in generate(
            model, tokenizer, cut, batch_size=16, decoding="plain", **GREEDY | settings
        )
    )
    print(
        f"{len(cut)} outputs of {lengths[0]} to {lengths[-1]} tokens, half of them below "
        f"{lengths[len(cut) // 2]}, at batch 16: static batches, whose rows leave as they end, "
        f"against slots that others enter\n{'':20}{'static':>10}{'slots':>10}{'ratio':>9}"
    )
    report_refill(model, tokenizer, cut, decoding="plain", **settings)
    reached["refill"] = report_refill(
        model, tokenizer, cut, decoding="self_speculative", **settings
    )
    for name, least in TARGETS.items():
        print(
            f"{'PASS' if reached[name] >= least else 'FAIL'}: {name}: {reached[name]:.2f}x, "
            f"at least {least}x"
        )


if __name__ == "__main__":
    main()
