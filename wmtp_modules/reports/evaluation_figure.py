"""Draws the report of an evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from wmtp_modules.reports.curves import COLOURS, new_figure, style
from wmtp_modules.reports.evaluation_page import VERDICTS

# Of the verdicts in order: pass is green, infrastructure is grey.
PALETTE = "#009E73 #D55E00 #0072B2 #CC79A7 #E69F00 #F0E442 #56B4E9 #000000 #999999"
VERDICT_COLOURS = dict(zip(VERDICTS, PALETTE.split(), strict=True))


def draw_report(report: Mapping) -> Figure | None:
    """The picture of a report (see ``write_report``); None if there is nothing to draw."""
    panels: list[Callable[[Axes, Mapping], None]] = []
    if report.get("pass_at_k"):
        panels.append(_pass_at_k)
    if report.get("samples"):
        panels.append(_verdicts)
    if any(row["tokens"] for row in report.get("per_head", ())):
        panels += [_loss, _accuracy]
        if any(row.get("calibration") for row in report["per_head"]):
            panels.append(_calibration)
    if report.get("tokens_per_forward"):
        panels.append(_acceptance)
    if not panels:
        return None
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = new_figure(4.6 * columns + 0.6, 3.9 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, draw in zip(axes, panels, strict=False):
        draw(axis, report)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def _pass_at_k(axis: Axes, report: Mapping) -> None:
    lines = report["by_temperature"]
    ks = list(dict.fromkeys(k for at in lines for k in at["pass_at_k"]))
    places = {k: i for i, k in enumerate(ks)}
    for index, at in enumerate(lines):
        figures = at["pass_at_k"]
        # Side by side, so that no interval hides another.
        x = [places[k] + 0.08 * (index - (len(lines) - 1) / 2) for k in figures]
        y = [figure["value"] for figure in figures.values()]
        below = [max(0.0, f["value"] - f["low"]) for f in figures.values()]
        above = [max(0.0, f["high"] - f["value"]) for f in figures.values()]
        label = "samples" if at["temperature"] is None else f"T={at['temperature']}"
        look: dict[str, Any] = style(index) | {"markersize": 5, "capsize": 3, "linewidth": 1.4}
        axis.errorbar(x, y, yerr=[below, above], label=label, **look)
    axis.set_xticks(range(len(ks)), ks)
    axis.set_xlim(-0.5, len(ks) - 0.5)
    axis.set_ylim(0, 1.03)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(alpha=0.25)
    title = f"pass@k, {report['problems']} problems, 95 % intervals"
    axis.set(title=title, xlabel="k", ylabel="problems solved")
    if len(lines) > 1:
        axis.legend(fontsize="small", frameon=False, loc="lower right")


def _verdicts(axis: Axes, report: Mapping) -> None:
    lines = report["by_temperature"]
    names = [name for name in VERDICTS if name in report["verdicts"]]
    lefts = [0.0] * len(lines)
    for name in names:
        shares = [at["verdicts"].get(name, 0) / at["samples"] for at in lines]
        axis.barh(
            range(len(lines)), shares, left=lefts, height=0.6, color=VERDICT_COLOURS[name],
            label=f"{name} ({report['verdicts'][name]})", edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        lefts = [left + share for left, share in zip(lefts, shares, strict=True)]
    labels = ["" if at["temperature"] is None else f"T={at['temperature']}" for at in lines]
    axis.set_yticks(range(len(lines)), labels)
    axis.tick_params(axis="y", length=0)
    # From the top down, with room for the legend below the bars.
    axis.set_ylim(1.6 * len(lines) + 0.4, -0.6)
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.set(title=f"Verdicts of {report['samples']} samples", xlabel="share of samples")
    axis.legend(fontsize="small", frameon=False, loc="lower center", ncols=2)


def _measured(report: Mapping) -> list[Mapping]:
    """The heads with targets: short texts have none for the last ones."""
    return [row for row in report["per_head"] if row["tokens"]]


def _loss(axis: Axes, report: Mapping) -> None:
    heads = [row["head"] for row in _measured(report)]
    bars = axis.bar(heads, [row["loss"] for row in _measured(report)], color=COLOURS[0], width=0.6)
    axis.bar_label(bars, fmt="%.2f", fontsize="small")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(title="Held-out loss", xlabel="head", ylabel="nats per token")


def _accuracy(axis: Axes, report: Mapping) -> None:
    heads = [row["head"] for row in _measured(report)]
    for index, name in enumerate(("top1", "top5")):
        values = [row[name] for row in _measured(report)]
        axis.plot(heads, values, label=f"top-{name[3:]}", **style(index))
    axis.set_ylim(0, 1.03)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    axis.legend(fontsize="small", frameon=False)
    axis.set(title="Held-out accuracy", xlabel="head", ylabel="tokens right")


def _calibration(axis: Axes, report: Mapping) -> None:
    axis.plot([0, 1], [0, 1], color="#000000", alpha=0.4, linewidth=1)
    for index, row in enumerate(report["per_head"]):
        x, y = ([bin_[key] for bin_ in row["calibration"]] for key in ("confidence", "accuracy"))
        axis.plot(x, y, label=f"head {row['head']}", markersize=4, linewidth=1.2, **style(index))
    axis.set(xlim=(0, 1), ylim=(0, 1.03), title="Held-out calibration")
    axis.set(xlabel="probability of the likeliest token", ylabel="how often it is right")
    axis.grid(alpha=0.25)
    axis.legend(fontsize="small", frameon=False)


def _acceptance(axis: Axes, report: Mapping) -> None:
    shares = report["acceptance_per_head"]
    heads = range(1, len(shares) + 1)
    bars = axis.bar(heads, shares, color=COLOURS[2], width=0.6)
    axis.bar_label(bars, [f"{100 * share:.0f} %" for share in shares], fontsize="small")
    axis.set_ylim(0, 1.08)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = f"Drafts kept, {report['tokens_per_forward']:.2f} tokens per forward"
    axis.set(title=title, xlabel="head", ylabel="share of forwards")
