"""docs/results.md from the rows that ablation.py keeps: tables, pictures, and what they say.

Every difference is paired: arm minus control of the same seed, whose data, order and start are
equal. Intervals are of Student's t over seeds, 95 %. Losses are in nats per token.
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from ablation_grid import Arm, Family, Setting, arm_job, model_job
from matplotlib.figure import Figure
from scipy.special import stdtrit

from wmtp_modules.files import new_file

UNIFORM = "uniform"
COMMAND = "uv run python benchmarks/ablation.py"


class Difference(NamedTuple):
    """Mean of paired differences with its interval; None of fewer than two seeds."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def verdict(self) -> str:
        """``lower``, ``higher``, or that the seeds do not tell."""
        if self.low is None or self.high is None:
            return "one seed, no interval"
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "not told apart"

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:+.4f}"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired(a: dict[int, float], b: dict[int, float]) -> Difference | None:
    """``a - b`` over the seeds that both have; None if there are none."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    differences = [a[seed] - b[seed] for seed in seeds]
    mean, n = statistics.fmean(differences), len(seeds)
    if n < 2:
        return Difference(mean, None, None, n)
    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(differences) / n**0.5
    return Difference(mean, mean - half, mean + half, n)


class Results:
    """The rows of one setting that its definitions of today still describe, by arm and seed."""

    def __init__(self, setting: Setting, rows: Iterable[dict]) -> None:
        self.setting = setting
        arms = {arm.name: arm for arm in setting.arms}
        self.rows: dict[str, dict[int, dict]] = {name: {} for name in arms}
        self.n_stale = 0
        for row in rows:
            if row["setting"] != setting.name:
                continue
            arm = arms.get(row["arm"])
            if arm and row["definition"] == arm_job(setting, arm, row["seed"]).definition():
                self.rows[row["arm"]][row["seed"]] = row
            else:
                self.n_stale += 1
        self.arms = [arm for arm in setting.arms if self.rows[arm.name]]

    def losses(self, arm: str, head: int | None = None) -> dict[int, float]:
        """Held-out loss by seed: of one head, or the mean of all."""
        found = {}
        for seed, row in self.rows[self.resolve(arm)].items():
            heads = row["measures"]["heldout"]
            found[seed] = statistics.fmean(heads) if head is None else heads[head]
        return found

    def n_heads(self, arm: str) -> int:
        return len(next(iter(self.rows[self.resolve(arm)].values()))["measures"]["heldout"])

    def difference(self, a: str, b: str, head: int | None = None) -> Difference | None:
        """Held-out loss of arm a minus arm b; None where there is no such thing to compare."""
        if not self.is_there(a) or not self.is_there(b):
            return None
        if head is None and self.n_heads(a) != self.n_heads(b):
            return None
        if head is not None and head >= min(self.n_heads(a), self.n_heads(b)):
            return None
        return paired(self.losses(a, head), self.losses(b, head))

    def is_there(self, arm: str) -> bool:
        return bool(self.tries(arm)) or bool(self.rows.get(arm))

    def tries(self, group: str) -> list[Arm]:
        """Arms of a group of which comparisons take the best."""
        return [arm for arm in self.arms if arm.best_of == group]

    def resolve(self, arm: str) -> str:
        """The arm itself; of a group the one with the lowest held-out loss over its seeds."""
        tries = self.tries(arm)
        if not tries:
            return arm
        most = max(len(self.rows[one.name]) for one in tries)
        whole = [one.name for one in tries if len(self.rows[one.name]) == most]
        return min(whole, key=lambda name: statistics.fmean(self.losses(name).values()))

    def mean(self, arm: str, measure: str) -> float | None:
        values = [row["measures"].get(measure) for row in self.rows[self.resolve(arm)].values()]
        return None if None in values else statistics.fmean(values)


# --------------------------------------------------------------------------- the page


def write_page(rows: list[dict], page: Path, settings: Sequence[Setting]) -> None:
    """The page and its pictures, ``results_<setting>.svg`` beside it."""
    results = [Results(setting, rows) for setting in settings]
    shown = [result for result in results if result.arms]
    used = [row for one in shown for by_seed in one.rows.values() for row in by_seed.values()]
    page.parent.mkdir(parents=True, exist_ok=True)
    parts = [header(used, sum(one.n_stale for one in results))]
    for result in shown:
        picture = page.with_name(f"results_{result.setting.name}.svg")
        draw(result, picture)
        parts.append(section(result, picture.name))
    families = {one.setting.family.name: one.setting.family for one in shown}
    parts += [models_section(family, rows) for family in families.values()]
    with new_file(page) as unfinished:
        unfinished.write_text("\n\n".join(part.strip() for part in parts if part) + "\n")


def header(rows: list[dict], n_stale: int) -> str:
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "# What each weighting is worth",
        f"Written by `{COMMAND}` (`--all` for the full grid) from the rows in "
        "[ablation.jsonl](../benchmarks/results/ablation.jsonl), one for each run: change nothing "
        "here by hand. "
        f"{len(rows)} runs over {len(seeds)} seed{'s' * (len(seeds) != 1)}.",
        "A seed deals the files to their parts, orders the rows and initialises the models; all "
        "arms of a seed share these, and all steps are equal unless an arm's name says otherwise. "
        "Losses are nats per token on held-out clean text. Differences are paired over seeds, with "
        "95 % intervals of Student's t in brackets; below 0 is better. *Acceptance* is the share "
        "of held-out positions at which heads 1 to 3 choose what head 0 chooses later, mean of the "
        "three; a *spike* is a training loss 6 deviations above the last ones. *Weight on marked* "
        "is the share of the weight that lies on tokens known to be spoiled, beside their share of "
        "the data: it is no measure of success by itself.",
    ]
    lines.append(header_of_machine(rows))
    if n_stale:
        lines.append(f"{n_stale} rows of other definitions than today's are left out.")
    return "\n\n".join(lines)


def header_of_machine(rows: list[dict]) -> str:
    lines = []
    for name in ("hardware", "torch", "python", "commit"):
        found = sorted({row["versions"][name] for row in rows})
        lines.append(f"{name.capitalize()}: {'; '.join(found) or 'none'}")
    return "  \n".join(lines)


def section(result: Results, picture: str) -> str:
    setting = result.setting
    parts = [f"## {setting.title}", setting.about, table(result)]
    parts += [f"![{setting.title}: differences to uniform]({picture})", *sentences(result)]
    return "\n\n".join(parts)


def table(result: Results) -> str:
    K = max(result.n_heads(arm.name) for arm in result.arms)
    seeds = max(len(result.rows[arm.name]) for arm in result.arms)
    titles = ["arm", "held-out loss", f"minus {UNIFORM}", *(f"head {k}" for k in range(K))]
    titles += ["weight on marked", "acceptance", "spikes", "steps", "processor s"]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    for arm in result.arms:
        name, n = arm.name, len(result.rows[arm.name])
        loss = statistics.fmean(result.losses(name).values())
        cells = [name if n == seeds else f"{name} ({n} of {seeds} seeds)", f"{loss:.4f}"]
        if name == UNIFORM:
            cells += ["-"] * (K + 1)
        else:
            whole = result.difference(name, UNIFORM)
            cells.append(str(whole) if whole else "-")
            for k in range(K):
                one = result.difference(name, UNIFORM, k)
                cells.append(f"{one.mean:+.4f}" if one else "-")
        marked, share = (result.mean(name, f"noise_in_{x}") for x in ("weight", "data"))
        cells.append("-" if marked is None or not share else f"{marked:.3f} of {share:.3f}")
        rows = list(result.rows[name].values())
        agree = [x for row in rows for x in row["measures"]["acceptance"]]
        cells.append(f"{statistics.fmean(agree):.3f}" if agree else "-")
        cells.append(str(sum(row["measures"]["spikes"] for row in rows)))
        cells.append(str(rows[0]["measures"]["steps"]))
        cells.append(f"{statistics.fmean(row['processor_seconds'] for row in rows):.0f}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def sentences(result: Results) -> list[str]:
    """What the differences say: wins and losses alike."""
    by_verdict: dict[str, list[str]] = {}
    for arm in result.arms:
        found = result.difference(arm.name, UNIFORM)
        if found and arm.name != UNIFORM:
            by_verdict.setdefault(found.verdict, []).append(f"{code(arm.name)} ({found})")
    told = []
    for verdict, start in (
        ("lower", f"Better than {code(UNIFORM)}"),
        ("higher", f"Worse than {code(UNIFORM)}"),
        ("not told apart", f"Not told apart from {code(UNIFORM)} by these seeds"),
        ("one seed, no interval", f"Against {code(UNIFORM)}, of one seed and so without interval"),
    ):
        if verdict in by_verdict:
            told.append(f"{start}: {', '.join(by_verdict[verdict])}.")
    lines = []
    for a, b in result.setting.comparisons:
        found = result.difference(a, b)
        if found is None:
            continue
        outcome = {"lower": "better", "higher": "worse"}.get(found.verdict, found.verdict)
        lines.append(f"- {named(result, a)} against {named(result, b)}: {found}, {outcome}.")
    if lines:
        told.append("Claims, each as held-out loss of the first minus that of the second:")
        told.append("\n".join(lines))
    for group in dict.fromkeys(arm.best_of for arm in result.arms if arm.best_of):
        tries = result.tries(group)
        told.append(
            f"{code(group)} is the best of {len(tries)} arms that were tried "
            f"({', '.join(code(arm.name) for arm in tries)}), chosen by this very held-out loss, "
            f"which favours it: {code(result.resolve(group))}."
        )
    return told


def code(name: str) -> str:
    return f"`{name}`"


def named(result: Results, arm: str) -> str:
    found = result.resolve(arm)
    return code(arm) if found == arm else f"{code(arm)} (here {code(found)})"


# ------------------------------------------------------------------ models that arms share


def models_section(family: Family, rows: list[dict]) -> str:
    """Cost and quality of the models that the arms of a family share."""
    found: dict[str, list[dict]] = {}
    for name in family.models:
        for row in rows:
            if (row["setting"], row["arm"]) != (family.name, name):
                continue
            if row["definition"] == model_job(family, name, row["seed"]).definition():
                found.setdefault(name, []).append(row)
    if not found:
        return ""
    lines = [
        f"## {family.title}",
        "One of each per seed.",
        "| model | steps | held-out loss per head | processor s |\n|---|---:|---|---:|",
    ]
    reports = []
    for name, some in found.items():
        seconds = statistics.fmean(row["processor_seconds"] for row in some)
        measures = [row["measures"] for row in some]
        if "heldout" in measures[0]:
            heads = zip(*(one["heldout"] for one in measures), strict=True)
            losses = " ".join(f"{statistics.fmean(head):.3f}" for head in heads)
            steps = measures[0]["steps"]
        else:
            steps, losses = "-", "-"
            if "critic" in family.models[name].changes.get("stages", ["critic"]):
                reports.append(critic_table(name, measures))
        lines[-1] += f"\n| {name} | {steps} | {losses} | {seconds:.0f} |"
    return "\n\n".join(lines + beside_base(found) + reports)


def beside_base(found: dict[str, list[dict]]) -> list[str]:
    """References with the heads of the base, head by head: one that is not lower misleads."""
    lines = []
    by_name = {
        name: {row["seed"]: row["measures"]["heldout"] for row in rows}
        for name, rows in found.items()
        if "heldout" in rows[0]["measures"]
    }
    base = by_name.pop("base", {})
    for name, by_seed in by_name.items():
        common = base.keys() & by_seed.keys()
        K = min((len(heads[seed]) for heads in (base, by_seed) for seed in common), default=0)
        differences = [
            paired(*({s: heads[s][k] for s in common} for heads in (by_seed, base)))
            for k in range(K)
        ]
        if K > 1:
            told = ", ".join(f"{one.mean:+.3f}" for one in differences if one)
            lines.append(f"{name} minus base, head by head: {told}.")
    return lines


def critic_table(name: str, measures: list[dict]) -> str:
    """Every figure of a critic's report: mean over seeds, smallest and largest."""
    reports = [flat(one) for one in measures]
    lines = [f"{name}, on held-out responses:", "| figure | mean | over seeds |\n|---|---:|---|"]
    for key in reports[0]:
        values = [report[key] for report in reports if isinstance(report.get(key), int | float)]
        if values:
            spread = f"{min(values):.3f} to {max(values):.3f}"
            lines[-1] += f"\n| {key} | {statistics.fmean(values):.3f} | {spread} |"
    return "\n\n".join(lines)


