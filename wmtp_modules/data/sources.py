"""Reads records from local files and folders and from the Hugging Face hub.

A source yields records (dicts), or a ``BadRow`` that says why a record cannot be read. Files are
data only: no code of a data set is ever executed.
"""

import bz2
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from wmtp_modules.files import json_fault, pointer_in, stand_in
from wmtp_modules.progress import quiet_datasets

ROW_SUFFIXES = {".jsonl", ".parquet"}
# fmt: off
TEXT_SUFFIXES = {
    ".bash", ".c", ".cc", ".cfg", ".cpp", ".cs", ".css", ".go", ".h", ".hpp", ".hs", ".html",
    ".ini", ".java", ".jl", ".js", ".kt", ".lua", ".md", ".ml", ".php", ".pl", ".py", ".pyi", ".r",
    ".rb", ".rs", ".rst", ".scala", ".sh", ".sql", ".swift", ".tex", ".toml", ".ts", ".txt",
    ".yaml", ".yml",
}
# Formats that hold rows and nothing else, and those that a folder of code may hold as well.
SURE_ROWS = ROW_SUFFIXES | {".arrow", ".feather", ".jsonlines", ".ndjson"}
TABLES = {".csv", ".tsv"}
READABLE = SURE_ROWS | TABLES | {".json"}
# A file of these may be compressed; the others compress their columns themselves.
LINES = {".csv", ".json", ".jsonl", ".jsonlines", ".ndjson", ".tsv"}
COMPRESSED = {".bz2", ".gz", ".zst"}
# The same of formats that are not read, and what packs a file or many.
ROW_FORMATS = {".avro", ".lance", ".mds", ".orc", ".tfrecord", ".tfrecords"}
MAYBE_ROWS = {
    ".db", ".h5", ".hdf5", ".npy", ".npz", ".pickle", ".pkl", ".sqlite", ".xls", ".xlsx",
}
PACKED = COMPRESSED | {".7z", ".lz4", ".rar", ".tar", ".tgz", ".xz", ".zip"}
# fmt: on
# About a data set, never the data set itself.
DOCUMENTS = {
    "authors",
    "changelog",
    "citation",
    "contributing",
    "copying",
    "datacard",
    "dataset_card",
    "dataset_info",
    "dataset_infos",
    "dataset_dict",
    "license",
    "notice",
    "readme",
    "state",
}  # fmt: skip
# How data sets spell their splits, as the Hub reads them from the names of files
# (datasets.data_files.SPLIT_KEYWORDS).
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHOWN = 5  # names, or kinds of bad rows, in a message


class BadRow(ValueError):
    """A row that cannot be used, and why.

    ``kind`` is the reason without the row's own values, by which a report groups rows.
    """

    def __init__(self, why: str, kind: str | None = None) -> None:
        super().__init__(why)
        self.kind = kind or why


