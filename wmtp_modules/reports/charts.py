"""Charts as inline SVG: no script, no other file. Colours are in ``page.css``, for light and dark.

A line has a colour, the shape of its marks and, beyond ``LOOKS``, dashes: it can be told without
colour. A mark shows its run, step and value to a pointer.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from wmtp_modules.reports.metrics import MOST_POINTS, Curve, thinned

WIDTH, HEIGHT = 320, 200  # of a viewBox; a page scales it
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 8, 34
LOOKS = 7  # colours and shapes
DASHES = ("", "6 3", "2 3")
# Values so much above their median that a linear axis would show a flat line are on a log axis.
LOG_FROM = 20
ABOUT_MARKS = 8  # of a line that does not mark all its points


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: in the legend, before its last value.
        look: number of its colour, shape and dashes; the chart of one page agree on them.
        pale: drawn behind, such as what ``curve`` smooths.
        half: of an interval around each point, NaN where there is none; drawn as a band.
        every: whether every point is marked, such as a validation.
    """

    name: str
    curve: Curve
    look: int = 0
    pale: Curve | None = None
    half: np.ndarray | None = None
    every: bool = False


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    floor: float | None = None,
    ceiling: float | None = None,
    marks: Sequence[tuple[int, str]] = (),
) -> str:
    """A ``figure`` of lines over optimizer steps with a legend; empty if nothing is to be drawn.

    Args:
        unit: of the values, beside the title.
        floor, ceiling: what the axis shows at least, such as 0 and 1 for a share.
        marks: (step, what happened), as triangles on the axis.
    """
    lines = [line for line in lines if len(line.curve.finite)]
    if not lines:
        return ""
    drawn = [part for line in lines for part in (line.curve, line.pale) if part is not None]
    values = [part.values for part in drawn]
    y = np.concatenate(
        [*values, *(end for line in lines if _has_band(line) for end in _ends(line))]
    )
    y = y[np.isfinite(y)]
    if floor is not None:  # an interval may be wider than what can be
        y = y.clip(min=floor)
    x = np.concatenate([part.steps for part in drawn])
    is_log = floor is None and y.min() > 0 and y.max() > LOG_FROM * np.median(y)
    axis = _Axis(x.min(), x.max(), _bounds(y, floor, ceiling, is_log), is_log)
    parts = [axis.grid(), *(_shapes(line, axis) for line in lines[::-1])]  # the first on top
    for step, told in _spread(marks):
        at, bottom = axis.x(step), HEIGHT - BOTTOM
        shape = f"M{at - 4:.1f},{bottom}h8L{at:.1f},{bottom - 7}z"
        parts.append(f"<path class='event' d='{shape}'><title>{escape(told)}</title></path>")
    unit = f"{unit}, log scale" if unit and is_log else "log scale" if is_log else unit
    return _figure(title, unit, "".join(parts), map(_legend_entry, lines))


def bands(title: str, curves: Sequence[tuple[str, Curve]], *, unit: str = "") -> str:
    """A ``figure`` of shares that add up, the first at the bottom, coloured ``band0`` and so on.

    The curves have the same steps. Empty if none of these is finite in all.
    """
    steps = curves[0][1].steps
    shares = np.stack([curve.values for _, curve in curves])
    is_finite = np.isfinite(shares).all(0)
    if not is_finite.any():
        return ""
    steps, tops = steps[is_finite], shares[:, is_finite].cumsum(0)
    most = MOST_POINTS // len(curves)
    index = np.unique(
        np.concatenate([np.searchsorted(steps, thinned(Curve(steps, t), most).steps) for t in tops])
    )
    axis = _Axis(steps[0], steps[-1], (0.0, 1.0), False)
    parts, below = [], np.zeros(len(index))
    for i, top in enumerate(tops[:, index]):
        there = [f"{axis.x(s):.1f},{axis.y(v):.1f}" for s, v in zip(steps[index], top, strict=True)]
        back = [
            f"{axis.x(s):.1f},{axis.y(v):.1f}" for s, v in zip(steps[index], below, strict=True)
        ]
        if len(there) == 1:  # a single step is a bar
            parts.append(_bar(i, axis, below[0], top[0]))
        else:
            parts.append(f"<path class='band{i}' d='M{' '.join(there + back[::-1])}z'/>")
        below = top
    entries = [
        f"<li><span class='swatch band{i}'></span>{escape(name)} "
        f"<b>{curve.finite.values[-1]:.1%}</b></li>"
        for i, (name, curve) in enumerate(curves)
    ]
    return _figure(title, unit, "".join(parts) + axis.grid(lines=False), entries[::-1])


