"""What weighting and self-distillation do to the heads' losses and to decoding speed, over seeds.

    uv run python benchmarks/heads.py                 # five paired seeds, within 25 minutes
    uv run python benchmarks/heads.py --report        # only writes the page, from kept rows

Data, models, workers and statistics are the ablation's (``ablation.py``): a seed deals the files,
trains the starting model and the reference and orders the rows; all arms of it share these. Rows go
to benchmarks/results/heads.jsonl, the page to docs/results_heads.md; a restart repeats no row whose
definition is still the same.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a worker for each core, workers inherit it

import matplotlib
from ablation import Rows, run_all
from ablation_grid import (
    CLEAN_TEXT,
    CORRUPTED,
    MTP,
    WORK,
    Arm,
    Setting,
    arm_jobs,
    control_arm,
    rho1_arm,
)
from ablation_report import UNIFORM, Difference, Results, code, header_of_machine, paired
from matplotlib.figure import Figure

from wmtp_modules.files import InUseError, alone_in, new_file
from wmtp_modules.run.acceptance import CLASSES

ROWS, PAGE = Path("benchmarks/results/heads.jsonl"), Path("docs/results_heads.md")
DISTILL = {"distill": {"weight": 0.5, "temperature": 1.0}}
ONLY = "heads only"


def arms(*, with_only: bool) -> tuple[Arm, ...]:
    """The arms of a setting; ``heads only`` leaves trunk and head 0 as they are."""
    uniform, shuffled = control_arm(UNIFORM), rho1_arm("shuffled", MTP)
    distilled = replace(uniform, name="distilled", changes=uniform.changes | DISTILL)
    found = [
        uniform,
        rho1_arm("rho1", MTP),
        replace(shuffled, changes=shuffled.changes | {"weighting.name": "shuffled"}),
        distilled,
    ]
    if with_only:
        for arm in (uniform, distilled):
            changes = arm.changes | {"extra_heads": "only"}
            found.append(replace(arm, name=f"{arm.name}, {ONLY}", changes=changes))
    return tuple(found)


PAIRS = (("rho1", "shuffled"), (f"distilled, {ONLY}", f"{UNIFORM}, {ONLY}"))
SETTINGS = (
    replace(
        CLEAN_TEXT,
        name="heads, clean",
        about="The starting model goes on with clean source of other files.",
        arms=arms(with_only=True),
        comparisons=PAIRS,
    ),
    replace(
        CORRUPTED,
        name="heads, corrupted",
        about="The same with 40 % of the lines replaced by random tokens; held-out text is clean.",
        arms=arms(with_only=False),
        comparisons=PAIRS[:1],
    ),
)


def figures(n_heads: int) -> dict[str, tuple[bool, Callable[[dict], float]]]:
    """What is compared: whether less is better, and the figure of a row's measures, by title."""
    losses = {f"loss, head {k}": (True, lambda m, k=k: m["heldout"][k]) for k in range(n_heads)}
    return losses | {
        "tokens/forward": (False, lambda m: m["decoding"]["tokens_per_forward"]),
        "tokens/forward, own text": (False, lambda m: m["decoder"]["tokens_per_forward"]),
    }


class Table:
    """Figures of one setting by arm and seed, and their differences."""

    def __init__(self, setting: Setting, rows: list[dict]) -> None:
        self.setting = setting
        self.results = Results(setting, rows)
        self.arms = [arm.name for arm in self.results.arms]
        self.figures = figures(self.results.n_heads(self.arms[0])) if self.arms else {}

    def by_seed(self, arm: str, figure: str) -> dict[int, float]:
        _, of = self.figures[figure]
        return {seed: of(row["measures"]) for seed, row in self.results.rows[arm].items()}

    def difference(self, a: str, b: str, figure: str) -> Difference | None:
        if a not in self.arms or b not in self.arms:
            return None
        return paired(self.by_seed(a, figure), self.by_seed(b, figure))

    def mean(self, arm: str, of: Callable[[dict], float]) -> float:
        return statistics.fmean(of(row["measures"]) for row in self.results.rows[arm].values())


# ----------------------------------------------------------------------------- the page