class BadRows:
    """Bad rows by kind: the first of each kind, and how many there are."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._count = Counter[str]()

    def add(self, where: str, error: BadRow, fields: str) -> None:
        """Count a bad row; ``fields`` is what ``fields_of`` says of it, or empty."""
        self._first.setdefault(error.kind, f"{where}: {error}{fields}")
        self._count[error.kind] += 1

    def as_dict(self) -> dict:
        """For another process, whose own ``merge`` takes it."""
        return {kind: [first, self._count[kind]] for kind, first in self._first.items()}

    def merge(self, others: dict) -> None:
        """Count those of a later batch; ``others`` is of ``as_dict``."""
        for kind, (first, count) in others.items():
            self._first.setdefault(kind, first)
            self._count[kind] += count

    def __len__(self) -> int:
        return self._count.total()

    def __str__(self) -> str:
        kinds = self._count.most_common()
        told = [
            self._first[kind] + (f" ({count} such rows)" if count > 1 else "")
            for kind, count in kinds[:SHOWN]
        ]
        if len(kinds) > SHOWN:
            told.append(f"and {len(kinds) - SHOWN} other kinds")
        return "; ".join(told)


def fields_of(record: object) -> str:
    """The fields of a row, to follow what is wrong with it; empty for what is not a row."""
    if not isinstance(record, dict):
        return ""
    return f", the row has the fields {listed(record, 12)}" if record else ", the row has no fields"


def listed(names: Iterable, most: int = SHOWN) -> str:
    """The first names of many, and how many others there are."""
    shown = [str(name)[:99] for name in names]
    others = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {others} more" if others > 0 else "")


def string_field(record: dict, field: str) -> str:
    """A field that must be a string, maybe an empty one; ``BadRow`` if it is not."""
    value = record.get(field)
    if value is None:
        raise BadRow(f"{field} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{field} is {type(value).__name__}, not a string")
    return value


def text_field(record: dict, field: str) -> str:
    """A string that a tokenizer takes and that is not blank; ``BadRow`` if it is not."""
    value = string_field(record, field)
    if not value.strip():
        raise BadRow(f"{field} is empty")
    if "\0" in value:
        raise BadRow(f"{field} holds a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(f"{field} holds half a surrogate pair") from None
    return value


def strings_field(record: dict, field: str) -> list[str]:
    """A field that must be a list of strings, maybe an empty one; ``BadRow`` if it is not."""
    value = record.get(field)
    if value is None:
        raise BadRow(f"{field} is missing")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRow(f"{field} is not a list of strings")
    return value


@dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
        name: as the user wrote it.
        kind: "rows", "text" or "hub".
        own_split: whether the source has its own validation split and this is the requested one.
        fingerprint: changes with the content (files: relative name, size and mtime).
        note: files by split that are read, and what is not read and why, for the report.
    """

    name: str
    kind: str
    own_split: bool = False
    fingerprint: str = ""
    note: str = ""
    files: tuple[Path, ...] = ()
    root: Path = Path()
    columns: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()  # columns whose cells are JSON where all cells are text (csv)
    hub: datasets.Dataset | None = None
    hub_columns: tuple[str, ...] = ()  # all it has; those that are not read are None in a record

    def parts(self) -> Iterator[tuple[str, Iterator]]:
        """(name, records) of each file of rows, hub split, or whole folder of text.

        At least one record of a part must be valid. Records are (where, dict) or (where, BadRow).
        """
        for name, records in self.raw_parts():
            yield name, ((w, record_of(r) if isinstance(r, bytes) else r) for w, r in records)

    def raw_parts(self) -> Iterator[tuple[str, Iterator]]:
        """The same with lines of JSON as they are, in bytes, for ``record_of``."""
        if self.hub is not None:
            tables = self.hub.with_format("arrow").iter(batch_size=64)
            rows = _arrow_records(tables, self.hub_columns)
            yield self.name, ((f"{self.name}[{i}]", row) for i, row in enumerate(rows))
        elif self.kind == "text":
            yield self.name, map(self._text_record, self.files)
        else:
            for path in self.files:
                name = str(path.relative_to(self.root))
                yield name, self._file_records(path, name)

    def _file_records(self, path: Path, name: str) -> Iterator:
        kind, _ = _format_of(path)
        if found := stand_in(path):
            raise ValueError(f"{path} is {found}")
        try:
            if kind == ".parquet":
                yield from _parquet_records(path, name, self.columns)
            elif kind in (".arrow", ".feather"):
                yield from _arrow_file_records(path, name, self.columns)
            elif kind in TABLES:
                yield from _csv_records(path, name, self.columns, self.cells)
            elif kind == ".json":
                yield from _json_records(path, name)
            else:
                with _opened(path) as file:
                    yield from _jsonl_records(file, name)
        except (EOFError, zlib.error, OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's, no format's
                raise
            raise ValueError(
                f"{path} is truncated or damaged ({json_fault(error)}): copy it again"
            ) from error

    def _text_record(self, path: Path) -> tuple[str, "dict | BadRow"]:
        where = str(path.relative_to(self.root))
        content = path.read_bytes()
        pointer = pointer_in(content[:1024])
        if pointer:
            return where, BadRow(pointer)
        try:
            return where, {"text": content.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            return where, BadRow(json_fault(error), "not UTF-8")


def open_sources(
    source: str | Path | Sequence[str | Path],
    split: str,
    columns: tuple[str, ...],
    hub_config: str | None = None,
    cells: tuple[str, ...] = (),
) -> list[Source]:
    """``open_source`` of each of several; ValueError also if there is none, or one is there twice.

    A file that is named in a list is read whatever its name, as one that is named alone.
    """
    named = [source] if isinstance(source, str | Path) else [*source]
    if not named:
        raise ValueError("source is an empty list: give files, folders or hub names (owner/name)")
    twice = next((one for i, one in enumerate(named) if one in named[:i]), None)
    if twice is not None:
        raise ValueError(f"source names {twice} twice: name it once")
    return [open_source(one, split, columns, hub_config, cells) for one in named]


def open_source(
    source: str | Path,
    split: str,
    columns: tuple[str, ...],
    hub_config: str | None = None,
    cells: tuple[str, ...] = (),
) -> Source:
    """Determine what ``source`` is and which of its files or splits belong to ``split``.

    Only names and sizes are read so far; a hub data set is downloaded.

    Args:
        source: file of rows, text or code file, folder of either kind, pattern of files and folders
            (``data/*.jsonl``), or hub name ``owner/name``. In a folder, files of rows belong to the
            split that ``split_of`` finds in their names, without one to training; those of a test
            split are never read. The same holds for a folder of .txt files; names of code say what
            it does, not what it is for. What a pattern finds is divided in the same way, unless all
            of it is of one split: then the pattern itself says so.
        split: "train" or "validation".
        columns: fields to read; others are skipped if the format allows it.
        cells: those of them that a csv file holds as JSON.

    Raises:
        ValueError: if there is no such path or hub data set, it has no supported file, or data of
            the split is in files that cannot be read.
    """
    if not str(source).strip():
        raise ValueError("source is empty: give a file, a folder, or a hub name (owner/name)")
    path = Path(source).expanduser()
    is_pattern = not path.exists() and not path.is_symlink() and has_magic(str(path))
    if is_pattern:
        matched = [Path(one) for one in glob(str(path), recursive=True)]
        found = sorted({p for one in matched for p in visible_files(one)})
        if not found:
            raise ValueError(f"{source} matches no file: correct the pattern")
        root = Path(*path.parts[: next(i for i, p in enumerate(path.parts) if has_magic(p))])
    elif not path.exists() and not path.is_symlink():
        return hub_source(str(source), split, columns, hub_config)
    else:
        found, root = visible_files(path), path if path.is_dir() else path.parent
    is_many = is_pattern or path.is_dir()
    found = _without_caches(found)
    texts = [p for p in found if p.suffix.lower() in TEXT_SUFFIXES]
    # A repository may have a dead link; where all are dead, its content was never fetched.
    texts = [p for p in texts if p.exists()] or texts
    rows, unread = _rows_and_unread(found, texts) if is_many else _of_one_file(path)
    data = rows or texts
    prose = {p.suffix.lower() for p in texts if not _is_document(p)} == {".txt"}
    splits: dict[Path, str | None] = dict.fromkeys(found)
    if is_many and (rows or prose):
        splits = dict(zip(found, _splits([p.relative_to(root) for p in found]), strict=True))
        if is_pattern and len({splits[p] for p in (*data, *unread)}) == 1:
            splits = dict.fromkeys(found)
    own_split = "validation" in {splits[p] for p in (*data, *unread)}
    wanted = ("validation",) if own_split and split == "validation" else ("train", None)

    def names(files: Iterable[Path]) -> str:
        return listed(p.relative_to(root) for p in files)

    lost = [p for p in unread if splits[p] in wanted]
    if lost:
        ways_out = {p: _way_out(p) for p in lost}
        told = "; ".join(
            f"{names(p for p in lost if ways_out[p] == way_out)}: {way_out}"
            for way_out in dict.fromkeys(ways_out.values())
        )
        raise ValueError(
            f"{source} has data in files that cannot be read ({' '.join(sorted(READABLE))} and "
            f"text can). {told}{'; or move what is no data out of the folder' if is_many else ''}"
        )
    if not data:
        raise ValueError(
            f"{source} has no supported file: expected rows ({' '.join(sorted(READABLE))}) or text "
            f"({' '.join(sorted(TEXT_SUFFIXES))})" + (f", found {names(found)}" if found else "")
        )
    files = [p for p in data if splits[p] in wanted]
    by_split = {s: [p for p in data if splits[p] == s] for s in dict.fromkeys(splits.values())}
    if not files:
        there = "; ".join(f"{s}: {names(own)}" for s, own in by_split.items() if own)
        raise ValueError(
            f"{source}: no file for {split}, only {there}. Files belong to the split in their "
            "names: rename one, or give the path of a single file"
        )
    for p in files:
        if not p.exists():
            raise ValueError(f"{p} is {stand_in(p)}")
    content = [(str(p.relative_to(root)), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]
    known = {*rows, *texts, *unread}
    aside = {
        **{f"{s} split": own for s, own in by_split.items() if s and s not in wanted},
        "text beside rows": texts if rows else [],
        "data in another format": unread,
        "neither rows nor text": [p for p in found if p not in known],
    }
    read = "; ".join(
        (f"{s or 'no split in the name'}: " if any(by_split) else "") + names(own)
        for s, own in by_split.items()
        if own and s in wanted
    )
    skipped = ", ".join(f"{len(own)} {why} ({names(own)})" for why, own in aside.items() if own)
    return Source(
        name=str(source),
        kind="rows" if rows else "text",
        own_split=own_split,
        fingerprint=json.dumps(content),
        note=f"{len(files)} files ({read})" + (f", not read: {skipped}" if skipped else ""),
        files=tuple(files),
        root=root,
        columns=columns,
        cells=cells,
    )


def visible_files(path: Path) -> list[Path]:
    """The file itself, or the files below a folder, sorted, without hidden ones.

    A link whose target is gone is one of them, so that it is missed.
    """
    if not path.is_dir():
        return [path]
    return sorted(
        p
        for p in path.rglob("*")
        if (p.is_file() or (p.is_symlink() and not p.exists()))
        and not any(part[0] == "." for part in p.relative_to(path).parts)
    )


def split_of(path: Path) -> str | None:
    """The split that names a file in a folder, by the Hub's rule; ``path`` is relative to it.

    A keyword of ``SPLIT_NAMES`` counts where no letter is next to it: ``code_test.jsonl`` is a test
    file, ``contest.jsonl`` and ``latest.jsonl`` are not. Folders decide before the file's own name,
    and of several splits in one name the one that must not be trained on: test, then validation.
    """
    for parts in (path.parts[:-1], path.parts[-1:]):
        words = {word for part in parts for word in re.findall(r"[^\W\d_]+", part.lower())}
        for split in ("test", "validation", "train"):
            if words.intersection(SPLIT_NAMES[split]):
                return split
    return None


def _splits(paths: list[Path]) -> list[str | None]:
    """``split_of`` of each file; shards beside those of train may be of a split of another name."""
    splits = [split_of(path) for path in paths]
    shards = [re.match(r"(.+)-\d{5}-of-\d{5}", path.name) for path in paths]
    if any(shard and split == "train" for shard, split in zip(shards, splits, strict=True)):
        # MBPP has prompt-00000-of-00001.parquet beside train-00000-of-00001.parquet.
        pairs = zip(shards, splits, strict=True)
        splits = [split or (shard[1] if shard else None) for shard, split in pairs]
    return splits


def _is_document(path: Path) -> bool:
    return re.split(r"[.\s]", path.name.lower())[0] in DOCUMENTS


def _format_of(path: Path) -> tuple[str, bool]:
    """The suffix that says what a file holds, and whether it is packed."""
    *inner, suffix = ["", *(suffix.lower() for suffix in path.suffixes)]
    packed = suffix in PACKED
    return (inner[-1] if packed and inner else suffix), packed


def _is_readable(path: Path) -> bool:
    kind, packed = _format_of(path)
    return (kind in LINES and path.suffix.lower() in COMPRESSED) if packed else kind in READABLE


def _of_one_file(path: Path) -> tuple[list[Path], list[Path]]:
    """``_rows_and_unread`` of a file that is named itself: what it seems to be, it is."""
    kind, packed = _format_of(path)
    if _is_readable(path):
        return [path], []
    return [], [path] if packed or kind in ROW_FORMATS | MAYBE_ROWS else []


def _rows_and_unread(found: list[Path], texts: list[Path]) -> tuple[list[Path], list[Path]]:
    """Files of rows, and those that seem to hold rows and are not read: passing them over is wrong.

    A folder of code also has tables, JSON and archives that are no data set: there, as long as they
    are not named after a split and the code is more than they are.
    """
    has_rows = any(p.suffix.lower() in SURE_ROWS or _format_of(p)[0] in SURE_ROWS for p in found)
    sure, maybe = [], []
    for path in found:
        kind, packed = _format_of(path)
        known = ROW_FORMATS | MAYBE_ROWS | READABLE
        if path.suffix.lower() in ROW_SUFFIXES:
            sure.append(path)
            continue
        if _is_document(path) or not (packed or kind in known):
            continue
        is_sure = kind in ROW_FORMATS | SURE_ROWS or (has_rows and kind in TABLES)
        is_sure = is_sure or split_of(Path(path.name)) is not None
        (sure if is_sure or (packed and kind in known) else maybe).append(path)
    if not any(map(_is_readable, sure)):
        text_bytes = sum(p.stat().st_size for p in texts if p.exists() and not _is_document(p))
        if sum(p.stat().st_size for p in maybe if p.exists()) > text_bytes:
            sure = sorted(sure + maybe)
    return [p for p in sure if _is_readable(p)], [p for p in sure if not _is_readable(p)]


def _without_caches(found: list[Path]) -> list[Path]:
    """Without what ``datasets`` computed beside the files that a ``save_to_disk`` folder lists."""
    listed_in: dict[Path, set[str]] = {}
    for state in found:
        if state.name == "state.json":
            try:
                files = json.loads(state.read_bytes())["_data_files"]
                listed_in[state.parent] = {file["filename"] for file in files}
            except (ValueError, KeyError, TypeError):  # another program's
                continue
    return [p for p in found if p.suffix != ".arrow" or p.name in listed_in.get(p.parent, {p.name})]


def _way_out(path: Path) -> str:
    if not path.exists():
        return f"{stand_in(path)}"
    if path.suffix.lower() in PACKED:
        return "unpack it"
    return "convert it to .jsonl or .parquet"


def load_hub(name: str, config: str | None) -> datasets.DatasetDict:
    """``datasets.load_dataset``; ValueError if ``name`` looks like a path, or cannot be read."""
    looks_like_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    if not looks_like_hub or Path(name).suffix in PACKED | READABLE | TEXT_SUFFIXES:
        raise ValueError(
            f"{name} does not exist: give a local file, a folder, or a Hugging Face hub name "
            "(owner/name)"
        )
    try:
        quiet_datasets()
        return datasets.load_dataset(name, config)
    except (OSError, ValueError) as error:  # includes not found, no access and no network
        raise ValueError(
            f"{name} is not a local path, and cannot be read as a Hugging Face data set "
            f"({type(error).__name__}: {error}): check the name and the network, or download it "
            "and give the files"
        ) from error


def hub_source(name: str, split: str, columns: tuple[str, ...], config: str | None) -> Source:
    """The wanted split of a hub data set; without a validation split, the train split."""
    splits = load_hub(name, config)
    own = {s: next((n for n in SPLIT_NAMES[s] if n in splits), None) for s in SPLIT_NAMES}
    own_split = own["validation"] is not None
    chosen = own["validation"] if own_split and split == "validation" else own["train"]
    if chosen is None:
        raise ValueError(f"{name} has no train split, only {', '.join(splits)}")
    data = splits[chosen]
    present = [column for column in columns if column in data.column_names]
    if not present:
        raise ValueError(_no_column(name, data.column_names, columns))
    return Source(
        name=f"{name}:{chosen}",
        kind="hub",
        own_split=own_split,
        fingerprint=data._fingerprint,
        note=f"{len(data)} rows of the hub",
        hub=data.select_columns(present),
        hub_columns=tuple(data.column_names),
    )


def _opened(path: Path) -> BinaryIO:
    """A file's content as bytes, whatever compressed it."""
    suffix = path.suffix.lower()
    if suffix == ".zst":  # no library of its own is needed
        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="zstd")))
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(suffix, open)
    return cast(BinaryIO, opener(path, "rb"))


