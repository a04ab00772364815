"""Several runs in one page and one table; seeds of one arm are averaged, equal seeds are paired.

    python -m wmtp_modules.reports.compare RUN... --output compare.html [--baseline NAME]

RUN is the ``output_dir`` of a training run; its controls come along. Runs whose configs differ in
nothing but the seed, and in places that carry it (``runs/a_1`` for ``runs/a_2``), are seeds of one
arm. Intervals are 95 % of Student's t over seeds: of the mean, and of the mean paired difference to
the baseline, over the seeds that both have.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wmtp_modules.reports import page
from wmtp_modules.reports.charts import Line, chart
from wmtp_modules.reports.metrics import MOST_POINTS, Curve, smoothed
from wmtp_modules.reports.run_page import (
    NATS,
    RunFolder,
    controls_of,
    flat_settings,
    read_run,
    smoothing,
)

BASELINE = "uniform"  # if there is an arm of this name and no other is asked for


@dataclass
class Arm:
    """Runs that differ in their seeds only."""

    runs: list[RunFolder]
    name: str = ""

    @property
    def seeds(self) -> list[Any]:
        return [run.settings.get("seed") for run in self.runs]

    def figures(self) -> tuple[int | None, dict[Any, list[float]]]:
        """The last validated step of the arm, and each seed's losses of the heads there.

        A seed that has not come so far has none.
        """
        step = max((step for run in self.runs for step in run.heldout), default=None)
        there = zip(self.seeds, self.runs, strict=True)
        return step, {s: run.heldout[step] for s, run in there if step in run.heldout}

    def tokens_per_forward(self) -> dict[Any, float]:
        """Each seed's at the arm's last validated step; older runs have none."""
        step, _ = self.figures()
        curves = [run.metrics.get("tokens_per_forward") for run in self.runs]
        at = zip(self.seeds, curves, strict=True)
        found = {s: c.finite.values[c.finite.steps == step] for s, c in at if c is not None}
        return {seed: float(values[0]) for seed, values in found.items() if len(values)}


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds and half of its 95 % interval, which is None of one seed."""

    mean: float
    half: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of Student's t, from at least one value."""
    n, mean = len(values), float(np.mean(values))
    half = None if n < 2 else _t(n) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, half, n)


def _t(n: int) -> float:
    """The 97.5 % quantile of Student's t for n values."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.975))


def paired(arm: Arm, other: Arm) -> Estimate | None:
    """``arm`` minus ``other`` in the mean over heads, over seeds of both; None if they share none.

    Runs without a seed in their config have no pair.
    """
    (_, a), (_, b) = arm.figures(), other.figures()
    return _gap({s: _mean(one) for s, one in a.items()}, {s: _mean(one) for s, one in b.items()})


def _gap(a: dict[Any, float], b: dict[Any, float]) -> Estimate | None:
    seeds = [seed for seed in a if seed in b and seed is not None]
    return estimate([a[seed] - b[seed] for seed in seeds]) if seeds else None


# --------------------------------------------------------------------------------- arms


def arms_of(folders: Iterable[str | Path]) -> list[Arm]:
    """The runs of these folders and their controls as arms, in the order in which they come.

    Raises:
        ValueError: if a folder holds no run.
    """
    arms: list[Arm] = []
    seen = set()
    for folder in folders:
        run = read_run(folder)
        for one in (run, *controls_of(run)):
            if (place := one.folder.resolve()) in seen:
                continue
            seen.add(place)
            for arm in arms:
                if _are_one_arm(arm.runs[0], one) and one.settings.get("seed") not in arm.seeds:
                    arm.runs.append(one)
                    break
            else:
                arms.append(Arm([one]))
    _name(arms)
    return arms


def _are_one_arm(a: RunFolder, b: RunFolder) -> bool:
    if a.name != b.name or not (a.settings and b.settings):
        return False
    flat_a, flat_b = _identity(a), _identity(b)
    seeds = str(a.settings.get("seed")), str(b.settings.get("seed"))
    return flat_a.keys() == flat_b.keys() and all(
        _same(flat_a[key], flat_b[key], seeds) for key in flat_a
    )


def _identity(run: RunFolder) -> dict[str, Any]:
    return {key: value for key, value in flat_settings(run).items() if key != "seed"}


def _same(a: Any, b: Any, seeds: tuple[str, str]) -> bool:
    """Whether two values are equal but for the runs' own seeds as numbers in a text."""
    if a == b or not (isinstance(a, str) and isinstance(b, str)):
        return a == b
    parts = [re.split(r"(\d+)", text) for text in (a, b)]
    return len(parts[0]) == len(parts[1]) and all(
        x == y or (x, y) == seeds for x, y in zip(*parts, strict=True)
    )