def number(value: float) -> str:
    """Four significant digits, short: for axes, legends and tables."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 10_000:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size <= abs(value) < 1e12:
                return f"{value / size:.4g}{letter}"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+")


class _Axis:
    """From steps and values to places in the viewBox, and the grid around them."""

    def __init__(self, first: int, last: int, bounds: tuple[float, float], is_log: bool) -> None:
        self._x = (first, last) if last > first else (first - 1, last + 1)
        self._is_log = is_log
        low, high = bounds
        self._y = (math.log10(low), math.log10(high)) if is_log else bounds

    def x(self, step: float) -> float:
        first, last = self._x
        share = (min(max(step, first), last) - first) / (last - first)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        value = math.log10(max(value, 1e-300)) if self._is_log else value
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def grid(self, *, lines: bool = True) -> str:
        right, bottom, parts = WIDTH - RIGHT, HEIGHT - BOTTOM, []
        ticks = _log_ticks(*self._y) if self._is_log else _ticks(*self._y)
        for value in ticks:
            at = self.y(value)
            if lines:
                parts.append(f"<path class='grid' d='M{LEFT},{at:.1f}H{right}'/>")
            told = number(value) if self._is_log else _tick(value, ticks)
            parts.append(f"<text x='{LEFT - 5}' y='{at + 4:.1f}' class='y'>{told}</text>")
        for step in _ticks(*self._x, about=4, whole=True):
            at = self.x(step)
            parts.append(f"<path class='grid' d='M{at:.1f},{bottom}v4'/>")
            parts.append(f"<text x='{at:.1f}' y='{bottom + 16}' class='x'>{number(step)}</text>")
        parts.append(f"<path class='axis' d='M{LEFT},{bottom}H{right}'/>")
        parts.append(f"<text x='{right}' y='{HEIGHT - 4}' class='step'>optimizer step</text>")
        return "".join(parts)


def _bounds(
    y: np.ndarray, floor: float | None, ceiling: float | None, is_log: bool
) -> tuple[float, float]:
    low, high = float(y.min()), float(y.max())
    if is_log:
        return low / 1.1, high * 1.1
    low = low if floor is None else min(low, floor)
    high = high if ceiling is None else max(high, ceiling)
    is_flat = high - low <= 1e-6 * abs(high)  # rounding is no course
    room = 0.05 * ((abs(high) or 1.0) if is_flat else high - low)
    return (
        low if floor is not None and low == floor else low - room,
        high if ceiling is not None and high == ceiling else high + room,
    )


def _ticks(low: float, high: float, about: int = 5, whole: bool = False) -> list[float]:
    """Round numbers inside the bounds."""
    rough = (high - low) / about
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    step = max(step, 1) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    """As many digits as tell the ticks of an axis apart."""
    apart = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value)
    if 1e-4 <= apart < 1e3 and abs(value) < 10_000:
        return f"{value:.{max(0, -math.floor(math.log10(apart) + 1e-9))}f}"
    return number(value)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside the bounds, given as logarithms; further ones where these are few."""
    every = max(1, round((high - low) / 5))
    powers = range(math.ceil(low - 1), math.floor(high + 1) + 1)
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    values = [f * 10.0**p for p in powers if p % every == 0 for f in factors]
    return [value for value in values if low <= math.log10(value) <= high]


def _has_band(line: Line) -> bool:
    return line.half is not None and bool(np.isfinite(line.half).any())