def _jsonl_records(file: Iterable[bytes], name: str) -> Iterator:
    """Lines as they are, for ``record_of``: reading them takes longer than finding them."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"{name}:{number}", line


def record_of(line: bytes) -> dict | BadRow:
    """The record of a line of JSON."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(json_fault(error), "not UTF-8")
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON ({json_fault(error)})", "not JSON")
    return record if isinstance(record, dict) else BadRow("not a JSON object")


def _json_records(path: Path, name: str) -> Iterator:
    """Rows of one JSON list, numbered from 1, or of JSON lines under this name."""
    with _opened(path) as file:
        content = file.read()
    start = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    # A whole object on the first line is JSON lines; spread over many lines it is not.
    first = start.split(b"\n", 1)[0]
    if start[:1] != b"[" and (not start or isinstance(record_of(first), dict)):
        yield from _jsonl_records(io.BytesIO(content), name)
    else:
        yield from json_rows(path, name, content)


def json_rows(path: Path, name: str, content: bytes) -> Iterator[tuple[str, dict | BadRow]]:
    """Rows of the one JSON list that is a file's content; ValueError if it is anything else."""
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        found = stand_in(path)
        found = found or f"not JSON, or is truncated ({json_fault(error)}): copy it again"
        raise ValueError(f"{path} is {found}") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} is not a JSON list of rows: give one, or rows one a line in a .jsonl file"
        )
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row if isinstance(row, dict) else BadRow("not a JSON object")