def flat(report: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in report.items():
        key = f"{prefix}{key}"
        found |= flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return found


# -------------------------------------------------------------------------- the picture


def draw(result: Results, path: Path) -> None:
    """Differences to uniform as dots with their intervals, as an SVG that is equal if they are."""
    dots = []
    for arm in result.arms:
        found = result.difference(arm.name, UNIFORM)
        if found and arm.name != UNIFORM:
            dots.append((arm.name, found))
    settings = {"svg.fonttype": "none", "svg.hashsalt": result.setting.name, "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7, 0.9 + 0.28 * len(dots)), layout="constrained")
        axes = figure.add_subplot()
        for y, (_, found) in enumerate(reversed(dots)):
            colour = {"lower": "#1b7837", "higher": "#b2182b"}.get(found.verdict, "#666666")
            if found.low is not None:
                axes.plot([found.low, found.high], [y, y], color=colour, linewidth=1.5)
            axes.plot(found.mean, y, "o", color=colour, markersize=5)
        axes.set_yticks(range(len(dots)), [name for name, _ in reversed(dots)])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("held-out loss minus uniform (nats per token; left is better)")
        axes.set_title(result.setting.title)
        axes.spines[["top", "right"]].set_visible(False)
        with new_file(path) as unfinished:
            figure.savefig(unfinished, format="svg", metadata={"Date": None})
