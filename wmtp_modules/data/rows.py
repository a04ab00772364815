"""Builds tokenised rows: reads a source, drops what must not be trained on, tokenises, caches.

The cache has a folder for everything that shapes the rows: built once for all ranks and restarts,
on all cores of the machine.
"""

import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sentencepiece
from torchtune.models.llama2 import Llama2Tokenizer
from torchtune.utils import get_logger, log_rank_zero

from wmtp_modules.data import contamination, forms, sources, tokenize
from wmtp_modules.data.forms import Sample
from wmtp_modules.data.sources import SHOWN, BadRow, BadRows, Source, fields_of, record_of
from wmtp_modules.files import new_file, new_folder, only_writer, recover_folder
from wmtp_modules.progress import progress_bar, quiet_datasets

FEATURES = datasets.Features(
    {
        "tokens": datasets.List(datasets.Value("int32")),
        "keep": datasets.List(datasets.Value("bool")),
        "noise": datasets.List(datasets.Value("bool")),
        "weight": datasets.List(datasets.Value("float32")),  # None: 1 for each token
        "reward": datasets.Value("float64"),
        "problem_id": datasets.Value("string"),
        # Also as text, because a reward model has its own tokenizer.
        "prompt": datasets.Value("string"),
        "response": datasets.Value("string"),
    }
)
OPTIONAL = ("noise", "weight", "reward", "problem_id", "prompt", "response")
ROWS, REPORT = "rows", "report.json"  # in a folder of the cache
# A process takes a batch of records at a time, and is worth its start from so many bytes on.
BATCH, BYTES_PER_PROCESS = 128, 4_000_000

log = get_logger("INFO")
_sample: "Sampled | None" = None
_bytes_done = multiprocessing.Value("q", 0)  # of all processes: a fork shares it


def rows_dataset(
    tokenizer: Llama2Tokenizer,
    *,
    source: str | list[str],
    split: str = "train",
    validation_fraction: float = 0.0,
    seed: int = 0,
    columns: dict[str, str] | None = None,
    subset: str | None = None,
) -> datasets.Dataset:
    """Tokenised rows of plain text, of prompts and responses, or of conversations.

    Args:
        tokenizer: its ``max_seq_len`` is the length at which plain text is split and beyond which
            any other row is dropped.
        source: file of rows (jsonl, json, csv, parquet, arrow; gzip and zstd too), folder of
            those, ``save_to_disk`` folder, folder of text or code files, pattern, hub name, or a
            list of these. For the fields of rows see ``forms.py`` and docs/data.md.
        split: "train" or "validation".
        validation_fraction: share of the texts, or of the problems, held out by hash; a source
            with its own validation split keeps that.
        seed: of the split.
        columns: the source's name of a field that has another one there: ``{response: answer}``.
        subset: configuration of a hub data set that has several.

    Returns:
        Rows ``tokens`` int32 and ``keep`` bool, and if the source has them ``noise`` bool,
        ``weight`` fp32, ``reward``, ``problem_id``, ``prompt`` and ``response`` (None for plain
        text and for more than one response).

    Raises:
        ValueError: if the source is missing or unusable, or no row remains.
    """
    reader = forms.Reader(columns)
    return build_rows(
        tokenizer,
        source=source,
        split=split,
        seed=seed,
        validation_fraction=validation_fraction,
        to_samples=reader,
        columns=reader.columns,
        cells=reader.cells,
        recipe=f"rows {sorted((columns or {}).items())}",
        hub_config=subset,
    )


@dataclass
class Sampled:
    """A part of each source. ``share``: of the bytes of the last one's files, about."""

    n_bytes: int
    share: float = 1.0


@contextmanager
def sampled(n_bytes: int) -> Iterator[Sampled]:
    """Within, rows are made of the first records alone where files have more bytes than these."""
    global _sample
    _sample = Sampled(n_bytes)
    try:
        yield _sample
    finally:
        _sample = None


def has_marks(rows: datasets.Dataset) -> bool:
    """Whether a token of any row is marked as noise."""
    if "noise" not in rows.column_names:
        return False
    batches = rows.select_columns("noise").with_format("numpy").iter(batch_size=4096)
    return any(np.any(marks) for batch in batches for marks in batch["noise"])