def _csv_records(
    path: Path, name: str, columns: tuple[str, ...], cells: tuple[str, ...]
) -> Iterator:
    """Rows of a table with a header; every cell is text, as it stands there, but for ``cells``.

    Not pandas', which takes the text "NA" for nothing and "007" for a number.
    """
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if _format_of(path)[0] == ".tsv" else ","
    with _opened(path) as file:
        # Bytes that are no UTF-8 cost their row, not the file.
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        table, first = csv.reader(text, delimiter=delimiter, strict=True), 1
        try:
            header = next(table, [])
            if header and not set(columns) & set(header):
                raise ValueError(_no_column(path, header, columns))
            first = table.line_num + 1
            for row in table:
                if row:
                    yield f"{name}:{first}", _csv_record(header, row, cells)
                first = table.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{path} is no table of rows from line {first} on ({error}): correct the quotes "
                "there"
            ) from error


def _csv_record(header: list[str], values: list[str], cells: tuple[str, ...]) -> dict | BadRow:
    if len(values) > len(header):
        return BadRow("more cells than the header has")
    if any(not v.isascii() and re.search("[\udc80-\udcff]", v) for v in values):
        return BadRow("not UTF-8")
    row: dict = dict.fromkeys(header) | dict(zip(header, values, strict=False))
    for cell in cells:
        if row.get(cell) is not None:
            try:
                row[cell] = json.loads(row[cell]) if row[cell].strip() else None
            except (ValueError, RecursionError):
                continue  # text, which whoever needs it will refuse
    return row


