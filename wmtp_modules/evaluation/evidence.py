"""Stores samples and their results as they arrive, in append-only JSON lines keyed by content.

A row's key is a hash of everything that shaped it. A restarted run, or another run in the same
folder, therefore finds the work that is done and never uses rows made under other settings.
"""

import dataclasses
import difflib
import fcntl
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torchtune.utils import get_logger

from wmtp_modules.evaluation.task import Task
from wmtp_modules.files import json_fault

log = get_logger("INFO")

BLOCK = 1 << 16  # bytes read at once in search of the last line's end
RULES = 2  # of verdicts; another number where a program may get another verdict than before


class EvidenceStore:
    """A file of JSON lines that several processes may append to at once; created if missing.

    A line is valid once its newline is written. A process that is killed while writing leaves at
    most one incomplete line at the end, which is removed when the file is next opened or appended
    to. Rows that other processes append after opening are not seen: open the file again.

    Attributes:
        dropped_bytes: length of the incomplete last line that was removed on opening.

    Raises:
        ValueError: if a line is damaged, with its file and line number.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._places: dict[str, tuple[int, int]] = {}  # key: where its line starts, its length
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as fd:
            self.dropped_bytes = _cut_incomplete_line(fd)
            with open(fd, "rb", closefd=False) as file:
                self._read(file)
        if self.dropped_bytes:
            log.info(f"{path}: {self.dropped_bytes} bytes of an unfinished last line were cut off")

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: str) -> dict:
        """The row of a key, the last one if there are several."""
        start, length = self._places[key]
        with self.path.open("rb") as file:
            file.seek(start)
            return json.loads(file.read(length))

    def append(self, rows: Sequence[Mapping]) -> None:
        """Append rows, each with its ``key``, and wait until they are on the disk.

        If the disk is full or fails, an OSError; earlier rows are unaffected.
        """
        if not rows:
            return
        lines = [json.dumps(row).encode() + b"\n" for row in rows]
        with self._locked() as fd:
            # Another process may have been killed while writing since this one opened the file.
            _cut_incomplete_line(fd)
            start = os.fstat(fd).st_size
            try:
                _write(fd, b"".join(lines))
                os.fsync(fd)
            except OSError as error:
                os.ftruncate(fd, start)  # needs no space, even on a full disk
                raise OSError(
                    error.errno,
                    f"{self.path}: {len(rows)} rows could not be written ({error.strerror}); "
                    "earlier rows are kept: make room and start the same command again",
                ) from error
        for row, line in zip(rows, lines, strict=True):
            self._places[row["key"]] = (start, len(line))
            start += len(line)

    def _read(self, file) -> None:
        start = 0
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row["key"], str):
                    raise ValueError("not an object with a text key")
                key = row["key"]
            except (ValueError, KeyError, RecursionError) as error:
                what = "no key" if isinstance(error, KeyError) else json_fault(error)
                raise ValueError(
                    f"{self.path}:{number}: this line is damaged ({what}): delete it, and its "
                    "row is made again"
                ) from error
            self._places[key] = (start, len(line))
            start += len(line)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Open the file and lock it against other writers."""
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)  # releases the lock, as does the end of a killed process


def sample_key(settings: Mapping, task: Task, temperature: float, seed: int) -> str:
    """The key of a generated sample; the seed stands for its number.

    ``settings`` is everything that shapes it besides task, temperature and the sample's own seed:
    checkpoint fingerprint, top_p, top_k and so on.
    """
    return _hash(
        "sample", dict(settings), task.task_id, task.prompt, task.stop, float(temperature), seed
    )


def result_key(task: Task, row: Mapping, tier: str) -> str:
    """The key of a sample's result: program, tests, limits, the sandbox's tier and its ``RULES``.

    Limits are taken at machine factor 1: the measured factor differs from run to run, and a
    restarted run must find its earlier results. Number and temperature count, so two samples with
    the same text have a result each.
    """
    sample = (row["sample"], _temperature(row), row["completion"])
    return _hash("result", RULES, _task_content(task), *sample, tier)


def _temperature(row: Mapping) -> float | None:
    return None if row.get("temperature") is None else float(row["temperature"])


