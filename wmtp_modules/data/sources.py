"""Reads records from local files and folders and from the Hugging Face hub.

A source yields records (dicts), or a ``BadRow`` that says why a record cannot be read. Files are
data only: no code of a data set is ever executed.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from wmtp_modules.files import json_fault
from wmtp_modules.progress import quiet_datasets

ROW_SUFFIXES = {".jsonl", ".parquet"}
# fmt: off
TEXT_SUFFIXES = {
    ".bash", ".c", ".cc", ".cfg", ".cpp", ".cs", ".css", ".go", ".h", ".hpp", ".hs", ".html",
    ".ini", ".java", ".jl", ".js", ".kt", ".lua", ".md", ".ml", ".php", ".pl", ".py", ".pyi", ".r",
    ".rb", ".rs", ".rst", ".scala", ".sh", ".sql", ".swift", ".tex", ".toml", ".ts", ".txt",
    ".yaml", ".yml",
}
# fmt: on
# How data sets spell their splits; `deepmind/code_contests` has `valid`, MBPP has `validation`.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}


class BadRow(ValueError):
    """A row that cannot be used, and why."""


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
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise BadRow(f"{field} holds half a surrogate pair")
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
        note: what was read and skipped, for the report.
    """

    name: str
    kind: str
    own_split: bool = False
    fingerprint: str = ""
    note: str = ""
    files: tuple[Path, ...] = ()
    root: Path = Path()
    columns: tuple[str, ...] = ()
    hub: datasets.Dataset | None = None

    def parts(self) -> Iterator[tuple[str, Iterator]]:
        """(name, records) of each jsonl or parquet file, hub split, or whole folder of text.

        At least one record of a part must be valid. Records are (where, dict) or (where, BadRow).
        """
        if self.hub is not None:
            yield self.name, ((f"{self.name}[{i}]", row) for i, row in enumerate(self.hub))
        elif self.kind == "text":
            yield self.name, map(self._text_record, self.files)
        else:
            for path in self.files:
                name = str(path.relative_to(self.root))
                read = _parquet_records if path.suffix.lower() == ".parquet" else _jsonl_records
                yield name, read(path, name, self.columns)

    def _text_record(self, path: Path) -> tuple[str, "dict | BadRow"]:
        where = str(path.relative_to(self.root))
        try:
            return where, {"text": path.read_bytes().decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            return where, BadRow(json_fault(error))


def open_source(
    source: str | Path, split: str, columns: tuple[str, ...], hub_config: str | None = None
) -> Source:
    """Determine what ``source`` is and which of its files or splits belong to ``split``.

    Only names and sizes are read so far; a hub data set is downloaded.

    Args:
        source: .jsonl or .parquet file, text or code file, folder of either kind, or hub name
            ``owner/name``. In a folder of row files, files or their folders named after a split
            (``train-00000-of-00002.parquet``, ``valid/a.jsonl``) belong to it; files
            named ``test`` are never read.
        split: "train" or "validation".
        columns: fields to read; others are skipped if the format allows it.

    Raises:
        ValueError: if there is no such path or hub data set, or it has no supported file.
    """
    if not str(source).strip():
        raise ValueError("source is empty: give a file, a folder, or a hub name (owner/name)")
    path = Path(source).expanduser()
    if not path.exists():
        return hub_source(str(source), split, columns, hub_config)
    root = path if path.is_dir() else path.parent
    found = visible_files(path)
    rows = [p for p in found if p.suffix.lower() in ROW_SUFFIXES]
    texts = [p for p in found if p.suffix.lower() in TEXT_SUFFIXES]
    if not rows and not texts:
        raise ValueError(
            f"{source} has no supported file: expected .jsonl, .parquet or text "
            f"({' '.join(sorted(TEXT_SUFFIXES))})"
        )
    own_split, files = False, rows or texts
    if rows and path.is_dir():
        splits = {p: _split_of_path(p.relative_to(path)) for p in rows}
        own_split = "validation" in splits.values()
        wanted = ("validation",) if own_split and split == "validation" else ("train", None)
        files = [p for p in rows if splits[p] in wanted]
        if not files:
            raise ValueError(f"{source}: no file for {split}, only {[p.name for p in rows[:5]]}")
    content = [(str(p.relative_to(root)), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]
    aside = len(found) - len(files)
    return Source(
        name=str(source),
        kind="rows" if rows else "text",
        own_split=own_split,
        fingerprint=json.dumps(content),
        note=f"{len(files)} files" + (f" ({aside} others not read)" if aside else ""),
        files=tuple(files),
        root=root,
        columns=columns,
    )


def visible_files(path: Path) -> list[Path]:
    """The file itself, or the files below a folder, sorted, without hidden ones."""
    if path.is_file():
        return [path]
    return sorted(
        p
        for p in path.rglob("*")
        if p.is_file() and not any(part[0] == "." for part in p.relative_to(path).parts)
    )


def load_hub(name: str, config: str | None) -> datasets.DatasetDict:
    """``datasets.load_dataset``; ValueError if ``name`` looks like a path, or cannot be read."""
    looks_like_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    if not looks_like_hub or Path(name).suffix in {".json"} | ROW_SUFFIXES | TEXT_SUFFIXES:
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
        raise ValueError(
            f"{name} has columns {', '.join(data.column_names)}, none of {', '.join(columns)}"
        )
    return Source(
        name=f"{name}:{chosen}",
        kind="hub",
        own_split=own_split,
        fingerprint=data._fingerprint,
        note=f"{len(data)} rows of the hub",
        hub=data.select_columns(present),
    )


def _split_of_path(path: Path) -> str | None:
    """The split that the name of a row file, or of its folder, starts with."""
    for part in (path.stem, *path.parent.parts):
        word = re.match(r"[a-z]+(?![a-z])", part.lower())
        for split, names in SPLIT_NAMES.items():
            if word and word[0] in names:
                return split
    return None


def _jsonl_records(path: Path, name: str, columns: tuple[str, ...]) -> Iterator:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield where, BadRow(json_fault(error))
            except (ValueError, RecursionError) as error:
                yield where, BadRow(f"not JSON ({json_fault(error)})")
            else:
                yield where, (record if isinstance(record, dict) else BadRow("not a JSON object"))


def _parquet_records(path: Path, name: str, columns: tuple[str, ...]) -> Iterator:
    try:
        file = pq.ParquetFile(path)
        present = [column for column in columns if column in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=present):
            for record in batch.to_pylist():
                number += 1
                yield f"{name}:{number}", record
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({json_fault(error)})") from error