def check_one_response_each(rows: datasets.Dataset) -> None:
    """ValueError unless the supervised tokens of each row are one run, for what rates responses."""
    first = 0
    for batch in rows.select_columns("keep").with_format("numpy").iter(batch_size=1024):
        for i, keep in enumerate(batch["keep"]):
            turns = int(np.count_nonzero(np.diff(keep.astype(np.int8), prepend=0) == 1))
            if turns > 1:
                raise ValueError(
                    f"row {first + i} of the data set has {turns} turns of the assistant, and a "
                    "reward belongs to one response: give one row for each, or train with the "
                    "Rho-1 recipe"
                )
        first += len(batch["keep"])


def check_weights_of(rows: datasets.Dataset, weighting: str, fields: Sequence[str]) -> None:
    """ValueError if no row has a field that a weighting takes its weights from."""
    has = {"noise": has_marks, "weight": lambda rows: "weight" in rows.column_names}
    says = {"noise": "the spans that are wrong", "weight": "a number or spans with one"}
    for field in fields:
        if not has[field](rows):
            raise ValueError(
                f"weighting {weighting} needs rows with a `{field}` field, {says[field]} "
                "(docs/data.md), and no row of dataset has one: add it, name it in "
                "dataset.columns, or take another weighting"
            )


def build_rows(
    tokenizer: Llama2Tokenizer,
    *,
    source: str | Sequence[str],
    split: str,
    seed: int,
    to_samples: Callable[[dict], list[Sample]],
    columns: tuple[str, ...],
    recipe: str,
    validation_fraction: float | None,
    cells: tuple[str, ...] = (),
    hub_config: str | None = None,
    unused: str = "records without a sample",
) -> datasets.Dataset:
    """Build the tokenised rows of a source, or load them memory-mapped from the cache.

    Args beyond those of ``rows_dataset``:
        to_samples: turns a record into samples, or raises ``BadRow``.
        columns: fields of a record that ``to_samples`` reads.
        cells: those of them that are JSON in a csv file.
        recipe: identifies ``to_samples`` and its arguments in the cache.
        validation_fraction: None if ``to_samples`` does the split.
        unused: what the report calls records without a sample.

    Raises:
        ValueError: also if the cache is damaged.
        OSError: if the source cannot be read, or the disk is full.
    """
    max_seq_len = tokenizer.max_seq_len
    if max_seq_len is None or max_seq_len < 2:
        raise ValueError(
            f"tokenizer.max_seq_len is {max_seq_len}: set it to the length of packed rows"
        )
    if split not in ("train", "validation"):
        raise ValueError(f"split must be train or validation, got {split!r}")
    divides_itself = validation_fraction is None
    if not divides_itself and not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction must be at least 0 and below 1, got {validation_fraction}"
        )
    opened = sources.open_sources(source, split, columns, hub_config, cells)
    if split == "validation" and not (divides_itself or validation_fraction):
        opened = [one for one in opened if one.own_split]
        if not opened:
            raise ValueError(
                f"{_named(source)} has no validation split: set validation_fraction (to the same "
                "value for training and validation)"
            )
    whole = [one.own_split or divides_itself for one in opened]
    divide = Divide(0.0 if all(whole) else validation_fraction or 0.0, seed, split)
    most, part = None, {}
    if _sample is not None:
        size = sum(file.stat().st_size for one in opened for file in one.files)
        _sample.share = min(1.0, _sample.n_bytes / max(1, size))
        if _sample.share < 1:
            most, part = _sample.n_bytes, {"first": _sample.n_bytes}
    fingerprint = _fingerprint(
        **part,
        source=[one.fingerprint for one in opened],
        names=[[one.kind, Path(one.name).name, one.own_split] for one in opened],
        recipe=recipe,
        split=split if divide.fraction else None,
        fraction=divide.fraction,
        seed=seed if divide.fraction else None,
        max_seq_len=max_seq_len,
        tokenizer=hashlib.sha256(
            tokenizer._spm_model.spm_model.serialized_model_proto()
        ).hexdigest(),
    )
    folder = Path(datasets.config.HF_DATASETS_CACHE, "wmtp", fingerprint)
    recover_folder(folder)
    quiet_datasets()
    if not folder.exists():
        texts, guard = tuple(one.kind == "text" for one in opened), contamination.EvaluationGuard()
        make = Make(tokenizer, to_samples, divide, guard, tuple(whole), texts, unused)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with only_writer(folder):
                if not folder.exists():  # another process may have made it meanwhile
                    with new_folder(folder, replace=False) as unfinished:
                        _generate(unfinished, opened, make, most)
        except ValueError as error:
            raise ValueError(f"{_named(source)} ({split}): {error}") from error
        except OSError as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            raise OSError(
                error.errno,
                f"{_named(source)} ({split}): its rows could not be read or cached "
                f"({cause.strerror or cause}): make room for {folder}, or set HF_HOME to a "
                "folder on another disk",
            ) from error
    try:
        rows = datasets.load_from_disk(str(folder / ROWS))
        report = json.loads((folder / REPORT).read_text())
        text = f"{report['read']} in {report['note']}; {report['left out']}"
        unset = [name for name in OPTIONAL if not report["has"].get(name)]
        if len(rows) != report["count"]["rows"]:
            raise ValueError("rows are missing")
    except Exception as error:  # datasets has no exception class for damage
        if isinstance(error, PermissionError):
            raise
        raise ValueError(
            f"{_named(source)} ({split}): the cached rows in {folder} are damaged: delete that "
            "folder to rebuild them"
        ) from error
    log_rank_zero(log, f"{_named(source)} ({split}): {text}")
    return rows.remove_columns(unset)