def read_samples(path: str | Path, tasks: Sequence[Task]) -> list[dict]:
    """Read samples: rows ``{"task_id", "completion"}``, or the ``samples.jsonl`` of a run.

    A completion may be any string. One that cannot be a program (a NUL, half a surrogate pair)
    fails on execution: it is what the model wrote.

    Returns:
        {"task_id", "sample", "temperature", "completion"} in the order of the file. Temperature
        and sample are taken from the row, so results can be joined to generated samples; if
        absent, temperature is None and ``sample`` counts a task's rows from 0. Of rows with the
        same key, which two runs in one folder can leave, the first is used.

    Raises:
        ValueError: if the file is missing or empty, a line is damaged, a row lacks its task or
            completion, or the rows come from several checkpoints or settings; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"samples: {path} is not a file: give a .jsonl file, or 'reference'")
    known = {task.task_id for task in tasks}
    counts: Counter[tuple] = Counter()
    samples, keys, names, checkpoints = [], set(), set(), set()
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where}: not JSON, or truncated ({json_fault(error)}): fix that line"
            ) from error
        _check_sample(row, where, known)
        if row.get("key") is not None:
            if row["key"] in keys:
                continue
            keys.add(row["key"])
        task_id, temperature = row["task_id"], _temperature(row)
        sample = row.get("sample", counts[task_id, temperature])
        counts[task_id, temperature] += 1
        checkpoints.add(row.get("checkpoint"))
        if (task_id, temperature, sample) in names or len(checkpoints) > 1:
            raise ValueError(
                f"{where}: the file mixes samples of several checkpoints or settings: generate "
                "each into its own output_dir"
            )
        names.add((task_id, temperature, sample))
        name = {"task_id": task_id, "sample": sample, "temperature": temperature}
        samples.append(name | {"completion": row["completion"]})
    if not samples:
        raise ValueError(f'{path} is empty: give rows {{"task_id", "completion"}}, one per line')
    return samples


def _check_sample(row: object, where: str, known: set) -> None:
    if not isinstance(row, dict):
        raise ValueError(f'{where}: not an object {{"task_id", "completion"}}')
    for field in ("task_id", "completion"):
        if row.get(field) is None:
            raise ValueError(
                f"{where}: {field} is missing, the row has {', '.join(row) or 'no field'}"
            )
    task_id, completion = row["task_id"], row["completion"]
    if not isinstance(completion, str):
        raise ValueError(f"{where}: completion is {type(completion).__name__}, not a string")
    temperature, sample = row.get("temperature"), row.get("sample", 0)
    if temperature is not None and type(temperature) not in (int, float):
        raise ValueError(f"{where}: temperature is {temperature!r}, not a number")
    if type(sample) is not int:
        raise ValueError(f"{where}: sample is {sample!r}, not an integer")
    # The type matters: True and 1.0 equal 1 and would be found.
    if type(task_id) not in (int, str) or task_id not in known:
        raise ValueError(
            f"{where}: no task {task_id!r} in the source{_did_you_mean(task_id, known)}"
        )


def _did_you_mean(task_id: object, known: set) -> str:
    """Suggest the id that was probably meant."""
    digits = str(task_id).rpartition("/")[2]
    if digits.isdecimal() and int(digits[:9]) in known:
        return f": write the number, {int(digits[:9])}"
    by_text = {str(other): other for other in known}
    close = difflib.get_close_matches(str(task_id)[:100], by_text, n=1)
    if close:
        return f" (did you mean {by_text[close[0]]!r}?)"
    return f", which has {len(known)} tasks such as {sorted(by_text)[0]!r}"


def _cut_incomplete_line(fd: int) -> int:
    """Remove what follows the last newline; returns its length in bytes."""
    size = end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - BLOCK)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(fd, end)
    return size - end


def _write(fd: int, data: bytes) -> None:
    """Write everything; a full disk accepts a part and reports the error on the next write."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@functools.cache  # tests may be megabytes, and each task has hundreds of samples
def _task_content(task: Task) -> str:
    """Hash of everything in a job except the sample."""
    job = task.job("", 1.0)
    fields = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    fields["limits"] = dataclasses.asdict(job.limits)
    for name in ("compare", "other"):
        if fields.get(name) is not None:
            fields[name] = fields[name].__qualname__
    return _hash(task.task_id, type(job).__name__, fields)


def _hash(*parts: object) -> str:
    # Escaped to ASCII, so that half a surrogate pair can be hashed too.
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
