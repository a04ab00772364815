"""``run.html``: one page that shows a run, made from the files in its folder alone.

    python -m wmtp_modules.reports.run_page RUN

makes it anew, also of a run that is still training or was killed. What is drawn comes from
``metrics.jsonl`` here and in ``controls/NAME``; names, limits and the differences to controls from
``config.yaml``; what went wrong from ``skipped_steps.jsonl`` and ``loss_spikes.jsonl``; how it
ended from ``summary.json`` and ``exit.json``; the tokens from ``tokens.json``. Only the first must
be there.
"""

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from wmtp_modules.config.secrets import HIDDEN, hidden, without_secrets
from wmtp_modules.reports import page
from wmtp_modules.reports.charts import Line, bands, chart, number
from wmtp_modules.reports.metrics import MOST_POINTS, Curve, Metrics, read_metrics, smoothed
from wmtp_modules.reports.tokens import tokens_html, write_tokens

if TYPE_CHECKING:  # a page is made without it
    from torchtune.models.llama2 import Llama2Tokenizer

log = logging.getLogger(__name__)

NATS = "nats per token"
MOST_ROWS = 50  # of a table of steps
# Differ between a run and its control in any case, or say nothing about training.
OWN_KEYS = (
    "output_dir",
    "controls",
    "control",
    "resume_from_checkpoint",
    "metric_logger",
    "replay",
)


@dataclass
class RunFolder:
    """What a run left in its folder, as far as it is there."""

    folder: Path
    metrics: Metrics
    settings: dict = field(default_factory=dict)
    command: str = ""  # with which it was started
    summary: dict = field(default_factory=dict)
    stopped: dict = field(default_factory=dict)
    skipped: list[dict] = field(default_factory=list)
    spikes: list[dict] = field(default_factory=list)
    tokens: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in tables and pictures of ``run/controls.py``; a folder's without a config."""
        control, weighting = (self.settings.get(key) or {} for key in ("control", "weighting"))
        return str(control.get("name") or weighting.get("name") or self.folder.absolute().name)

    @property
    def heldout(self) -> dict[int, list[float]]:
        """Losses of the heads by step, of each validation that was finite."""
        curves = self.metrics.by_head("val_loss")
        rows = [dict(zip(c.steps.tolist(), c.values.tolist(), strict=True)) for c in curves]
        steps = sorted(set(rows[0]).intersection(*rows[1:])) if rows else []
        losses = {step: [row[step] for row in rows] for step in steps}
        return {step: one for step, one in losses.items() if all(x == x for x in one)}


def read_run(folder: str | Path) -> RunFolder:
    """What lies in a run's folder.

    Raises:
        ValueError: if there is no ``metrics.jsonl`` in it.
    """
    folder = Path(folder)
    try:
        metrics = read_metrics(folder / "metrics.jsonl")
    except OSError as error:
        raise ValueError(
            f"{folder} has no metrics.jsonl ({error.strerror}): name the output_dir of a training "
            "run, which has one from its first step"
        ) from error
    text = _text(folder / "config.yaml")
    first = text.partition("\n")[0]
    return RunFolder(
        folder,
        metrics,
        settings=without_secrets(_settings(text)),
        command=first.removeprefix("# ") if first.startswith("# tune run") else "",
        summary=_json(folder / "summary.json"),
        stopped=_json(folder / "exit.json"),
        skipped=_json_lines(folder / "skipped_steps.jsonl"),
        spikes=_json_lines(folder / "loss_spikes.jsonl"),
        tokens=_json(folder / "tokens.json"),
    )


def controls_of(run: RunFolder) -> list[RunFolder]:
    """The runs beside it: those that its config names now and that have begun, in that order."""
    found = []
    for one in run.settings.get("controls") or []:
        for name in [one] if isinstance(one, str) else [*one]:
            folder = run.folder / "controls" / str(name)
            if (folder / "metrics.jsonl").exists():
                found.append(read_run(folder))
    return found


