"""Draws training curves from ``metrics.jsonl``, and a critic's calibration.

matplotlib takes two seconds to import, so it is imported only when something is drawn.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wmtp_modules.files import new_file
from wmtp_modules.reports.metrics import Metrics, read_metrics, smoothed, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which suits every kind of colour vision; markers distinguish the runs
# without colour. Black comes last because few pictures have that many runs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
SMOOTHING = 0.9  # of the exponential average over logged steps; the raw line is drawn pale


def plot_curves(metrics_by_run: Mapping[str, str | Path], out_png: str | Path) -> None:
    """Draw held-out loss (mean of heads, and each head), tokens per forward, training loss and ESS.

    Args:
        metrics_by_run: ``metrics.jsonl`` of each run, keyed by the name for the legend.

    Raises:
        ValueError: if there is nothing to draw.
    """
    figure = _curves({name: read_metrics(path) for name, path in metrics_by_run.items()})
    if figure is None:
        raise ValueError(f"no loss to draw in {', '.join(map(str, metrics_by_run.values()))}")
    _save(figure, out_png)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, its size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    return figure


def style(index: int) -> dict[str, Any]:
    """Colour and marker of a line, dashed where both are taken already."""
    turn, place = divmod(index, len(COLOURS))
    return {
        "color": COLOURS[place],
        "marker": MARKERS[place],
        "linestyle": ("-", "--", ":")[turn % 3],
    }


def _finish(axis: "Axes") -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _curves(runs: Mapping[str, Metrics]) -> "Figure | None":
    """The picture of ``plot_curves``; None if there is nothing to draw."""
    keys = {key for run in runs.values() for key in run.curves}
    heads = sum(key.startswith("val_loss_head_") for key in keys)
    wide = [
        ("val_loss", "Held-out loss, mean of heads", "loss (nats per token)"),
        ("tokens_per_forward", "Held-out tokens per forward", "tokens per forward"),
        ("loss", "Training loss, unweighted, smoothed", "loss (nats per token)"),
        ("ess", "Effective sample size", "share of tokens"),
    ]
    wide = [panel for panel in wide if panel[0] in keys]
    if not any(key.startswith("acceptance_head_") for key in keys):  # of one head it is 1
        wide = [panel for panel in wide if panel[0] != "tokens_per_forward"]
    if not wide:
        return None
    figure = new_figure(4.4 * max(len(wide), 2), 7.2 if heads > 1 else 4.4)
    rows = figure.subfigures(2 if heads > 1 else 1, 1, squeeze=False)[:, 0]
    axes = rows[0].subplots(1, len(wide), squeeze=False)[0]
    for axis, (key, title, unit) in zip(axes, wide, strict=True):
        _draw(axis, runs, key, smooth=key in ("loss", "ess"))
        axis.set(title=title, ylabel=unit, xlabel="optimizer step")
    if "ess" in keys:
        axes[-1].set_ylim(0, 1.05)
    if heads > 1:
        small = rows[1].subplots(1, heads, sharex=True)
        for k, axis in enumerate(small):
            _draw(axis, runs, f"val_loss_head_{k}", smooth=False)
            axis.set(title=f"Held-out loss, head {k}", xlabel="optimizer step")
        small[0].set_ylabel("loss (nats per token)")
    handles, labels = axes[0].get_legend_handles_labels()
    inches = 0.7 + 0.08 * max(map(len, labels))  # of an entry
    columns = int(min(len(labels), 6, max(1, figure.get_figwidth() // inches)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)
    return figure


def plot_calibration(
    predicted: np.ndarray,
    good: np.ndarray,
    rows: np.ndarray,
    out_png: str | Path,
    *,
    bins: int = 10,
) -> None:
    """Draw mean f(R) against mean predicted V over bins of equally many tokens.

    A critic that is right on average lies on the diagonal; one that knows nothing is a point.

    Args:
        predicted: V after each token.
        good: f(R) of its response, in [0, 1].
        rows: its response, which tokens of a bin share: an error bar counts each once.
        bins: most points to draw.
    """
    _save(_calibration(predicted, good, rows, bins), out_png)


def _calibration(predicted: np.ndarray, good: np.ndarray, rows: np.ndarray, bins: int) -> "Figure":
    parts = np.array_split(np.argsort(predicted, kind="stable"), min(bins, len(predicted)))
    x = np.array([predicted[part].mean() for part in parts])
    y = np.array([good[part].mean() for part in parts])
    error = np.array([good[part].std() / len(np.unique(rows[part])) ** 0.5 for part in parts])

    figure = new_figure(4.8, 4.4)
    axis = figure.subplots()
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axis.plot(ends, ends, color="#000000", alpha=0.4, linewidth=1, label="right on average")
    axis.errorbar(
        x,
        y,
        yerr=error,
        color=COLOURS[0],
        marker="o",
        capsize=3,
        linewidth=1.6,
        label=f"held-out tokens, {len(parts)} bins, ±1 standard error",
    )
    axis.set(
        title="Critic on held-out responses",
        xlabel="predicted share of good, V",
        ylabel="share of good, mean f(R)",
    )
    _finish(axis)
    figure.legend(loc="outside lower center", fontsize="small")
    return figure


def _save(figure: "Figure", out_png: str | Path) -> None:
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    with new_file(Path(out_png)) as unfinished:
        figure.savefig(unfinished, format="png", dpi=130)


def _draw(axis: "Axes", runs: Mapping[str, Metrics], key: str, *, smooth: bool) -> None:
    """One line per run; values that were not finite (null) are skipped."""
    for index, (name, run) in enumerate(runs.items()):
        if key not in run.curves or not len(curve := run.curves[key].finite):
            continue
        look, shown = style(index), thinned(curve)
        if smooth:
            axis.plot(shown.steps, shown.values, color=look["color"], alpha=0.25, linewidth=0.8)
            shown = thinned(smoothed(curve, SMOOTHING))
        every = max(1, len(shown) // 12)
        axis.plot(
            shown.steps,
            shown.values,
            label=name,
            linewidth=1.6,
            markersize=4,
            markevery=(index * every // len(runs), every) if smooth else None,
            **look,
        )
    _finish(axis)
