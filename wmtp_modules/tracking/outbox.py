"""``RUN_DIR/tracking``: what of a run MLflow shall get, and how far it has got it.

``run.json`` is written by the run, ``.position.json`` by who delivers; figures stand in
``metrics.jsonl`` alone. Nothing here holds a secret.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from wmtp_modules.files import new_file, read_json

ORDER = "run.json"
POSITION = ".position.json"  # of this machine: MLflow knows as much, and a store need not


@dataclass
class Order:
    """What a run wants to have in MLflow.

    ``token`` marks the run through all its starts, ``session`` one start of it. ``status`` is None
    while it runs. ``run_id`` is one to continue, ``ended`` one that a kill has left as running.
    """

    uri: str
    experiment: str
    token: str
    session: str
    run_name: str | None = None
    run_id: str | None = None
    ended: str | None = None
    artifact_root: str | None = None  # of a new experiment
    must_exist: bool = False  # else a run that was deleted is made anew
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)  # absolute, or from the run's folder
    status: str | None = None


@dataclass
class Position:
    """How far MLflow has got a run: all before ``step``, and of it the figures ``names``."""

    run_id: str | None = None
    token: str | None = None  # whose position it is; another run's counts for nothing
    session: str | None = None  # the start that was last at work on it
    step: int = -1
    names: list[str] = field(default_factory=list)
    artifacts: dict[str, list[int]] = field(default_factory=dict)  # size and time of those sent
    status: str | None = None
    problem: str | None = None  # a sentence; None when the last attempt went through

    def has(self, step: int, name: str) -> bool:
        return step < self.step or (step == self.step and name in self.names)

    def add(self, step: int, name: str) -> None:
        if step > self.step:
            self.step, self.names = step, []
        self.names.append(name)


class Outbox:
    """The two files of a run's folder."""

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir).absolute()
        self.folder = self.run_dir / "tracking"
        self.metrics = self.run_dir / "metrics.jsonl"

    def order(self) -> Order | None:
        return _read(self.folder / ORDER, Order)

    def position(self) -> Position:
        return _read(self.folder / POSITION, Position) or Position()

    def save(self, content: Order | Position) -> None:
        """Durably, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = ORDER if isinstance(content, Order) else POSITION
        with new_file(self.folder / name) as unfinished:
            unfinished.write_text(json.dumps(asdict(content), indent=1), encoding="utf-8")


def _read(path: Path, kind: Any) -> Any:
    """None if there is no such file; keys of other versions are left out."""
    if not path.exists():
        return None
    known = {one.name for one in fields(kind)}
    try:
        return kind(**{key: value for key, value in read_json(path).items() if key in known})
    except TypeError as error:
        raise ValueError(f"{path} lacks what belongs there ({error}): delete it") from error


class Lines:
    """The figures in ``metrics.jsonl``, each once, as they come.

    The last line may still grow and is read again; one that is half written waits for the next
    time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = 0  # of the last line
        self._seen: tuple[int, set[str]] = (-1, set())  # its step and figures

    def new(self) -> Iterator[tuple[int, str, float]]:
        """(step, name, value) in order; None, which stands for what is not finite, is NaN."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._start:
                    self._start = 0  # made anew, shorter, when the run resumed
                file.seek(self._start)
                while (raw := file.readline()).endswith(b"\n"):
                    at = file.tell() - len(raw)
                    record = _record(raw)
                    if record is None:
                        continue
                    step = record.pop("step")
                    if step < self._seen[0]:
                        continue
                    if step > self._seen[0]:
                        self._seen = step, set()
                    self._start = at
                    for name, value in record.items():
                        if name not in self._seen[1] and (value is None or _is_number(value)):
                            self._seen[1].add(name)
                            yield step, name, float("nan") if value is None else float(value)
        except FileNotFoundError:
            return


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _record(raw: bytes) -> dict | None:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):  # caught while it was rewritten
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if is_record else None