def _named(source: str | Sequence[str]) -> str:
    return str(source) if isinstance(source, str | Path) else sources.listed(source)


@dataclass(frozen=True)
class Divide:
    """Which samples of a source without a validation split of its own belong to ``split``."""

    fraction: float
    seed: int
    split: str

    def takes(self, sample: Sample) -> bool:
        if not self.fraction:
            return True
        # By problem, so that no solution of a held-out problem is trained on.
        group = sample.problem_id or sample.first_prompt or sample.response
        digest = hashlib.blake2b(f"{self.seed} {group}".encode(), digest_size=8).digest()
        is_held_out = int.from_bytes(digest) < self.fraction * 2**64
        return is_held_out == (self.split == "validation")


@dataclass(frozen=True)
class Make:
    """How records become rows; each process has its own copy."""

    tokenizer: Llama2Tokenizer
    to_samples: Callable[[dict], list[Sample]]
    divide: Divide
    guard: contamination.EvaluationGuard
    whole: tuple[bool, ...]  # of each source: it has its own split, or to_samples divides it
    texts: tuple[bool, ...]  # of each source: its records are files of text
    unused: str


def n_processes(n_bytes: int) -> int:
    """Processes that tokenise so many bytes: the cores that this one may use, if it is worth it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, n_bytes // BYTES_PER_PROCESS))


def _generate(folder: Path, opened: list[Source], make: Make, most: int | None) -> None:
    """Write rows and report into the folder of the cache.

    First the records are copied as they are, from whatever format, which takes next to nothing;
    then all processes read, check and tokenise their share.
    """
    spilled, counts = folder / "records.arrow", folder / "counts"
    counts.mkdir()
    parts, n_bytes = _spill(spilled, opened, most)
    records = datasets.Dataset.from_file(str(spilled))
    _bytes_done.value = 0
    n = n_processes(n_bytes)
    with _progress(opened, n_bytes):
        rows = records.with_format("arrow").map(
            _make_batch,
            batched=True,
            batch_size=BATCH,
            writer_batch_size=BATCH,
            with_indices=True,
            remove_columns=records.column_names,
            features=datasets.Features(FEATURES | {"digest": datasets.Value("uint64")}),
            fn_kwargs={"make": make, "counts": str(counts)},
            num_proc=n if n > 1 else None,
            cache_file_name=str(folder / "made.arrow"),
            new_fingerprint=folder.name.partition(".")[0],
        )
    report = _report(parts, counts, rows, opened, make)
    # Written once more, at the speed of the disk: the files do not tell how many processes made it.
    rows.with_format(None).remove_columns("digest").save_to_disk(str(folder / ROWS))
    with new_file(folder / REPORT) as unfinished:
        unfinished.write_text(json.dumps(report))
    del rows, records
    for path in (spilled, *folder.glob("made*.arrow"), *counts.iterdir()):
        path.unlink()
    counts.rmdir()


def _spill(path: Path, opened: list[Source], most: int | None) -> tuple[list[str], int]:
    """Copy all records into an Arrow file; the names of the parts, and bytes of records.

    ``most`` are bytes after which it is enough. A record is a line of JSON, or why it cannot be
    read.
    """
    schema = pa.schema(
        {
            "source": pa.int32(), "part": pa.int32(), "where": pa.large_string(),
            "record": pa.large_binary(), "bad": pa.large_string(),
        }
    )  # fmt: skip
    names, n_bytes = [], 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for number, source in enumerate(opened):
            for name, records in source.raw_parts():
                while (most is None or n_bytes < most) and (batch := list(islice(records, BATCH))):
                    lines = [None if isinstance(r, BadRow) else _line(r) for _, r in batch]
                    bad = [
                        json.dumps([str(r), r.kind]) if isinstance(r, BadRow) else None
                        for _, r in batch
                    ]
                    where = [w for w, _ in batch]
                    columns = [[number] * len(batch), [len(names)] * len(batch), where, lines, bad]
                    arrays = [
                        pa.array(c, kind) for c, kind in zip(columns, schema.types, strict=True)
                    ]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
                    n_bytes += sum(len(line) for line in lines if line)
                names.append(name)
    return names, n_bytes


def _line(record: dict | bytes) -> bytes:
    # What JSON has no word for is told by its type, as a value that cannot be used.
    unlike = {"default": lambda value: {type(value).__name__: str(value)}}
    return record if isinstance(record, bytes) else json.dumps(record, **unlike).encode()


@contextmanager
def _progress(opened: list[Source], n_bytes: int) -> Iterator[None]:
    """A bar of what all processes have done; other ranks wait for it."""
    ended = threading.Event()
    shown = int(os.environ.get("RANK", 0)) == 0 and n_bytes > BYTES_PER_PROCESS
    with progress_bar(
        desc=f"tokenising {opened[0].name}", total=n_bytes, unit="B", unit_scale=True, shown=shown
    ) as bar:

        def look() -> None:
            while not ended.wait(0.5):
                bar.update(_bytes_done.value - bar.n)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            bar.update(_bytes_done.value - bar.n)


def _make_batch(table: pa.Table, indices: list[int], make: Make, counts: str) -> pa.Table:
    """Rows of a batch of records; what else there is to say goes to a file of its own."""
    count, excluded = Counter[str](), Counter[str]()
    valid, bad = Counter[int](), defaultdict[int, BadRows](BadRows)
    of_batch = list[Sample]()
    batch = (table[name].to_pylist() for name in ("source", "part", "where", "record", "bad"))
    for number, part, where, line, why in zip(*batch, strict=True):
        count["read"] += 1
        record = BadRow(*json.loads(why)) if why else record_of(line)
        try:
            if isinstance(record, BadRow):
                raise record
            samples = make.to_samples(record)
        except BadRow as error:
            bad[part].add(where, error, "" if make.texts[number] else fields_of(record))
            continue
        valid[part] += 1
        count["unused"] += not samples
        for sample in samples:
            if make.whole[number] or make.divide.takes(sample):
                of_batch.append(sample)
            else:
                count["other split"] += 1
    made: list[tuple[tokenize.TokenRow, Sample, bytes | None]] = []
    tasks = make.guard.find_each([sample.all_text for sample in of_batch])
    for sample, task in zip(of_batch, tasks, strict=True):
        if task:
            excluded[task] += 1
            continue
        rows = list(_tokenise(make.tokenizer, sample))
        count["over-long"] += not rows
        marks = repr((sample.noise, sample.reward, sample.problem_id, sample.weight))
        told = "\0".join([marks, *(text for turn in sample.turns for text in turn)])
        digest = hashlib.blake2b(told.encode(), digest_size=8).digest()
        for i, row in enumerate(rows):
            count["rows"] += 1
            count["tokens"] += len(row.tokens)
            made.append((row, sample, None if i else digest))
    result = _table(made)
    has = {name: len(result) - result[name].null_count for name in OPTIONAL}
    has["noise"] = sum(bool(sample.noise) for _, sample, _ in made)
    said = {
        "first": indices[0], "count": count, "has": has, "excluded": excluded, "valid": valid,
        "bad": {part: one.as_dict() for part, one in bad.items()},
    }  # fmt: skip
    Path(counts, f"{indices[0]}.json").write_text(json.dumps(said))
    with _bytes_done.get_lock():
        _bytes_done.value += pc.sum(pc.binary_length(table["record"])).as_py() or 0
    return result


def _table(made: list[tuple[tokenize.TokenRow, Sample, bytes | None]]) -> pa.Table:
    lengths = [len(row.tokens) for row, _, _ in made]
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def lists(name: str, kind: pa.DataType, missing: np.ndarray | None = None) -> pa.Array:
        if missing is not None and missing.all():
            return pa.nulls(len(made), pa.list_(kind))
        flat = [getattr(row, name) for row, _, _ in made] or [np.zeros(0)]
        mask = None if missing is None else pa.array(missing)
        values = pa.array(np.concatenate(flat)).cast(kind)
        return pa.ListArray.from_arrays(pa.array(ends), values, mask=mask)

    def own(values: list, kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind)

    samples = [sample for _, sample, _ in made]
    unweighted = np.array([sample.weight is None for sample in samples], bool)
    return pa.table(
        {
            "tokens": lists("tokens", pa.int32()),
            "keep": lists("keep", pa.bool_()),
            "noise": lists("noise", pa.bool_()),
            "weight": lists("weight", pa.float32(), unweighted),
            "reward": own([s.reward for s in samples], pa.float64()),
            "problem_id": own([s.problem_id for s in samples], pa.string()),
            "prompt": own([s.prompt if s.is_pair else None for s in samples], pa.string()),
            "response": own([s.response if s.is_pair else None for s in samples], pa.string()),
            "digest": own([d and int.from_bytes(d) for _, _, d in made], pa.uint64()),
        }
    )


def _report(
    parts: list[str], counts: Path, rows: datasets.Dataset, opened: list[Source], make: Make
) -> dict:
    """What all batches say together; ValueError if a part has no valid row, or none remains."""
    told = [json.loads(path.read_text()) for path in counts.iterdir()]
    told.sort(key=lambda one: one["first"])
    count, has, excluded, valid = (Counter[str]() for _ in range(4))
    bad, bad_of = BadRows(), defaultdict[str, BadRows](BadRows)
    for one in told:
        for total, key in (
            (count, "count"),
            (has, "has"),
            (excluded, "excluded"),
            (valid, "valid"),
        ):
            total.update(one[key])
        for part, kinds in one["bad"].items():
            bad.merge(kinds)
            bad_of[part].merge(kinds)
    for number, name in enumerate(parts):
        if not valid[str(number)]:
            why = bad_of[str(number)]
            raise ValueError(f"{name} has no valid row: {why if why else 'it is empty'}")
    left_out = {
        f"bad rows ({bad})": len(bad),
        make.unused: count["unused"],
        "rows of the other split": count["other split"],
        f"rows longer than max_seq_len {make.tokenizer.max_seq_len}": count["over-long"],
    }
    tasks = f" ({', '.join(sorted(excluded)[:SHOWN])})" if excluded else ""
    digests = rows.data.column("digest").drop_null()
    count["duplicates"] = len(digests) - len(digests.unique())
    kept = f", {count['duplicates']} exact duplicates of another among them" * bool(
        count["duplicates"]
    )
    note = "; ".join(source.note for source in opened)
    read = f"{count['rows']} rows, {count['tokens']} tokens{kept}, from {count['read']} records"
    left = f"left out: {excluded.total()} rows that contain an evaluation task{tasks}" + "".join(
        f", {n} {what}" for what, n in left_out.items() if n
    )
    if not count["rows"]:
        raise ValueError(f"no row remains. {read} in {note}; {left}")
    return {"read": read, "left out": left, "note": note, "has": has, "count": count}


def _tokenise(tokenizer: Llama2Tokenizer, sample: Sample) -> Iterator[tokenize.TokenRow]:
    assert tokenizer.max_seq_len is not None  # build_rows has seen to that
    if sample.prompt is None:
        row = tokenize.encode_text(tokenizer, sample.response, sample.noise, sample.weight)
        yield from tokenize.split_row(row, tokenizer.max_seq_len)
        return
    row = sample.encode(tokenizer)
    if len(row.tokens) <= tokenizer.max_seq_len:
        yield row


def _fingerprint(**parts: object) -> str:
    """Hash of everything that shapes the rows, including this package's code."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    digest.update(f"{sentencepiece.__version__} {datasets.__version__}".encode())
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.py"), contamination.HASHES]):
        if path.name not in ("packing.py", "loader.py"):  # they come after the rows
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
