"""Comparisons of made runs; intervals against scipy's."""

import json
import math
import re

import numpy as np
import pytest
import yaml
from scipy import stats

from wmtp_modules.reports import compare
from wmtp_modules.reports.compare import arms_of, baseline_of, mean_curve, paired
from wmtp_modules.reports.metrics import Curve

LOSSES = {"rho1": (3.0, 3.25, 3.125), "uniform": (3.5, 3.5, 3.75)}  # of seeds 1 to 3


def write_run(folder, name, seed, loss, *, step=10, settings=None, base=4.0):
    """A run of two heads, validated before training and at ``step``; None is no validation."""
    folder.mkdir(parents=True)
    lines = [{"step": 0, "val_loss": base}, {"step": 1, "loss": loss, "ess": 0.5}]
    lines += [{"step": step, "val_loss": loss}] if loss is not None else []
    for line in lines:
        if "val_loss" in line:
            line |= {
                f"val_loss_head_{k}": line["val_loss"] + gap for k, gap in enumerate((-0.5, 0.5))
            }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {"output_dir": str(folder), "seed": seed, "weighting": {"name": name}, "max_steps": 10}
    own |= {"dataset": {"source": f"data/{folder.name}/7B_1T.jsonl"}, "controls": ["uniform"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(own | (settings or {})))
    return folder


@pytest.fixture
def seeds(tmp_path):
    """Folders ``s_1`` to ``s_3`` of rho1, each with its control and data of the seed."""
    for seed, (own, control) in enumerate(zip(*LOSSES.values(), strict=True), start=1):
        run = write_run(tmp_path / f"s_{seed}", "rho1", seed, own)
        source = {"dataset": {"source": f"data/s_{seed}/7B_1T.jsonl"}}
        write_run(run / "controls" / "uniform", "uniform", seed, control, settings=source)
    return [tmp_path / f"s_{seed}" for seed in (1, 2, 3)]


def rows_of(table):
    return {row[0]: row[1:] for row in (re.split(r" {2,}", line) for line in table.splitlines())}


def test_seeds_are_averaged_with_their_intervals(seeds, tmp_path):
    rows = rows_of(compare.compare(seeds, tmp_path / "c.html"))
    for name, losses in LOSSES.items():
        mean, (low, high) = (
            np.mean(losses),
            stats.t.interval(0.95, 2, loc=np.mean(losses), scale=stats.sem(losses)),
        )
        heads = [f"{mean - 0.5:.4f}", f"{mean + 0.5:.4f}"]
        assert rows[name][:5] == ["3", "10", *heads, f"{mean:.4f} ± {(high - low) / 2:.4f}"]
    difference = np.subtract(*LOSSES.values())
    test = stats.ttest_rel(*LOSSES.values()).confidence_interval(0.95)
    half = (test.high - test.low) / 2
    assert rows["rho1"][5:] == [f"{difference.mean():+.4f} ± {half:.4f}", "3"]
    assert list(rows) == ["Held-out loss (95 % intervals over seeds)", "arm", "rho1", "uniform"]


def test_tokens_per_forward_are_averaged_and_paired(seeds, tmp_path):
    fast = {"": (1.5, 1.75, 1.5), "controls/uniform": (1.25, 1.25, 1.5)}
    for where, values in fast.items():
        for folder, value in zip(seeds, values, strict=True):
            with (folder / where / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 10, "tokens_per_forward": value}) + "\n")
    rows = rows_of(compare.compare(seeds, tmp_path / "c.html"))
    gap = np.subtract(*fast.values())
    low, high = stats.t.interval(0.95, 2, loc=gap.mean(), scale=stats.sem(gap))
    assert rows["arm"][-2:] == ["tokens/forward", "minus uniform"]
    assert rows["rho1"][-1] == f"{gap.mean():+.4f} ± {(high - low) / 2:.4f}"
    assert rows["rho1"][-2].startswith("1.5833 ± ")
    assert "Tokens per forward" in (tmp_path / "c.html").read_text()


def test_only_seeds_of_both_are_paired(seeds):
    for arms in (arms_of(seeds), arms_of([seeds[0], seeds[1], seeds[2] / "controls" / "uniform"])):
        assert [arm.name for arm in arms] == ["rho1", "uniform"]
    gap = paired(*arms)  # seeds 1 and 2
    values = np.subtract(LOSSES["rho1"][:2], LOSSES["uniform"][:2])
    assert gap.n == 2
    assert gap.mean == pytest.approx(values.mean())
    assert gap.half == pytest.approx(stats.t.ppf(0.975, 1) * stats.sem(values))
    one = paired(*arms_of(seeds[:1]))
    assert (one.mean, one.half, one.n) == (-0.5, None, 1)
    assert paired(*arms_of([seeds[0] / "controls" / "uniform", seeds[0]])).mean == 0.5


def test_one_seed_has_no_interval_and_says_so(seeds, tmp_path):
    told = compare.compare(seeds[:1], tmp_path / "c.html")
    assert rows_of(told)["rho1"] == ["1", "10", "2.5000", "3.5000", "3.0000", "-0.5000", "1"]
    assert "One seed of each arm: no intervals" in told


