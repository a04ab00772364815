"""``generate`` of a ``--to hf-mtp`` folder in transformers, with its heads and without them.

    uv run python benchmarks/hf_generate.py [FOLDER]

The model is that of ``decode_speed.py``: 12 trunk blocks and 4 heads, trained on a generated
family of Python functions, of which it writes unseen ones. With FOLDER it is kept there and not
trained again. Both ways run by turns, prompt by prompt, in one process: ``mtp=False`` is the
``generate`` of transformers itself, on the same weights. One thread.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import decode_speed as family
import torch
import transformers
from common import hardware
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.convert import convert
from wmtp_modules.models import mtp_llama2
from wmtp_modules.quickstarts.stdlib import train_tokenizer

TARGET = 2.0  # times plain generate in wall-clock, greedy, batch 1
N_PROMPTS, REPEATS = 12, 5


def prepare(folder: Path) -> None:
    """Train the model, and write it as ``folder/hf-mtp``."""
    members = family.functions()
    random.Random(0).shuffle(members)
    training = members[200:]
    texts = [first + rest for first, rest in training]
    train_tokenizer(folder, texts[:2000], family.VOCAB)
    tokenizer = Llama2Tokenizer(f"{folder}/tokenizer.model")
    rows = [tokenizer.encode(text) for text in texts]
    torch.manual_seed(0)
    model = mtp_llama2(
        vocab_size=tokenizer.vocab_size,
        num_layers=family.N_TRUNK + family.N_HEADS,
        n_future_tokens=family.N_HEADS,
        num_heads=4,
        num_kv_heads=4,
        embed_dim=family.WIDTH,
        max_seq_len=max(map(len, rows)) + 64,
    )
    family.train(model, rows)
    path = folder / "tokenizer.model"
    save_meta(model, folder / "meta", tokenizer_path=path, dtype=torch.float32)
    print(convert(folder / "meta", folder / "hf-mtp", to="hf-mtp"))


def measure(model, batches: list[dict], **how) -> tuple[float, str]:
    """The ratio of both ways, and a line."""
    seconds, tokens, texts = {True: [], False: []}, 0, {}
    per_forward = []
    for mtp in seconds:  # warm up
        model.generate(**batches[0], **how, mtp=mtp)
    for repeat in range(REPEATS):
        spent, tokens = dict.fromkeys(seconds, 0.0), 0
        for i, batch in enumerate(batches):
            for mtp in (True, False) if (repeat + i) % 2 else (False, True):
                torch.manual_seed(i)
                start = time.perf_counter()
                texts[mtp] = model.generate(**batch, **how, mtp=mtp)
                spent[mtp] += time.perf_counter() - start
                if mtp:
                    per_forward.append(model.last_tokens_per_forward)
            assert torch.equal(texts[True], texts[False]), "the heads have changed the text"
            tokens += int((texts[True][:, batch["input_ids"].shape[1] :] > 0).sum())
        for mtp in seconds:
            seconds[mtp].append(spent[mtp])
    ratios = [plain / fast for plain, fast in zip(seconds[False], seconds[True], strict=True)]
    speeds = [tokens / median(seconds[mtp]) for mtp in (False, True)]
    line = (
        f"{sum(per_forward) / len(per_forward):8.2f}{speeds[0]:10.0f}{speeds[1]:12.0f}"
        f"{median(ratios):8.2f}x  {min(ratios):.2f}-{max(ratios):.2f}"
    )
    return median(ratios), line


def run(folder: Path) -> None:
    if not (folder / "hf-mtp").exists():
        prepare(folder)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder / "hf-mtp", trust_remote_code=True).eval()
    encode = transformers.AutoTokenizer.from_pretrained(
        folder / "hf-mtp", padding_side="left", pad_token="<unk>"
    )
    members = family.functions()
    random.Random(0).shuffle(members)
    prompts = [first for first, _ in members[:N_PROMPTS]]
    how = dict(max_new_tokens=92, pad_token_id=0, eos_token_id=2)
    print(
        f"transformers {transformers.__version__}; {N_PROMPTS} unseen prompts, {REPEATS} repeats: "
        "medians, and the range of the ratio; both texts the same in every call"
    )
    print(f"{'':28}{'tokens/':>8}{'mtp=False':>10}{'hf-mtp':>12}{'ratio':>8}")
    print(f"{'':28}{'forward':>8}{'tokens/s':>10}{'tokens/s':>12}")
    reached = 0.0
    for name, size, sampling in (
        ("greedy, batch 1", 1, {"do_sample": False}),
        ("temperature 0.8, batch 1", 1, {"do_sample": True, "temperature": 0.8}),
        ("greedy, batch 4", 4, {"do_sample": False}),
        ("greedy, batch 12", 12, {"do_sample": False}),
    ):
        batches = [
            dict(encode(prompts[i : i + size], return_tensors="pt", padding=True))
            for i in range(0, N_PROMPTS, size)
        ]
        ratio, line = measure(model, batches, **how, **sampling)
        reached = reached or ratio
        print(f"{name:28}{line}", flush=True)
    verdict = "PASS" if reached >= TARGET else "FAIL"
    print(f"{verdict}: greedy, batch 1: {reached:.2f}x, at least {TARGET}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="keeps the trained model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(hardware())
    print(" ".join(["python", *sys.argv[:1]]))
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        run(folder)


if __name__ == "__main__":
    main()
