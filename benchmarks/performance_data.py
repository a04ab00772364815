"""Rows of benchmarks/performance.py about data: packing, tokenising, loading."""

import json
import multiprocessing
import resource
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import sentencepiece as spm
from gpu import Table, ratios, spread

T = 4096
PACKING = Table(
    "Packing",
    "Padding of packs of 4096 tokens, against closing a pack at the first row that does not fit: "
    "source of the standard library, and responses of lognormal lengths, 1,111 tokens in the mean.",
    ("rows", "mean", "next fit", "best fit", "limit"),
)
EPOCH = Table(
    "An epoch's packs",
    "Time to deal rows out anew at the start of an epoch; in proportion, it stays the same.",
    ("processor, s", "s per million rows"),
)
TOKENISING = Table(
    "Tokenising",
    "Reading, checking and tokenising rows of JSON, against SentencePiece alone on the same texts "
    "in as many processes; the ratio is of processor time.",
    ("plain, MB/s a core", "rows, MB/s a core", "speed ratio"),
)
LOADING = Table(
    "Loading",
    "Packs of 4096 tokens read from disk with the scores of four heads, one after the other; in "
    "batches, what a training process waits whose steps leave 20 ms between two of them.",
    ("ms a pack", "ratio"),
)

Rows = Iterator[tuple[str, dict[str, Any]]]