def _parquet_records(path: Path, name: str, columns: tuple[str, ...]) -> Iterator:
    try:
        file = pq.ParquetFile(path)
        names = tuple(file.schema_arrow.names)
        present = [column for column in columns if column in names]
        if not present:
            raise ValueError(_no_column(path, names, columns))
        batches = file.iter_batches(batch_size=64, columns=present)
        for number, record in enumerate(_arrow_records(batches, names), start=1):
            yield f"{name}:{number}", record
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({json_fault(error)})") from error


def _arrow_file_records(path: Path, name: str, columns: tuple[str, ...]) -> Iterator:
    """Rows of an Arrow file, as a stream (``save_to_disk``) or with a footer (feather)."""
    try:
        with pa.memory_map(str(path)) as file:
            try:
                reader = pa.ipc.open_stream(file)
                batches: Iterable = reader
            except pa.ArrowInvalid:
                file.seek(0)
                reader = pa.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            names = tuple(reader.schema.names)
            present = [column for column in columns if column in names]
            if not present:
                raise ValueError(_no_column(path, names, columns))
            parts = (batch.slice(i, 64) for batch in batches for i in range(0, len(batch), 64))
            tables = (part.select(present) for part in parts)
            for number, record in enumerate(_arrow_records(tables, names), start=1):
                yield f"{name}:{number}", record
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Arrow file ({json_fault(error)})") from error


def _arrow_records(tables: Iterable, names: Iterable[str]) -> Iterator[dict | BadRow]:
    """Rows of Arrow tables; columns in ``names`` that were not read are None."""
    unread = dict.fromkeys(names)
    for table in tables:
        try:
            yield from (unread | row for row in table.to_pylist())
        except UnicodeDecodeError:  # Arrow does not check strings as it reads them
            for i in range(table.num_rows):
                yield _arrow_record(table.slice(i, 1), unread)


def _arrow_record(table: pa.Table | pa.RecordBatch, unread: dict) -> dict | BadRow:
    record = dict(unread)
    for name in table.schema.names:
        try:
            record[name] = table.column(name).to_pylist()[0]
        except UnicodeDecodeError as error:
            return BadRow(f"{name} is {json_fault(error)}", "not UTF-8")
    return record


def _no_column(name: object, present: Iterable[str], wanted: Iterable[str]) -> str:
    return f"{name} has columns {listed(present, 12)}, none of {', '.join(wanted)}"