def _name(arms: list[Arm]) -> None:
    """Names that tell arms apart: with what differs in the configs, else with their folders."""
    for arm in arms:
        alike = [one for one in arms if one.runs[0].name == arm.runs[0].name]
        arm.name = arm.runs[0].name
        if len(alike) == 1:
            continue
        flats = [_identity(one.runs[0]) for one in alike]
        keys = dict.fromkeys(key for flat in flats for key in flat)
        own = _identity(arm.runs[0])
        told = [
            f"{key}={own.get(key)}"
            for key in keys
            if len({repr(flat.get(key)) for flat in flats}) > 1
        ]
        arm.name += f" ({', '.join(told[:3])})"
    names = [arm.name for arm in arms]
    for arm in arms:
        if names.count(arm.name) > 1:
            arm.name += f" in {arm.runs[0].folder}"


def baseline_of(arms: Sequence[Arm], name: str | None = None) -> Arm:
    """The arm to compare with: the one asked for, else ``uniform``, else the first.

    Raises:
        ValueError: if no arm has the name.
    """
    for wanted in (name, BASELINE) if name is None else (name,):
        for arm in arms:
            if wanted in (arm.name, arm.runs[0].name):
                return arm
    if name is not None:
        raise ValueError(f"--baseline {name}: the arms are {', '.join(a.name for a in arms)}")
    return arms[0]


# -------------------------------------------------------------------------------- table


def comparison_table(arms: Sequence[Arm], baseline: Arm) -> tuple[list[str], list[list[str]]]:
    """Head and rows: held-out loss of each arm at its last validation, lowest mean first.

    Where runs have them, the tokens per forward of their greedy decoding come last.
    """
    heads = max((len(one) for arm in arms for one in arm.figures()[1].values()), default=0)
    head = ["arm", "seeds", "step", *(f"head {k}" for k in range(heads)), "mean of heads"]
    head += [f"minus {baseline.name}", "pairs"]
    fast = {arm.name: arm.tokens_per_forward() for arm in arms}
    if any(fast.values()):
        head += ["tokens/forward", f"minus {baseline.name}"]
    ranked = []
    for arm in arms:
        step, losses = arm.figures()
        if not losses:
            ranked.append((math.inf, [arm.name, "0", *[""] * (len(head) - 2)]))
            continue
        mean = estimate([_mean(one) for one in losses.values()])
        cells = [f"{float(np.mean(x)):.4f}" for x in zip(*losses.values(), strict=True)]
        cells += [""] * (heads - len(cells))
        gap = None if arm is baseline else paired(arm, baseline)
        told = ["", ""] if gap is None else [_signed(gap), str(gap.n)]
        if any(fast.values()):
            own = fast[arm.name]
            more = None if arm is baseline else _gap(own, fast[baseline.name])
            told += [str(estimate([*own.values()])) if own else "", _signed(more) if more else ""]
        ranked.append(
            (mean.mean, [arm.name, str(len(losses)), f"{step:,}", *cells, str(mean), *told])
        )
    return head, [row for _, row in sorted(ranked, key=lambda one: one[0])]


def _signed(gap: Estimate) -> str:
    return f"{gap.mean:+.4f}" + ("" if gap.half is None else f" ± {gap.half:.4f}")


def notes_on(arms: Sequence[Arm], baseline: Arm) -> list[str]:
    """What a reader of the table must know of it."""
    notes, steps = [], set()
    for arm in arms:
        step, losses = arm.figures()
        steps.add(step)
        if step is None:
            notes.append(f"{arm.name} has no validation yet.")
        for seed, run in zip(arm.seeds, arm.runs, strict=True):
            if step is not None and seed not in losses:
                at = max(run.heldout, default=None)
                come = "has no validation" if at is None else f"has come to step {at:,}"
                notes.append(f"{arm.name}, seed {seed}: {come}, so it is not in the figures.")
    if len(steps - {None}) > 1:
        notes.append("The arms were validated last at different steps.")
    if all(len(arm.figures()[1]) < 2 for arm in arms):
        notes.append("One seed of each arm: no intervals, and small differences mean nothing.")
    by_seed: dict[Any, set] = {}
    for arm in arms:
        for seed, run in zip(arm.seeds, arm.runs, strict=True):
            if 0 in run.heldout:
                by_seed.setdefault(seed, set()).add(round(_mean(run.heldout[0]), 6))
    if any(len(values) > 1 for values in by_seed.values()):
        notes.append(
            "Runs of one seed had different losses before training: they began from other models "
            "or are validated on other text, and then their losses do not compare."
        )
    return notes


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as lines of text."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        first, *others = row
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# --------------------------------------------------------------------------------- page


