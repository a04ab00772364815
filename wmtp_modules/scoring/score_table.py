"""Computes the scores of a data set once, for every run that trains on it.

A table holds, for each row of a tokenised data set (after splitting, before packing), one float
per token, one per token and head, or, if the fingerprint says ``"per": "row"``, one per row. The
caller defines what the floats mean and names it in the fingerprint's ``kind``.

On disk a table is a folder of Arrow files: part p holds rows [p * part_rows, (p + 1) * part_rows)
and appears only when it is complete, with its size and hash in a file next to it, so a restarted
run scores only the missing parts, on any number of ranks. ``fingerprint.json`` is written first and
keeps a restarted run from mixing two checkpoints or data sets; ``manifest.json``, with the size and
hash of every part, is written last and marks the table as complete.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch.distributed as dist
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter

from wmtp_modules.data.packing import row_lengths
from wmtp_modules.files import alone_in, file_hash, new_file, read_json
from wmtp_modules.parallel.process_group import patient_barrier
from wmtp_modules.progress import progress_bar

logger = logging.getLogger(__name__)

FEATURES = Features({"scores": Sequence(Value("float32"))})
WEIGHT_FILES = ("*.pth", "*.safetensors", "pytorch_model*.bin")
CONFIG_FILES = ("params.json", "config.json")


def fingerprint_checkpoint(folder: str | Path) -> str:
    """Content hash (sha256 in hex) of a checkpoint folder's weights and model config.

    Reads every byte, a minute for 27 GB at 500 MB/s: on rank 0, and each file once in a process
    unless it changes. ValueError without weights.
    """
    folder = Path(folder)
    weights = sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern)})
    if not weights:
        raise ValueError(f"{folder} has no weight file ({', '.join(WEIGHT_FILES)})")
    configs = [folder / name for name in CONFIG_FILES if (folder / name).exists()]
    digest = hashlib.sha256()
    for path in weights + configs:
        state = path.stat()
        known = _hash_once(path.absolute(), state.st_ino, state.st_size, state.st_mtime_ns)
        digest.update(f"{path.name} {known}\n".encode())
    return digest.hexdigest()


@cache
def _hash_once(path: Path, *state: int) -> str:
    """``state`` is what changes with the file."""
    return file_hash(path)


def fingerprint_tokenizer(path: str | Path) -> str:
    """Content hash (sha256 in hex) of a tokenizer file."""
    return file_hash(Path(path))


def fingerprint_rows(rows: Dataset) -> str:
    """Content hash (sha256 in hex) of the ``tokens`` column: values and their order, not chunks.

    One pass over the column, about 1 GB/s: once on rank 0.
    """
    values, lengths = hashlib.sha256(), hashlib.sha256()
    for chunk in _token_chunks(rows):
        values.update(pc.list_flatten(chunk).cast(pa.int32()).to_numpy().tobytes())
        lengths.update(pc.list_value_length(chunk).cast(pa.int64()).to_numpy().tobytes())
    return hashlib.sha256(values.digest() + lengths.digest()).hexdigest()


class ScoreTable:
    """A complete table, memory-mapped; ``table[row]`` is fp32 [len], or [len, K] for K > 1 heads.

    In a table with one score per row it is fp32 [1]. Created by ``open``. ``fingerprint`` says what
    it was made of.
    """

    def __init__(self, scores: Dataset, fingerprint: dict) -> None:
        self._scores = scores.with_format("arrow")
        self.fingerprint = fingerprint
        self._n_heads = fingerprint["n_heads"]
        self._is_per_row = _is_per_row(fingerprint)

    @classmethod
    def open(cls, folder: str | Path, fingerprint: dict, rows: Dataset) -> "ScoreTable":
        """Open the folder of a table and verify that it belongs to these rows.

        Reads every byte to check the hashes: nothing else would detect a flipped bit of a score.

        Args:
            fingerprint: what this run expects, as given to ``compute_scores``.
            rows: the tokenised rows that will be trained on.

        Raises:
            ValueError: if the table is incomplete, damaged, or made for anything else.
        """
        folder = Path(folder)
        manifest = folder / "manifest.json"
        if not manifest.exists():
            raise ValueError(f"{folder} holds no complete score table: score this data set first")
        sizes = _row_sizes(row_lengths(rows), fingerprint)
        record = _read_record(manifest, fingerprint, len(sizes))
        part_rows, stamps = record["part_rows"], record.get("parts")
        n_parts = _n_parts(len(sizes), part_rows)
        if not isinstance(stamps, list) or len(stamps) != n_parts:
            raise ValueError(
                f"{manifest} lacks the hashes of its {n_parts} parts, so it is damaged or of an "
                "earlier version: delete that folder to score again"
            )
        parts = []
        for part, stamp in enumerate(stamps):
            expected = sizes[part * part_rows : (part + 1) * part_rows]
            try:
                parts.append(_read_part(_part_path(folder, part), expected, stamp))
            except ValueError as error:
                raise ValueError(f"{error}: score again, intact parts are kept") from error
        return cls(concatenate_datasets(parts), fingerprint)

    def __len__(self) -> int:
        return len(self._scores)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.take([row])[0]

    def take(self, rows: list[int]) -> list[np.ndarray]:
        """``table[row]`` of each, in one reading."""
        scores = self._scores[rows]["scores"].combine_chunks()
        # Copied because torch needs writable memory and a mapped file is read-only.
        flat = np.array(pc.list_flatten(scores))
        ends = np.cumsum(pc.list_value_length(scores).to_numpy(False))
        return [
            part if self._n_heads == 1 else part.reshape(-1, self._n_heads)
            for part in np.split(flat, ends[:-1])
        ]

    def per_row(self) -> np.ndarray:
        """All scores of a table with one per row, fp32 [rows]; ValueError for another table."""
        if not self._is_per_row:
            raise ValueError("this table has scores per token, not one per row: read table[row]")
        return np.array(pc.list_flatten(self._scores[:]["scores"]))


def compute_scores(
    folder: str | Path,
    fingerprint: dict,
    rows: Dataset,
    score_batch: Callable[[list], list[np.ndarray]],
    *,
    batch_tokens: int,
    inputs: Callable[[Dataset], list] | None = None,
    part_rows: int = 1024,
    rank: int = 0,
    world: int = 1,
    desc: str = "scoring",
    beat: Callable[[str], None] = lambda desc: None,
) -> None:
    """Compute the missing scores of a table; does nothing if it is complete.

    Rank r takes the parts p with p % world == r, batches their rows by length, and needs no
    communication until a final barrier. Existing parts are verified and kept; damaged ones are
    named in a warning and scored again. Another run that makes the table is waited for.

    Args:
        folder: of the table, shared by all ranks.
        fingerprint: {checkpoint, tokenizer, dataset, max_seq_len, kind, n_heads}; n_heads is the
            number of floats per token. With ``"per": "row"`` (and n_heads 1) a row has one float.
        score_batch: takes the inputs of some rows of similar length and returns the scores of
            each, [len] or [len, n_heads], or [1] with one score per row.
        batch_tokens: most tokens in a batch, including padding; a longer row is its own batch.
        inputs: turns rows into one input each; by default the token ids, int64 [len].
        part_rows: rows of a part, the most work that a kill can lose. An existing table keeps its
            own value.
        beat: called with ``desc``, the text of the progress bar, before each part and batch.

    Raises:
        ValueError: if the folder has a table for something else or a damaged record, there are no
            rows, or ``score_batch`` raises it; names the rows.
        OSError: if the disk is full or fails; earlier parts are kept.
    """
    folder = Path(folder)
    lengths = row_lengths(rows)
    if len(lengths) == 0:
        raise ValueError("there are no rows to score: the data set is empty")
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "fingerprint.json"
    if begun.exists():  # what is of no use is not waited for
        _read_record(begun, fingerprint, len(lengths))
    with ExitStack() as stack:
        if rank == 0:
            stack.enter_context(alone_in(folder, wait=True, beat=lambda: beat(desc)))
        shared = world > 1 and dist.is_initialized()
        if not begun.exists() and (rank == 0 or not shared):
            record = {"fingerprint": fingerprint, "rows": len(lengths), "part_rows": part_rows}
            _write_json(begun, record)
        if shared:
            patient_barrier()  # until rank 0 has the table to itself
        begun_record = _read_record(begun, fingerprint, len(lengths))
        part_rows = begun_record["part_rows"]
        sizes, n_heads = _row_sizes(lengths, fingerprint), fingerprint["n_heads"]

        mine = range(rank, _n_parts(len(lengths), part_rows), world)
        total = sum(len(lengths[part * part_rows :][:part_rows]) for part in mine)
        with progress_bar(unit="row", desc=desc, total=total, shown=rank == 0) as bar:
            for part in mine:
                beat(desc)
                start, path = part * part_rows, _part_path(folder, part)
                part_lengths = lengths[start : start + part_rows]
                part_sizes = sizes[start : start + part_rows]
                if path.exists():
                    try:
                        _read_part(path, part_sizes, _read_stamp(path))
                        bar.update(len(part_lengths))
                        continue
                    except ValueError as error:
                        logger.warning("%s: it is scored again", error)
                part_dataset = rows.select(range(start, start + len(part_lengths)))
                items = (inputs or _token_ids)(part_dataset)
                assert len(items) == len(part_lengths), (len(items), len(part_lengths))
                scores: list[np.ndarray] = [np.empty(0)] * len(items)
                for batch in _batches(part_lengths, batch_tokens):
                    beat(desc)
                    try:
                        scored = score_batch([items[i] for i in batch])
                    except ValueError as error:
                        named = ", ".join(str(start + i) for i in sorted(batch))
                        raise ValueError(
                            f"{error} (one of these rows of the data: {named})"
                        ) from error
                    for i, row_scores in zip(batch, scored, strict=True):
                        shape = (part_sizes[i],) if n_heads == 1 else (part_lengths[i], n_heads)
                        assert row_scores.shape == shape, (row_scores.shape, shape)
                        scores[i] = row_scores.astype(np.float32).ravel()
                    bar.update(len(batch))
                _write_part(path, scores)

        if shared:
            patient_barrier()
        paths = [_part_path(folder, part) for part in range(_n_parts(len(lengths), part_rows))]
        if rank == 0 and all(_stamp_path(path).exists() for path in paths):
            manifest = begun_record | {"parts": [_read_stamp(path) for path in paths]}
            if _read_json(folder / "manifest.json") != manifest:
                _write_json(folder / "manifest.json", manifest)
        if shared:
            patient_barrier()  # no rank opens the table before the manifest exists


def _token_chunks(rows: Dataset) -> Iterator[pa.Array]:
    """The tokens column as Arrow list arrays, in row order even after a select or shuffle."""
    for table in rows.select_columns("tokens").with_format("arrow").iter(batch_size=4096):
        yield from table["tokens"].chunks


def _token_ids(rows: Dataset) -> list[np.ndarray]:
    return [row for chunk in _token_chunks(rows) for row in _split(chunk)]


def _split(chunk: pa.Array) -> list[np.ndarray]:
    values = pc.list_flatten(chunk).to_numpy().astype(np.int64)
    return np.split(values, np.cumsum(pc.list_value_length(chunk).to_numpy())[:-1])


def _batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Indices of rows, longest first, in batches that fit when padded to the longest."""
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        size = max(1, batch_tokens // max(1, int(lengths[order[0]])))
        yield order[:size]
        order = order[size:]


def _is_per_row(fingerprint: dict) -> bool:
    per = fingerprint.get("per", "token")
    assert per == "token" or (per, fingerprint["n_heads"]) == ("row", 1), fingerprint
    return per == "row"


def _row_sizes(lengths: np.ndarray, fingerprint: dict) -> np.ndarray:
    """Number of floats that each row has in a table."""
    return np.ones_like(lengths) if _is_per_row(fingerprint) else lengths * fingerprint["n_heads"]


def _n_parts(n_rows: int, part_rows: int) -> int:
    return -(-n_rows // part_rows)


def _part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:06d}.arrow"


def _stamp_path(part: Path) -> Path:
    return part.with_suffix(".json")


def _stamp(path: Path) -> dict:
    """What identifies a part: its size, which is quick to compare, and its hash."""
    return {"size": path.stat().st_size, "sha256": file_hash(path)}


def _read_stamp(path: Path) -> dict | None:
    """The stamp of a part; None if it is missing or damaged."""
    return _read_json(_stamp_path(path))


def _write_part(path: Path, scores: list[np.ndarray]) -> None:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in scores])]).astype(np.int32)
    column = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(scores)))
    # The stamp of the replaced part; a part without one is scored again.
    _stamp_path(path).unlink(missing_ok=True)
    with new_file(path) as unfinished:
        with ArrowWriter(features=FEATURES, path=str(unfinished)) as writer:
            writer.write_table(pa.table({"scores": column}))
            writer.finalize()
        stamp = _stamp(unfinished)
    _write_json(_stamp_path(path), stamp)