def draw_run(
    folder: str | Path,
    summary: Mapping[str, Any] | None = None,
    tokenizer: "Llama2Tokenizer | None" = None,
    shown: Mapping[str, Any] | None = None,
) -> None:
    """Write a run's page; where that is not possible, only a warning: no run ends for it.

    Args:
        summary: what ``summary.json`` is about to hold.
        shown: the last micro-batch, as ``write_tokens`` takes it with the ``tokenizer``.
    """
    try:
        if shown and tokenizer:
            write_tokens(Path(folder) / "tokens.json", tokenizer, **shown)
        write_run_page(folder, summary)
    except Exception as error:  # whatever a page trips over, the run is worth more
        told = hidden(f"{type(error).__name__}: {error}")
        log.warning("%s could not be drawn: %s", Path(folder) / "run.html", told)


def write_run_page(folder: str | Path, summary: Mapping[str, Any] | None = None) -> Path:
    """Write ``run.html`` into a run's folder and return its path.

    Raises:
        ValueError: if there is no ``metrics.jsonl`` in it.
        OSError: if it cannot be written.
    """
    run = read_run(folder)
    run.summary = dict(summary or run.summary)
    runs = [run, *controls_of(run)]
    sections = (
        _heldout(runs),
        _acceptance(runs),
        _training(runs),
        _weights(runs),
        _optimisation(runs),
        _speed(runs),
        _faults(run),
        page.section("Tokens", tokens_html(run.tokens) if run.tokens else "", name="tokens"),
        _config(runs),
        _commands(run),
    )
    links = "".join(
        f"<a href='#{name}'>{title}</a>"
        for name, title in (
            *(("heldout", "Held-out loss"), ("acceptance", "Tokens per forward")),
            *(("training", "Training loss"), ("weights", "Weights"), ("steps", "Optimisation")),
            *(("speed", "Speed"), ("faults", "Skipped steps"), ("tokens", "Tokens")),
            *(("config", "Config"), ("commands", "Commands")),
        )
        if any(f"<h2 id='{name}'" in section for section in sections)
    )
    body = _head(runs) + f"<nav>{links}</nav>\n" + "".join(sections)
    path = run.folder / "run.html"
    page.write_page(path, f"{run.name}: {run.folder}", body)
    return path


# ------------------------------------------------------------------------------ sections


def _head(runs: Sequence[RunFolder]) -> str:
    run, metrics = runs[0], runs[0].metrics
    step, most = metrics.last_step, run.settings.get("max_steps")
    of = f" of {most:,}" if isinstance(most, int) else ""
    if run.summary:
        state = f"Complete after {run.summary.get('steps', step):,} steps."
    elif run.stopped:
        state = f"Stopped by {run.stopped.get('reason')}, logged to step {step:,}{of}."
    else:
        state = f"Not complete: logged to step {step:,}{of}."
    parts = [f"<h1>{escape(run.name)}</h1>\n", page.paragraph(f"{state} {run.folder}", "caption")]
    if run.folder.absolute().parent.name == "controls":
        parent = "../../run.html"
        parts.append(
            f"<p>This is a control. <a href='{parent}'>The page of its run</a> shows both.</p>\n"
        )
    changes = run.settings.get("control") or {}
    if changes.get("overrides"):
        told = ", ".join(f"{key}={value}" for key, value in changes["overrides"].items())
        parts.append(page.paragraph(f"It changes {told}."))
    if run.skipped or run.spikes:
        parts.append(
            page.paragraph(
                f"Steps that were skipped: {len(run.skipped):,}. Loss spikes: "
                f"{len(run.spikes):,}. They are listed below.",
                "warning",
            )
        )
    if metrics.unreadable:
        told = f"{metrics.unreadable} lines of metrics.jsonl could not be read and are left out."
        parts.append(page.paragraph(told, "warning"))
    longest = max((len(c) for one in runs for c in one.metrics.curves.values()), default=0)
    if longest > MOST_POINTS:
        told = (
            f"Of up to {longest:,} points of a curve at most {MOST_POINTS:,} are drawn: the first "
            "and the last, and the lowest and highest of each stretch."
        )
        parts.append(page.paragraph(told, "note"))
    if not metrics.curves:
        parts.append(page.paragraph("Nothing is logged yet."))
    return "".join(parts)