def write_page(rows: list[dict]) -> None:
    tables = [table for table in (Table(s, rows) for s in SETTINGS) if table.arms]
    used = [row for t in tables for of in t.results.rows.values() for row in of.values()]
    seeds = {row["seed"] for row in used}
    parts = [
        "# What weighting and distillation do to heads and speed",
        "Written by `uv run python benchmarks/heads.py` from the rows in "
        "[heads.jsonl](../benchmarks/results/heads.jsonl): change nothing here by hand. "
        f"{len(used)} runs over {len(seeds)} seed{'s' * (len(seeds) != 1)}.",
        "**At this size only:** 2 trunk blocks and 4 heads of width 96, a vocabulary of 1,024, "
        "source of Python's library in rows of 64 tokens; 250 steps for the starting model, 500 "
        "for the reference, 150 for each arm. "
        "Nothing of this was measured on a model that anybody serves.",
        "*Tokens/forward* is what each validation says "
        "(`wmtp_modules/run/acceptance.py`): greedy self-speculative decoding if it wrote the "
        "held-out text; *own text* is the decoder itself, from the first 16 tokens of 100 held-out "
        "texts: of a model that repeats itself it says how much it does. *Kept* is the share of "
        "blocks that keep the guesses up to heads 1, 2 and 3; *by class* are tokens/forward of "
        "blocks that begin with the start of a word, the rest of one, layout (indentation, line "
        "ends), and anything else. "
        "`rho1` selects 60 % of the tokens by an MTP reference, `shuffled` as many by the same "
        "scores at other places, `distilled` has head 0's distribution as half of the targets of "
        "heads 1 to 3, `heads only` trains nothing but these heads.",
        "**Read speed beside head 0's loss.** A head 0 that has learned less chooses frequent "
        "tokens, which the other heads guess more easily: tokens/forward can rise while the model "
        "gets worse. Only at an equal head 0 (`heads only`) is more of it a plain gain.",
        f"Differences are to `{UNIFORM}`, paired over seeds, with 95 % intervals of Student's t in "
        "brackets.",
        header_of_machine(used),
        f"![Differences to {UNIFORM}]({PAGE.with_suffix('.svg').name})",
    ]
    for table in tables:
        parts += [f"## {table.setting.title}", table.setting.about, levels(table)]
        parts += [differences(table), *sentences(table)]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    with new_file(PAGE) as unfinished:
        unfinished.write_text("\n\n".join(parts) + "\n")
    draw(tables, PAGE.with_suffix(".svg"))