def response_lengths(n: int, spread_: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.lognormal(np.log(1111) - spread_**2 / 2, spread_, n).clip(20, T).astype(np.int64)


def text_lengths(folder: Path) -> np.ndarray:
    """Tokens of each row of the library's files, with BOS and EOS."""
    from wmtp_modules.quickstarts.stdlib import stdlib_files, train_tokenizer

    texts = [path.read_text("utf-8", "ignore") for path in stdlib_files()]
    tokenizer = train_tokenizer(folder, texts[::4], 8000)
    whole = [len(ids) + 2 for ids in tokenizer.encode(texts)]
    return np.array([min(T, n - at) for n in whole for at in range(0, n, T)])


def rows_of(lengths: np.ndarray) -> datasets.Dataset:
    """Rows of these lengths whose tokens take no memory."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    tokens = pa.LargeListArray.from_arrays(offsets, pa.nulls(int(lengths.sum())))
    return datasets.Dataset(pa.table({"tokens": tokens}))


def next_fit(lengths: np.ndarray) -> int:
    """Packs, if one is closed when a row does not fit."""
    n_packs = room = 0
    for length in np.random.default_rng(0).permutation(lengths).tolist():
        if length > room:
            n_packs, room = n_packs + 1, T
        room -= length
    return n_packs


def packing_rows(quick: bool) -> Rows:
    from wmtp_modules.data.packing import PackedDataset

    n, kinds = 20_000 if quick else 200_000, {}
    if not quick:
        with tempfile.TemporaryDirectory() as folder:
            kinds["text"] = (text_lengths(Path(folder)), 0.01)
    kinds |= {f"responses, spread {s}": (response_lengths(n, s), 0.03) for s in (0.3, 0.6)}
    for name, (lengths, limit) in kinds.items():
        before = 1 - lengths.sum() / (next_fit(lengths) * T)
        share = PackedDataset(rows_of(lengths), max_seq_len=T, seed=0).padding_share
        yield (
            name,
            {
                "rows": f"{len(lengths):,}",
                "mean": f"{lengths.mean():.0f}",
                "next fit": f"{before:.2%}",
                "best fit": f"{share:.2%}",
                "limit": f"{limit:.0%}",
            },
        )


def epoch_rows(quick: bool) -> Rows:
    from wmtp_modules.data.packing import PackedDataset

    for n in (100_000, 200_000) if quick else (1_000_000, 10_000_000):
        packed = PackedDataset(rows_of(response_lengths(n, 0.6)), max_seq_len=T, seed=0)
        started = time.process_time()
        packed.set_epoch(1)
        seconds = time.process_time() - started
        per_million = f"{seconds / n * 1e6:.2f}"
        yield f"{n:,} rows", {"processor, s": f"{seconds:.2f}", "s per million rows": per_million}


# -------------------------------------------------------------------------------------- tokenising


def processor_s() -> float:
    """Seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def encode_all(processor: spm.SentencePieceProcessor, texts: list[str]) -> None:
    for text in texts:
        processor.encode(text)


def tokenising_rows(quick: bool) -> Rows:
    from torchtune.models.llama2 import llama2_tokenizer

    from wmtp_modules.data import rows as rows_module
    from wmtp_modules.data import rows_dataset
    from wmtp_modules.progress import quiet_datasets
    from wmtp_modules.quickstarts.stdlib import train_tokenizer

    quiet_datasets()
    cores, megabytes = 2, 0.5 if quick else 40
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    code = "".join(path.read_text("utf-8", "replace") for path in files).replace("\0", "")
    texts = [code[at : at + 3000] for at in range(0, len(code), 3000)]
    texts = (texts * (1 + int(megabytes * 1e6 / len(code))))[: int(megabytes * 1e6 / 3000)]
    n_bytes = sum(len(text.encode()) for text in texts)
    forms: dict[str, Any] = {
        "text": lambda text: {"text": text},
        "prompt, response": lambda text: {"prompt": text[:300], "response": text[300:]},
    }
    figures: dict[str, list[tuple]] = {name: [] for name in forms}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train_tokenizer(folder, [code[:2_000_000]], 1000 if quick else 8000)
        tokenizer = llama2_tokenizer(f"{folder}/tokenizer.model", max_seq_len=4096)
        cache = mock.patch.object(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        processes = mock.patch.object(rows_module, "n_processes", return_value=cores)
        with cache, processes:
            for i, (name, form) in enumerate([*forms.items()] * (1 if quick else 3)):
                # By as many processes as there are cores: they share caches and memory.
                started, own = time.perf_counter(), processor_s()
                with multiprocessing.get_context("fork").Pool(cores) as pool:
                    parts = [texts[k::cores] for k in range(cores)]
                    pool.map(partial(encode_all, tokenizer._spm_model.spm_model), parts)
                    pool.close()
                    pool.join()
                plain, plain_s = time.perf_counter() - started, processor_s() - own
                source = folder / f"{i}.jsonl"
                source.write_text("".join(json.dumps(form(text)) + "\n" for text in texts))
                started, own = time.perf_counter(), processor_s()
                rows_dataset(tokenizer, source=str(source))
                ours, ours_s = time.perf_counter() - started, processor_s() - own
                figures[name].append((plain, ours, plain_s / ours_s))
    for name, taken in figures.items():
        plain, ours, share = map(list, zip(*taken, strict=True))
        yield (
            name,
            {
                "plain, MB/s a core": f"{n_bytes / 1e6 / cores / median(plain):.2f}",
                "rows, MB/s a core": f"{n_bytes / 1e6 / cores / median(ours):.2f}",
                "speed ratio": spread(share),
            },
        )


# ----------------------------------------------------------------------------------------- loading


class RowByRow:
    """A score table that is read a row at a time."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __getitem__(self, row: int) -> np.ndarray:
        return self._table[row]


def loading_rows(quick: bool) -> Rows:
    from wmtp_modules.data.loader import EpochLoader
    from wmtp_modules.data.packing import PackedDataset
    from wmtp_modules.scoring.score_table import ScoreTable, compute_scores

    rng, n = np.random.default_rng(0), 300 if quick else 3000
    lengths = rng.integers(60, 400, n)
    made_from = {"checkpoint": "a", "tokenizer": "b", "dataset": "c", "max_seq_len": T}
    made_from |= {"kind": "d", "n_heads": 4}
    with tempfile.TemporaryDirectory() as folder:
        made = {
            "tokens": [rng.integers(3, 8000, x).tolist() for x in lengths],
            "keep": [[True] * int(x) for x in lengths],
        }
        datasets.Dataset.from_dict(made).save_to_disk(f"{folder}/rows")
        rows = datasets.load_from_disk(f"{folder}/rows")
        compute_scores(
            f"{folder}/table",
            made_from,
            rows,
            lambda batch: [np.ones((len(tokens), 4), np.float32) for tokens in batch],
            batch_tokens=8192,
        )
        table = ScoreTable.open(f"{folder}/table", made_from, rows)

        def packed(**scores: Any) -> PackedDataset:
            return PackedDataset(rows, max_seq_len=T, seed=0, scores=scores)

        kinds = {
            "scores of a pack in one reading": packed(reference=table),
            "scores a row at a time": packed(reference=RowByRow(table)),
            "no scores": packed(),
        }
        taken: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(3):
            for name, dataset in kinds.items():
                started = time.process_time()
                for i in range(len(dataset)):
                    dataset[i]
                taken[name].append(1000 * (time.process_time() - started) / len(dataset))
        first = "scores of a pack in one reading"
        for name, own in taken.items():
            yield name, {"ms a pack": spread(own), "ratio": ratios(own, taken[first])}
        waited: dict[str, list[float]] = {}
        for _ in range(2 if quick else 3):
            for workers in (0, 2):
                loader = EpochLoader(kinds[first], 2, 0, 1, 2, workers=workers)
                own = waited.setdefault(f"batches of 2, {workers} workers", [])
                own.append(1000 * waiting(loader, 0.02))
        without, *_ = waited.values()
        for name, own in waited.items():
            yield name, {"ms a pack": spread(own), "ratio": ratios(own, without)}


def waiting(loader: Any, step_s: float) -> float:
    """Seconds a pack that a training process waits, whose steps take so long without a processor.

    The first batch, for which workers have to start, does not count.
    """
    waited, packs, started = 0.0, 0, None
    for batch in loader:
        if started is not None:
            waited, packs = waited + time.perf_counter() - started, packs + len(batch["tokens"])
        time.sleep(step_s)
        started = time.perf_counter()
    return waited / packs