def _heldout(runs: Sequence[RunFolder]) -> str:
    rows, K = [], len(runs[0].metrics.by_head("val_loss"))
    base = runs[0].heldout.get(0)
    if base:
        rows.append(["before training", "0", *_cells(base), ""])
    own = [losses for step, losses in runs[0].heldout.items() if step > 0][-1:]
    for run in (*runs[1:], runs[0]):
        after = {step: losses for step, losses in run.heldout.items() if step > 0}
        if not after or len(next(iter(after.values()))) != K:
            continue
        step, losses = [*after.items()][-1]
        gap = f"{_mean(own[0]) - _mean(losses):+.4f}" if own and run is not runs[0] else ""
        rows.append([run.name, f"{step:,}", *_cells(losses), gap])
    head = ["", "step", *(f"head {k}" for k in range(K)), "mean", f"{runs[0].name} minus it"]
    if len(runs) == 1:
        head, rows = head[:-1], [row[:-1] for row in rows]
    told = f"Unweighted loss on held-out text, {NATS}, at the last validation."
    reference = (runs[0].summary.get("reference") or {}).get("heldout_loss")
    if reference and len(reference) == K:
        rows.insert(1 if base else 0, ["reference", "", *_cells(reference), *head[K + 3 :]])
        rows[1 if base else 0][K + 3 :] = [""] * len(head[K + 3 :])
    mean = _runs_chart("Mean of heads", runs, "val_loss", unit=NATS, every=True)
    figures = []
    if K > 1:
        figures = [
            _runs_chart(f"Head {k}", runs, f"val_loss_head_{k}", unit=NATS, every=True)
            for k in range(K)
        ]
    seen = page.paragraph(told, "caption") + page.table(head, rows, own=len(rows) - 1)
    top = f"<div class='beside'><div>{seen}</div>{mean}</div>\n" if rows else page.charts(mean)
    return page.section("Held-out loss", top, page.charts(*figures), name="heldout")


def _acceptance(runs: Sequence[RunFolder]) -> str:
    """How fast each run would decode by itself, on held-out text, and where; empty of one head."""
    own = runs[0].metrics
    shares = own.curves_of("acceptance_head_")
    if not shares:
        return ""
    classes = own.curves_of("tokens_per_forward/")
    keys = ["tokens_per_forward", *(f"acceptance_head_{k}" for k in shares)]
    keys += [f"tokens_per_forward/{name}" for name in classes]
    rows = []
    for name, run, at in (
        ("before training", runs[0], 0),
        *((run.name, run, run.metrics.last_step) for run in (*runs[1:], runs[0])),
    ):
        upto = {key: c.values[c.steps <= at][-1:] for key in keys if (c := run.metrics.get(key))}
        cells = [f"{upto[key][0]:.3f}" if len(upto.get(key, ())) else "" for key in keys]
        if any(cells):
            rows.append([name, *cells])
    head = ["", "tokens/forward", *(f"head {k}" for k in shares)]
    head += [name.replace("_", " ") for name in classes]
    told = (
        "What greedy self-speculative decoding would give per forward, at the last validation; of "
        "each head the share of positions at which the guesses of all heads up to it are kept; "
        "tokens per forward by the token that begins the block."
    )
    figures = (
        _runs_chart("Tokens per forward", runs, "tokens_per_forward", every=True, floor=1.0),
        chart(
            f"Kept up to each head, {runs[0].name}",
            [Line(f"head {k}", c, i, every=True) for i, (k, c) in enumerate(shares.items())],
            unit="share of positions",
            floor=0.0,
        ),
        chart(
            f"Tokens per forward by class, {runs[0].name}",
            [Line(name, c, i, every=True) for i, (name, c) in enumerate(classes.items())],
            floor=1.0,
        ),
    )
    return page.section(
        "Tokens per forward",
        page.paragraph(told, "caption"),
        page.table(head, rows, own=len(rows) - 1),
        page.charts(*figures),
        name="acceptance",
    )


