"""How fast rows are tokenised, per core, beside plain encoding: ``python benchmarks/tokenise.py``.

Plain encoding is SentencePiece's ``encode`` of each text in as many processes, nothing else. On top
of it ``rows_dataset`` reads, checks, looks for evaluation tasks, makes masks and writes, and starts
its processes, of which a large source shows nothing. The tokenizer and the texts are made from
Python's standard library.
"""

import argparse
import json
import multiprocessing
import resource
import sysconfig
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import sentencepiece as spm
from torchtune.models.llama2 import llama2_tokenizer

from wmtp_modules.data import rows as rows_module
from wmtp_modules.data import rows_dataset
from wmtp_modules.progress import quiet_datasets


def processor_s() -> float:
    """Seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def encode_all(processor: spm.SentencePieceProcessor, texts: list[str]) -> None:
    for text in texts:
        processor.encode(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=40.0)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of each form, in turn")
    args = parser.parse_args()
    quiet_datasets()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    code = "".join(path.read_text("utf-8", "replace") for path in files).replace("\0", "")
    texts = [code[at : at + 3000] for at in range(0, len(code), 3000)]
    texts = (texts * (1 + int(args.megabytes * 1e6 / len(code))))[
        : int(args.megabytes * 1e6 / 3000)
    ]
    n_bytes = sum(len(text.encode()) for text in texts)
    forms: dict[str, Any] = {
        "text": lambda text: {"text": text},
        "prompt, response": lambda text: {"prompt": text[:300], "response": text[300:]},
    }
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.txt")
        corpus.write_text(code)
        spm.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=f"{folder}/t", vocab_size=8000, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
            remove_extra_whitespaces=False, pad_id=-1,
        )  # fmt: skip
        tokenizer = llama2_tokenizer(f"{folder}/t.model", max_seq_len=4096)
        rows_module.n_processes = lambda n_bytes: args.cores
        print(f"{n_bytes / 1e6:.0f} MB in {len(texts)} rows, {args.cores} cores")
        shares: dict[str, list[float]] = {name: [] for name in forms}
        for i, (name, form) in enumerate([*forms.items()] * args.repeats):
            # By as many processes as there are cores: they share caches and memory.
            started, own = time.perf_counter(), processor_s()
            with multiprocessing.get_context("fork").Pool(args.cores) as pool:
                parts = [texts[k :: args.cores] for k in range(args.cores)]
                pool.map(partial(encode_all, tokenizer._spm_model.spm_model), parts)
                pool.close()
                pool.join()
            plain = n_bytes / (time.perf_counter() - started) / 1e6 / args.cores
            plain_s = processor_s() - own
            source = Path(folder, f"{i}.jsonl")
            source.write_text("".join(json.dumps(form(text)) + "\n" for text in texts))
            datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
            started, own = time.perf_counter(), processor_s()
            rows_dataset(tokenizer, source=str(source))
            ours = n_bytes / (time.perf_counter() - started) / 1e6 / args.cores
            share = plain_s / (processor_s() - own)
            print(
                f"{name}: plain {plain:.2f} MB/s, rows {ours:.2f} MB/s a core: {ours / plain:.0%} "
                f"by the clock, {share:.0%} in processor time (which other work changes less)",
                flush=True,
            )
            shares[name].append(share)
        for name, own in shares.items():
            print(
                f"{name}: median {median(own):.0%} of plain encoding in processor time, "
                f"{min(own):.0%} to {max(own):.0%}"
            )


if __name__ == "__main__":
    main()