def _ends(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of the interval at each point, NaN where there is none."""
    assert line.half is not None
    return line.curve.values - line.half, line.curve.values + line.half


def _shapes(line: Line, axis: _Axis) -> str:
    turn, place = divmod(line.look, LOOKS)
    dash = DASHES[turn % len(DASHES)]
    parts = []
    if _has_band(line):
        known = np.flatnonzero(np.isfinite(_ends(line)[0]))
        known = np.unique(np.append(known[:: len(known) // 500 + 1], known[-1]))
        steps = line.curve.steps[known].tolist()
        low, high = (
            [f"{axis.x(s):.1f},{axis.y(v):.1f}" for s, v in zip(steps, end[known], strict=True)]
            for end in _ends(line)
        )
        parts.append(f"<path class='interval' d='M{' '.join(low + high[::-1])}z'/>")
    if line.pale is not None:
        parts.append(f"<path class='pale' d='{_path(thinned(line.pale), axis)}'/>")
    dashes = f" stroke-dasharray='{dash}'" if dash else ""
    parts.append(f"<path class='line' d='{_path(thinned(line.curve), axis)}'{dashes}/>")
    curve, n = line.curve.finite, len(line.curve.finite)
    if line.every and n <= 60:
        marked = np.arange(n)
    else:  # lines that lie on each other are marked at different steps
        shift = (line.look % 4) / 4
        at = (np.arange(ABOUT_MARKS) + shift) / ABOUT_MARKS * (n - 1)
        marked = np.unique(np.append(at.round().astype(int), n - 1))
    for i in marked:
        step, value = int(curve.steps[i]), float(curve.values[i])
        told = f"{line.name}, step {step:,}: {number(value)}"
        if line.half is not None and math.isfinite(h := line.half[line.curve.steps == step][0]):
            told += f" ± {number(h)}"
        shape = _mark(place, axis.x(step), axis.y(value))
        parts.append(f"<path class='mark' d='{shape}'><title>{escape(told)}</title></path>")
    return f"<g class='look{place}'>{''.join(parts)}</g>"


def _path(curve: Curve, axis: _Axis) -> str:
    """Lines between neighbours; a value that was not finite is a gap."""
    parts, pen = [], "M"
    for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True):
        if math.isnan(value):
            pen = "M"
            continue
        # A point between two gaps is a dot: a line of no length with round ends.
        parts.append(f"{pen}{axis.x(step):.1f},{axis.y(value):.1f}{'h0' if pen == 'M' else ''}")
        pen = "L"
    return "".join(parts)


def _mark(place: int, x: float, y: float, r: float = 3.2) -> str:
    """Circle, square, triangle, diamond, triangle upside down, plus or cross, around a point."""
    at = f"M{x:.1f},{y:.1f}"
    d, s = 1.3 * r, 0.85 * r
    return (
        at
        + (
            f"m-{r},0a{r},{r} 0 1,0 {2 * r},0a{r},{r} 0 1,0 -{2 * r},0",
            f"m-{s},-{s}h{2 * s}v{2 * s}h-{2 * s}z",
            f"m0,-{d}l{d},{2 * r}h-{2 * d}z",
            f"m0,-{d}l{d},{d}l-{d},{d}l-{d},-{d}z",
            f"m0,{d}l{d},-{2 * r}h-{2 * d}z",
            f"m-{r},0h{2 * r}m-{r},-{r}v{2 * r}",
            f"m-{r},-{r}l{2 * r},{2 * r}m0,-{2 * r}l-{2 * r},{2 * r}",
        )[place]
    )


def _bar(i: int, axis: _Axis, low: float, high: float) -> str:
    top, bottom = axis.y(high), axis.y(low)
    width = WIDTH - LEFT - RIGHT
    return (
        f"<rect class='band{i}' x='{LEFT + width / 4:.1f}' y='{top:.1f}' width='{width / 2:.1f}' "
        f"height='{bottom - top:.1f}'/>"
    )


def _spread(marks: Sequence[tuple[int, str]], most: int = 200) -> Sequence[tuple[int, str]]:
    return marks[:: len(marks) // most + 1]


def _legend_entry(line: Line) -> str:
    turn, place = divmod(line.look, LOOKS)
    dash = DASHES[turn % len(DASHES)]
    dashes = f" stroke-dasharray='{dash}'" if dash else ""
    swatch = (
        f"<svg class='key look{place}' viewBox='0 0 26 12' aria-hidden='true'>"
        f"<path class='line' d='M2,6H24'{dashes}/>"
        f"<path class='mark' d='{_mark(place, 13, 6)}'/></svg>"
    )
    last = line.curve.finite.values[-1]
    return f"<li>{swatch}{escape(line.name)} <b>{number(float(last))}</b></li>"


def _figure(title: str, unit: str, inside: str, legend: Iterable[str]) -> str:
    told = f" <span class='unit'>{escape(unit)}</span>" if unit else ""
    return (
        f"<figure class='chart'><figcaption>{escape(title)}{told}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(title)}'>"
        f"{inside}</svg><ul class='legend'>{''.join(legend)}</ul></figure>\n"
    )