def _training(runs: Sequence[RunFolder]) -> str:
    run = runs[0]
    K = len(run.metrics.by_head("loss"))
    marks = [(one["step"], f"step {one['step']}: {_why(one)}") for one in run.skipped + run.spikes]
    means = page.charts(
        _runs_chart("Mean of heads", runs, "loss", unit=NATS, smooth=True, marks=marks),
        _runs_chart("Weighted, as it is trained on", runs, "weighted_loss", unit=NATS, smooth=True),
    )
    figures = []
    if K > 1:
        figures = [
            _runs_chart(f"Head {k}", runs, f"loss_head_{k}", unit=NATS, smooth=True)
            for k in range(K)
        ]
    figures += [
        _runs_chart(f"Head {k} against head 0", runs, f"distill_head_{k}", unit=NATS, smooth=True)
        for k in range(1, K)
    ]
    told = (
        "Loss by head is unweighted, so that runs under other weightings compare. Smoothed; the "
        "raw line is pale."
    )
    if marks:
        told += f" Triangles: skipped steps and spikes of {run.name}."
    drawn = means + page.charts(*figures)
    caption = page.paragraph(told, "caption") if drawn else ""
    return page.section("Training loss", caption, drawn, name="training")


def _weights(runs: Sequence[RunFolder]) -> str:
    run, metrics = runs[0], runs[0].metrics
    share = {"floor": 0.0, "ceiling": 1.0}
    figures = [
        _runs_chart("Effective sample size", runs, "ess", unit="share of tokens", **share),
        _runs_chart(
            "Selected", runs, "selected_share", unit="share of tokens with weight ≥ 1", **share
        ),
        _on_noise(runs),
    ]
    for title, key, unit in (
        ("Effective sample size by head", "weight_ess", "share of tokens"),
        ("Selected by head", "weight_selected", "share with weight ≥ 1"),
        ("At the smallest weight", "weight_at_min", "share of tokens"),
        ("At the largest weight", "weight_at_max", "share of tokens"),
    ):
        figures.append(_heads_chart(title, metrics, key, unit=unit, **share))
    figures.append(_heads_chart("Mean weight", metrics, "weight_mean", floor=0.0))
    split = []
    for k, low in enumerate(metrics.by_head("weight_low")):
        others = [metrics.get(f"weight_{key}_head_{k}") for key in ("selected", "high")]
        shares = [c.values for c in others if c is not None and len(c) == len(low)]
        if len(shares) == 2:
            selected, high = shares
            parts = (low.values, 1 - low.values - selected, selected - high, high)
            named = zip(("below ½", "½ to 1", "1 to 2", "2 and above"), parts, strict=True)
            curves = [(name, Curve(low.steps, part)) for name, part in named]
            split.append(bands(f"Weights of head {k}", curves, unit="share of tokens"))
    drawn = page.charts(*split) + page.charts(*figures)
    told = f"Of {run.name} unless a line says otherwise, in the last micro-batch of a logged step."
    caption = page.paragraph(told, "caption") if drawn else ""
    return page.section("Weights", caption, drawn, name="weights")