def test_a_seed_that_has_not_come_so_far_is_left_out(seeds, tmp_path):
    late = write_run(tmp_path / "s_4", "rho1", 4, 9.0, step=5)
    told = compare.compare([*seeds, late], tmp_path / "c.html")
    assert rows_of(told)["rho1"][:2] == ["3", "10"]
    assert "rho1, seed 4: has come to step 5, so it is not in the figures." in told


def test_runs_that_differ_in_more_are_other_arms(seeds, tmp_path):
    settings = {"max_steps": 20, "dataset": {"source": "data/s_1/7B_1T.jsonl"}}
    other = write_run(tmp_path / "s_5", "rho1", 1, 2.0, settings=settings, step=20)
    again = write_run(tmp_path / "s_6", "rho1", 1, 2.5, settings=settings, step=20)
    arms = arms_of([*seeds, other, again, other])
    assert [arm.name for arm in arms] == [
        *("rho1 (max_steps=10)", "uniform"),
        *(f"rho1 (max_steps=20) in {run}" for run in (other, again)),
    ]
    assert [len(arm.runs) for arm in arms] == [3, 3, 1, 1]  # a seed once in an arm, a run once
    told = compare.compare([*seeds, other], tmp_path / "c.html")
    assert "The arms were validated last at different steps." in told


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("data/s_1/x", "data/s_2/x", True),
        ("7B_1T_4/seed_1", "7B_1T_4/seed_2", True),
        ("data/1", "data/3", False),
        ("clean", "noisy", False),
        ("s_1", "s_1_1", False),
        (1, 2, False),
        (None, None, True),
    ],
)
def test_texts_that_carry_the_seed_are_the_same(a, b, same):
    assert compare._same(a, b, ("1", "2")) is same


def test_a_baseline_by_name(seeds):
    arms = arms_of(seeds)
    assert baseline_of(arms).name == "uniform"
    assert baseline_of(arms, "rho1").name == "rho1"
    assert baseline_of(arms[:1]).name == "rho1"
    with pytest.raises(ValueError, match="--baseline dft: the arms are rho1, uniform"):
        baseline_of(arms, "dft")


def test_other_starts_are_told(tmp_path):
    runs = [write_run(tmp_path / n, n, 1, 3.0, base=b) for n, b in (("rho1", 4.0), ("dft", 4.5))]
    told = compare.compare(runs, tmp_path / "c.html")
    assert "different losses before training" in told
    assert "different losses" not in compare.compare(runs[:1], tmp_path / "c.html")


def test_runs_without_figures_or_config(tmp_path):
    run = write_run(tmp_path / "run", "rho1", 1, None)
    (run / "metrics.jsonl").write_text("")
    (run / "config.yaml").unlink()
    told = compare.compare([run], tmp_path / "new" / "c.html")
    assert rows_of(told)["run"] == ["0"]
    assert "run has no validation yet." in told
    with pytest.raises(ValueError, match=r"has no metrics.jsonl .*: name the output_dir"):
        compare.compare([tmp_path / "none"], tmp_path / "c.html")


def test_the_mean_over_seeds_has_the_steps_of_all():
    steps = np.array([1, 2, 3, 4])
    values = np.array([[1.0, 2.0, np.nan, 4.0], [3.0, 2.0, 1.0, 8.0], [2.0, 5.0, 1.0, 0.0]])
    curves = [Curve(steps, one) for one in values]
    mean, half = mean_curve([*curves[:2], Curve(steps[:3], values[2, :3])])
    assert mean.steps.tolist() == [1, 2, 3]
    np.testing.assert_allclose(mean.values, [2.0, 3.0, np.nan])
    expected = stats.t.ppf(0.975, 2) * stats.sem(values[:, :2])
    np.testing.assert_allclose(half, [*expected, np.nan])
    alone, none = mean_curve(curves[:1])
    np.testing.assert_array_equal(alone.values, values[0])
    assert none is None
    long = Curve(np.arange(10_000), np.arange(10_000.0))
    mean, _ = mean_curve([long, long])
    assert (len(mean), mean.steps[0], mean.steps[-1]) == (2000, 0, 9999)


def test_the_command_prints_the_table_and_writes_the_page(seeds, tmp_path, capsys):
    page = tmp_path / "c.html"
    compare.main([*map(str, seeds), "--output", str(page)])
    printed = capsys.readouterr().out
    assert rows_of(printed)["arm"][-2:] == ["minus uniform", "pairs"]
    html = page.read_text()
    assert "class='interval'" in html
    mean = np.mean(LOSSES["rho1"])
    half = stats.t.ppf(0.975, 2) * stats.sem(LOSSES["rho1"])
    assert f"<title>rho1, step 10: {mean:.4g} ± {half:.4g}</title>" in html
    assert math.isclose(mean, 3.125)
    assert all(f"<td>{seed}</td>" in html for seed in seeds)
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script", html)
    with pytest.raises(SystemExit, match="ValueError: --baseline x"):
        compare.main([str(seeds[0]), "--output", str(page), "--baseline", "x"])