def _table(lines: list[list[str]]) -> str:
    lines.insert(1, ["---"] + ["---:"] * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def levels(table: Table) -> str:
    """Means over seeds of each arm, and of the starting model."""
    titles = ["kept, held-out text", "by class, held-out text", "kept, own text"]
    lines = [["mean over seeds", *table.figures, *titles]]

    def kept(arm: str, key: str) -> str:
        n = len(next(iter(table.results.rows[arm].values()))["measures"][key]["per_head"])
        shares = [table.mean(arm, lambda m, k=k: m[key]["per_head"][k]) for k in range(n)]
        return " ".join(f"{share:.3f}" for share in shares)

    def by_class(arm: str, key: str) -> str:
        fast = [
            table.mean(arm, lambda m, c=c: m[key]["by_class"][c]["tokens_per_forward"])
            for c in CLASSES
        ]
        return " ".join(f"{one:.2f}" for one in fast)

    first = table.arms[0]
    losses = len(next(iter(table.results.rows[first].values()))["measures"]["base"])
    base = [table.mean(first, lambda m, k=k: m["base"][k]) for k in range(losses)]
    base.append(table.mean(first, lambda m: m["base_decoding"]["tokens_per_forward"]))
    cells = [f"{value:.3f}" for value in base]
    words = [kept(first, "base_decoding"), by_class(first, "base_decoding")]
    lines.append(["before training", *cells, "", *words, ""])
    for arm in table.arms:
        means = [statistics.fmean(table.by_seed(arm, name).values()) for name in table.figures]
        cells = [f"{value:.3f}" for value in means]
        words = [kept(arm, "decoding"), by_class(arm, "decoding"), kept(arm, "decoder")]
        lines.append([arm, *cells, *words])
    return _table(lines)


def differences(table: Table) -> str:
    lines = [[f"minus {UNIFORM}", *table.figures]]
    for arm in table.arms:
        found = [table.difference(arm, UNIFORM, name) for name in table.figures]
        if arm != UNIFORM:
            lines.append([arm, *(str(one) if one else "-" for one in found)])
    return _table(lines)


def sentences(table: Table) -> list[str]:
    """What the differences say of each arm, wins and losses alike, and the other pairs."""
    pairs = [(arm, UNIFORM) for arm in table.arms if arm != UNIFORM]
    lines = []
    for a, b in (*pairs, *table.setting.comparisons):
        told: dict[str, list[str]] = {}
        for name, (is_less_better, _) in table.figures.items():
            one = table.difference(a, b, name)
            if one is None:
                continue
            outcome = one.verdict
            if outcome in ("lower", "higher"):
                outcome = "better" if (outcome == "lower") == is_less_better else "worse"
            told.setdefault(outcome, []).append(f"{name} ({one.mean:+.4f})")
        if told:
            said = "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in told.items())
            lines.append(f"- {code(a)} against {code(b)}: {said}.")
    return ["\n".join(lines)] if lines else []


def draw(tables: list[Table], path: Path) -> None:
    """Differences to uniform: losses of the heads on the left, tokens per forward on the right."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "heads", "font.size": 9}
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    with matplotlib.rc_context(settings):
        height = 0.8 + sum(0.6 + 0.42 * len(table.arms) for table in tables)
        figure = Figure(figsize=(9.5, height), layout="constrained")
        grid = figure.subplots(
            len(tables), 2, squeeze=False, height_ratios=[len(table.arms) for table in tables]
        )
        for (left, right), table in zip(grid, tables, strict=True):
            names = [arm for arm in table.arms if arm != UNIFORM]
            losses = [name for name, (is_less, _) in table.figures.items() if is_less]
            speeds = [name for name in table.figures if name not in losses]
            for axes, shown in ((left, losses), (right, speeds)):
                for i, name in enumerate(shown):
                    for y, arm in enumerate(reversed(names)):
                        found = table.difference(arm, UNIFORM, name)
                        at = y + 0.16 * ((len(shown) - 1) / 2 - i)
                        if found is None:
                            continue
                        if found.low is not None:
                            axes.plot([found.low, found.high], [at, at], color=colours[i])
                        label = name if y == 0 else None
                        axes.plot(found.mean, at, "o", color=colours[i], ms=4, label=label)
                axes.set_yticks(range(len(names)), reversed(names))
                axes.axvline(0, color="black", linewidth=0.8)
                axes.spines[["top", "right"]].set_visible(False)
                if names:
                    axes.legend(fontsize="x-small", frameon=False)
            left.set_title(f"{table.setting.title}: held-out loss")
            right.set_title("tokens per forward")
            left.set_xlabel(f"minus {UNIFORM} (nats per token; left is better)")
            right.set_xlabel(f"minus {UNIFORM} (right is better)")
        with new_file(path) as unfinished:
            figure.savefig(unfinished, format="svg", metadata={"Date": None})


# ------------------------------------------------------------------------- command line


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="0 to this number - 1 (5)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one core each (2)")
    parser.add_argument("--report", action="store_true", help="train nothing, write the page")
    args = parser.parse_args()
    if args.seeds < 1 or args.workers < 1:
        parser.error("--seeds and --workers must be at least 1")
    jobs, failed = arm_jobs(args.seeds, full=True, settings=SETTINGS), []
    if not args.report:
        try:
            with alone_in(WORK, wait=False):
                failed = run_all(jobs, args.workers, ROWS)
        except InUseError as error:
            sys.exit(str(error))
    rows = [row for row in Rows(ROWS) if row["seed"] < args.seeds]
    if not rows:
        sys.exit("\n".join([f"{ROWS} has no rows: there is nothing to report", *failed]))
    write_page(rows)
    print(f"{PAGE} is written from {ROWS}")
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