def _on_noise(runs: Sequence[RunFolder]) -> str:
    """Weight on marked tokens of each run, and how many of the targets are marked."""
    lines = _lines(runs, "noise_in_weight", smooth=True)
    data = runs[0].metrics.get("noise_in_data")
    if data is not None and len(data.finite):
        lines.append(Line("of the targets", smoothed(data, smoothing(data)), look=6))
    return chart("On marked noise", lines, unit="share of the weight", floor=0.0)


def _optimisation(runs: Sequence[RunFolder]) -> str:
    limit = runs[0].settings.get("clip_grad_norm")
    unit = f"clipped at {number(limit)}" if isinstance(limit, int | float) else ""
    drawn = page.charts(
        _runs_chart("Learning rate", runs, "lr", floor=0.0),
        _runs_chart("Gradient norm before clipping", runs, "grad_norm", unit=unit, smooth=True),
        _runs_chart(
            "The same of heads that train apart",
            runs,
            "grad_norm_extra_heads",
            unit=unit,
            smooth=True,
        ),
        _runs_chart(
            "Clipped", runs, "clipped_share", unit="share of steps", floor=0.0, smooth=True
        ),
    )
    return page.section("Optimisation", drawn, name="steps")


def _speed(runs: Sequence[RunFolder]) -> str:
    drawn = page.charts(
        _runs_chart("Tokens per second", runs, "tokens_per_s", unit="without padding", floor=0.0),
        _runs_chart("Padding", runs, "padding_share", unit="share of positions", floor=0.0),
        _runs_chart("Peak memory", runs, "memory_gib", unit="GiB of rank 0", floor=0.0),
    )
    return page.section("Speed", drawn, name="speed")


def _faults(run: RunFolder) -> str:
    steps = sorted([*run.skipped, *run.spikes], key=lambda one: one["step"])
    if not steps:
        return ""
    rows = [[f"{one['step']:,}", _why(one), _rows_told(one.get("rows"))] for one in steps]
    more = len(rows) - MOST_ROWS
    told = f"The last {MOST_ROWS}; skipped_steps.jsonl and loss_spikes.jsonl have {more:,} more."
    return page.section(
        "Skipped steps and spikes",
        page.paragraph(told, "note") if more > 0 else "",
        page.table(["step", "what happened", "rows of the data"], rows[-MOST_ROWS:], kind="text"),
        name="faults",
    )


def _config(runs: Sequence[RunFolder]) -> str:
    run = runs[0]
    if not run.settings:
        return ""
    parts = []
    if len(runs) > 1:
        flat = [flat_settings(one) for one in runs]
        keys = [key for key in dict.fromkeys(k for f in flat for k in f)]
        rows = [
            [key, *(_shown(f, key) for f in flat)]
            for key in keys
            if any(f.get(key) != flat[0].get(key) for f in flat[1:])
        ]
        told = "Where the run and its controls differ; all else is the same."
        parts += [page.paragraph(told, "caption")]
        parts += [page.table(["", *(one.name for one in runs)], rows, kind="text")]
    text = yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True)
    parts.append(
        f"<details><summary>The whole config</summary><pre>{escape(text)}</pre></details>\n"
    )
    return page.section("Config", *parts, name="config")


def _commands(run: RunFolder) -> str:
    if not run.settings:
        return ""
    parts, folder = [], str(run.folder)
    command = run.command
    if not command:
        recipe = "critic" if "stages" in run.settings else "rho1"
        command = f"tune run {recipe}_wmtp_distributed"
        told = "How it was started is not known: add --nproc_per_node as it was."
        parts.append(page.paragraph(told, "note"))
    config = f"--config {shlex.quote(str(run.folder / 'config.yaml'))}"
    again = shlex.quote(f"output_dir={folder.rstrip('/')}_again")
    if run.summary:
        told = "It is complete. To extend it, raise max_steps:"
        more = "resume_from_checkpoint=true max_steps=N"
    else:
        told, more = "To continue it:", "resume_from_checkpoint=true"
    for text, words in (
        (told, more),
        ("To repeat it in another folder:", f"resume_from_checkpoint=false {again}"),
    ):
        parts.append(page.paragraph(text))
        parts.append(f"<pre>{escape(f'{command} {config} {words}')}</pre>\n")
    if HIDDEN in json.dumps(run.settings, default=str):
        told = f"Give the keys whose values are hidden ({HIDDEN}) on the command line."
        parts.append(page.paragraph(told, "note"))
    return page.section("Commands", *parts, name="commands")