def _read_part(path: Path, expected_lengths: np.ndarray, stamp: dict | None) -> Dataset:
    """Memory-map a part; ValueError if it was not written for rows of these lengths."""
    try:
        # The size first: it needs no reading and reveals most damage.
        if (
            not isinstance(stamp, dict)
            or path.stat().st_size != stamp.get("size")
            or _stamp(path) != stamp
        ):
            raise ValueError(f"score part {path} is damaged: it differs from what was written")
        part = Dataset.from_file(str(path))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"score part {path} is missing or damaged ({error})") from error
    if part.features != FEATURES:
        raise ValueError(f"score part {path} has {part.features} instead of scores")
    lengths = pc.list_value_length(part.data.column("scores")).to_numpy()
    if not np.array_equal(lengths, expected_lengths):
        raise ValueError(
            f"score part {path} has {len(lengths)} rows, {lengths.sum()} values; this data set "
            f"has {len(expected_lengths)} rows, {expected_lengths.sum()} values there"
        )
    return part


def _read_record(path: Path, fingerprint: dict, n_rows: int) -> dict:
    """A table's record, checked against what this run expects; its ``part_rows`` is valid."""
    record = _read_json(path) or {}
    found, part_rows = record.get("fingerprint"), record.get("part_rows")
    is_sound = isinstance(found, dict) and type(part_rows) is int and 0 < part_rows < 2**31
    if not is_sound or type(record.get("rows")) is not int:
        raise ValueError(
            f"{path} is damaged, so the scores next to it cannot be identified: delete that folder "
            "to score again"
        )
    found, expected = found | {"rows": record["rows"]}, fingerprint | {"rows": n_rows}
    differences = [
        f"{key}: the table has {found.get(key)!r}, this run {expected.get(key)!r}"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    ]
    if differences:
        raise ValueError(
            f"the score table in {path.parent} was made for something else ("
            + "; ".join(differences)
            + "): delete that folder to score again, or use another one"
        )
    return record


def _read_json(path: Path) -> dict | None:
    """The JSON object in a file; None if there is no valid one."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _write_json(path: Path, record: dict) -> None:
    with new_file(path) as unfinished:
        unfinished.write_text(json.dumps(record, indent=2))