def write_comparison(path: str | Path, arms: Sequence[Arm], baseline: Arm) -> None:
    """The page: table, notes, and curves as means over seeds with their intervals."""
    head, rows = comparison_table(arms, baseline)
    own = next((i for i, row in enumerate(rows) if row[0] == baseline.name), None)
    K = max((len(run.metrics.by_head("val_loss")) for arm in arms for run in arm.runs), default=0)
    heads = range(K if K > 1 else 0)
    sections = [
        "<h1>Comparison</h1>\n",
        page.paragraph(
            f"Unweighted held-out loss, {NATS}, at the last validation of each arm. ± and bands: "
            f"95 % intervals over seeds. Differences to {baseline.name} are paired by seed; below "
            "0 is better. Tokens per forward: of greedy self-speculative decoding; more is better.",
            "caption",
        ),
        page.table(head, rows, own=own),
        *(page.paragraph(note, "warning") for note in notes_on(arms, baseline)),
        page.section(
            "Held-out loss",
            *_of_mean_and_heads(arms, heads, "val_loss", every=True),
            page.charts(
                _chart("Tokens per forward", arms, "tokens_per_forward", every=True, floor=1.0)
            ),
        ),
        page.section(
            "Training loss",
            page.paragraph("Unweighted, smoothed.", "caption"),
            *_of_mean_and_heads(arms, heads, "loss", smooth=True),
        ),
        page.section(
            "Weights",
            page.charts(
                _chart("Effective sample size", arms, "ess", unit="share of tokens", floor=0.0),
                _chart("Selected", arms, "selected_share", unit="share, weight ≥ 1", floor=0.0),
                _chart(
                    "On marked noise",
                    arms,
                    "noise_in_weight",
                    smooth=True,
                    unit="share of the weight",
                    floor=0.0,
                ),
            ),
        ),
        page.section(
            "Steps",
            page.charts(
                _chart("Learning rate", arms, "lr", floor=0.0),
                _chart("Gradient norm before clipping", arms, "grad_norm", smooth=True),
                _chart("Clipped", arms, "clipped_share", smooth=True, unit="share", floor=0.0),
                _chart("Tokens per second", arms, "tokens_per_s", smooth=True, floor=0.0),
            ),
        ),
        page.section("Runs", page.table(["arm", "seed", "folder"], _places(arms), kind="text")),
    ]
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    page.write_page(path, "Comparison", "".join(sections))


def _places(arms: Sequence[Arm]) -> list[list[str]]:
    return [
        [arm.name, str(seed), str(run.folder)]
        for arm in arms
        for seed, run in zip(arm.seeds, arm.runs, strict=True)
    ]


def _of_mean_and_heads(
    arms: Sequence[Arm], heads: Sequence[int], key: str, **how: bool
) -> tuple[str, str]:
    """Charts of a loss: the mean of heads, and below it each head."""
    mean = _chart("Mean of heads", arms, key, unit=NATS, **how)
    each = [_chart(f"Head {k}", arms, f"{key}_head_{k}", unit=NATS, **how) for k in heads]
    return page.charts(mean), page.charts(*each)


def _chart(
    title: str, arms: Sequence[Arm], key: str, *, smooth: bool = False, every: bool = False, **how
) -> str:
    lines = []
    for look, arm in enumerate(arms):
        curves = [run.metrics.curves[key] for run in arm.runs if key in run.metrics.curves]
        curves = [curve for curve in curves if len(curve.finite)]
        if smooth:
            curves = [smoothed(curve, smoothing(curve)) for curve in curves]
        if curves:
            curve, half = mean_curve(curves)
            lines.append(Line(arm.name, curve, look, half=half, every=every))
    return chart(title, lines, **how)


def mean_curve(curves: Sequence[Curve]) -> tuple[Curve, np.ndarray | None]:
    """Mean over seeds at the steps that all have, at most ``MOST_POINTS``, and half the interval.

    The longest alone if they share no step. A value that is not finite in one seed is none in all.
    """
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    if not len(steps):
        return max(curves, key=len), None
    if len(steps) > MOST_POINTS:
        steps = steps[np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int)]
    values = np.stack([c.values[np.searchsorted(c.steps, steps)] for c in curves])
    n = len(curves)
    half = None if n < 2 else _t(n) * values.std(0, ddof=1) / math.sqrt(n)
    return Curve(steps, values.mean(0)), half


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def compare(folders: Iterable[str | Path], output: str | Path, baseline: str | None = None) -> str:
    """Write the page and return the table as text, with its notes.

    Raises:
        ValueError: if a folder holds no run, or no arm is called ``baseline``.
        OSError: if the page cannot be written.
    """
    arms = arms_of(folders)
    against = baseline_of(arms, baseline)
    write_comparison(output, arms, against)
    notes = notes_on(arms, against)
    table = text_table(*comparison_table(arms, against))
    return "\n".join(["Held-out loss (95 % intervals over seeds)", table, *notes])


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a training run")
    parser.add_argument("--output", required=True, metavar="FILE", help="the HTML page to write")
    parser.add_argument("--baseline", metavar="NAME", help="the arm to compare with")
    given = parser.parse_args(argv)
    try:
        print(compare(given.runs, given.output, given.baseline))
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"Page  {given.output}")


if __name__ == "__main__":
    main()