# -------------------------------------------------------------------------------- pieces


def _lines(runs: Sequence[RunFolder], key: str, *, smooth: bool = False, every: bool = False):
    """A line for each run that has the figure; a run has the same look in all charts."""
    lines = []
    for look, run in enumerate(runs):
        curve = run.metrics.get(key)
        if curve is None or not len(curve.finite):
            continue
        if smooth and len(curve.finite) > 20:
            soft = smoothed(curve, smoothing(curve))
            lines.append(Line(run.name, soft, look, pale=curve))
        else:
            lines.append(Line(run.name, curve, look, every=every))
    return lines


def smoothing(curve: Curve) -> float:
    """An average over about a fortieth of the run, ten points at least."""
    return 1 - 1 / max(10, len(curve) / 40)


def _runs_chart(
    title: str,
    runs: Sequence[RunFolder],
    key: str,
    *,
    smooth: bool = False,
    every: bool = False,
    **how,
) -> str:
    return chart(title, _lines(runs, key, smooth=smooth, every=every), **how)


def _heads_chart(title: str, metrics: Metrics, key: str, **how: Any) -> str:
    """A line for each head of one run."""
    lines = [Line(f"head {k}", curve, k) for k, curve in enumerate(metrics.by_head(key))]
    return chart(title, lines, **how)


def _cells(losses: Sequence[float]) -> list[str]:
    return [*(f"{loss:.4f}" for loss in losses), f"{_mean(losses):.4f}"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _why(one: Mapping[str, Any]) -> str:
    """Of a skipped step or a spike."""
    if "reason" in one:
        return f"skipped: {one['reason']}"
    loss, before = (one.get(key) for key in ("loss", "mean_before"))
    told = [number(x) if isinstance(x, int | float) else str(x) for x in (loss, before)]
    return f"loss {told[0]}, before {told[1]}"


def _rows_told(rows: Any) -> str:
    """Rows of all ranks and micro-batches of a step, the first ones."""
    flat = sorted({row for rank in rows or [] for batch in rank for row in batch})
    more = f" and {len(flat) - 12} more" if len(flat) > 12 else ""
    return ", ".join(map(str, flat[:12])) + more


def flat_settings(run: RunFolder) -> dict[str, Any]:
    """Settings by dotted key, without what differs in any case; its own folder has a name."""
    kept = {key: value for key, value in run.settings.items() if key not in OWN_KEYS}
    own = str(run.settings.get("output_dir") or "")

    def placed(value: Any) -> Any:
        return value.replace(own, "${output_dir}") if own and isinstance(value, str) else value

    return {key: placed(value) for key, value in _by_dotted_key(kept).items()}


def _by_dotted_key(block: dict, above: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in block.items():
        is_block = isinstance(value, dict) and value
        flat |= _by_dotted_key(value, f"{above}{key}.") if is_block else {f"{above}{key}": value}
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return str(flat[key]) if key in flat else ""


def _settings(text: str) -> dict:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    """A file's text; empty if it is not there."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> dict:
    try:
        found = json.loads(_text(path) or "{}")
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _json_lines(path: Path) -> list[dict]:
    found = []
    for line in _text(path).splitlines():
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if isinstance(one, dict) and isinstance(one.get("step"), int):
            found.append(one)
    return found


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a training run")
    for folder in parser.parse_args(argv).runs:
        try:
            print(os.fspath(write_run_page(folder)))
        except (ValueError, OSError) as error:
            sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
