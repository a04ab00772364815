"""Reads ``metrics.jsonl`` into curves, smooths them, and makes them short enough to draw."""

import json
from array import array
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

MOST_POINTS = 2000  # of a curve in a page: no screen shows more, and a file should open at once
PER_BUCKET = 3  # points that ``thinned`` keeps of a bucket


@dataclass(frozen=True, eq=False)
class Curve:
    """One figure of a run: fp64 ``values`` at rising int64 ``steps``; NaN if it was not finite."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> "Curve":
        """Without the steps at which it was not."""
        is_finite = np.isfinite(self.values)
        return Curve(self.steps[is_finite], self.values[is_finite])


@dataclass(frozen=True, eq=False)
class Metrics:
    """What a run logged: curves by name, and how many lines could not be read."""

    curves: dict[str, Curve]
    unreadable: int = 0

    def get(self, name: str) -> Curve | None:
        return self.curves.get(name)

    @property
    def last_step(self) -> int:
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)

    def curves_of(self, start: str) -> dict[str, Curve]:
        """Curves whose names begin so, by what comes after."""
        found = self.curves.items()
        return {name.removeprefix(start): c for name, c in found if name.startswith(start)}

    def by_head(self, name: str) -> list[Curve]:
        """Curves ``name_head_0`` and so on, as many heads as were logged."""
        found = []
        while (curve := self.curves.get(f"{name}_head_{len(found)}")) is not None:
            found.append(curve)
        return found


def read_metrics(path: str | Path) -> Metrics:
    """The figures of a ``metrics.jsonl``, line by line: a long run's file is larger than memory.

    A last line without its end, which a kill leaves, is left out. Of a step that stands there twice
    the later figure counts.

    Raises:
        OSError: if the file cannot be read.
    """
    steps: defaultdict[str, array] = defaultdict(lambda: array("q"))
    values: defaultdict[str, array] = defaultdict(lambda: array("d"))
    unreadable = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
                step = record["step"]
                if type(step) is not int:
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                unreadable += bool(line.strip())
                continue
            for name, value in record.items():
                if name != "step" and (value is None or type(value) in (int, float)):
                    steps[name].append(step)
                    values[name].append(np.nan if value is None else value)
    return Metrics({name: _curve(steps[name], values[name]) for name in steps}, unreadable)


def _curve(steps: array, values: array) -> Curve:
    x, y = np.array(steps, np.int64), np.array(values, np.float64)
    y[~np.isfinite(y)] = np.nan
    if (np.diff(x) <= 0).any():
        x, last = np.unique(x[::-1], return_index=True)
        y = y[::-1][last]
    return Curve(x, y)


def thinned(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """At most about as many points: of equal buckets the lowest, the highest and one gap (NaN).

    The first and the last point stay, and so do the extremes of the whole.
    """
    n = len(curve)
    if n <= most:
        return curve
    kept = {0, n - 1}
    edges = np.linspace(0, n, max(1, (most - 2) // PER_BUCKET) + 1).astype(int)
    for start, end in pairwise(edges.tolist()):
        part = curve.values[start:end]
        is_gap = np.isnan(part)
        if is_gap.any():
            kept.add(start + int(is_gap.argmax()))
        if not is_gap.all():
            kept |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
    index = np.array(sorted(kept))
    return Curve(curve.steps[index], curve.values[index])


def smoothed(curve: Curve, smoothing: float) -> Curve:
    """Exponential average over the finite points, unbiased at the start."""
    kept = curve.finite
    values, total, weight = np.empty(len(kept)), 0.0, 0.0
    for i, value in enumerate(kept.values.tolist()):
        total = smoothing * total + (1 - smoothing) * value
        weight = smoothing * weight + 1 - smoothing
        values[i] = total / weight
    return Curve(kept.steps, values)
