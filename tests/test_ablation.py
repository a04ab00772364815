"""The ablation's statistics, its rows and its page, on made-up rows: nothing is trained."""

import importlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def modules():
    """(grid, report, ablation), imported as the command imports them: from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setenv("OMP_NUM_THREADS", "1")
        names = ("ablation_grid", "ablation_report", "ablation")
        yield tuple(importlib.import_module(name) for name in names)
        for name in (*names, "common"):
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def row_of(job, heldout, **measures):
    """A finished run's row, as a worker gives it."""
    made_up = {"steps": 9, "base": [5.0, 5.0], "heldout": heldout, "acceptance": [0.25]}
    made_up |= {"spikes": 0, "skipped": 0}
    return {
        "setting": job.setting,
        "arm": job.arm,
        "seed": job.seed,
        "definition": job.definition(),
        "overrides": job.changes,
        "measures": made_up | measures,
        "seconds": 2.0,
        "processor_seconds": 1.0,
        "versions": {
            "python": sys.version.split()[0],
            "torch": "0",
            "commit": "c0ffee",
            "hardware": "made up",
        },
    }


# --------------------------------------------------------------------------- statistics


def test_the_interval_is_students_over_paired_differences(modules):
    _, report, _ = modules
    # Differences 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.302653.
    found = report.paired({0: 11.0, 1: 22.0, 2: 33.0, 7: 0.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert found.n == 3
    assert found.mean == pytest.approx(2.0)
    assert found.low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert found.high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5)
    assert found.verdict == "not told apart"


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-1.0, -1.1, -0.9], "lower"),
        ([1.0, 1.1, 0.9], "higher"),
        ([-1.0, 1.0, 0.5], "not told apart"),
        ([-1.0], "one seed, no interval"),
    ],
)
def test_a_verdict_needs_an_interval_without_0(modules, differences, verdict):
    _, report, _ = modules
    found = report.paired(dict(enumerate(differences)), dict.fromkeys(range(9), 0.0))
    assert found.verdict == verdict


def test_without_a_common_seed_there_is_no_difference(modules):
    _, report, _ = modules
    assert report.paired({0: 1.0}, {1: 1.0}) is None


# ----------------------------------------------------------------------- what is repeated


@pytest.fixture
def small(modules):
    """Two arms of the first setting, of which one weighs by a model."""
    grid, _, _ = modules
    arms = [arm for arm in grid.CORRUPTED.arms if arm.name in ("uniform", f"topk, {grid.MTP}")]
    return replace(grid.CORRUPTED, arms=tuple(arms))


@pytest.fixture
def run_all(modules, tmp_path, monkeypatch):
    """run_all(settings, seeds) -> names of what was run; files of models are made up."""
    grid, _, ablation = modules
    monkeypatch.setattr(ablation, "_made", lambda job: made.get(job.key))
    made, failing = {}, set()

    def go(*settings, seeds=1):
        done = []

        def run(job):
            done.append(f"{job.arm} {job.seed}")
            if job.arm in failing:
                raise RuntimeError("a reason")
            if job.is_model:
                made[job.key] = job.definition()
            return row_of(job, [4.0, 4.0])

        rows = ablation.Rows(tmp_path / "rows.jsonl")
        jobs = ablation.unfinished(grid.arm_jobs(seeds, full=True, settings=settings), rows)
        with ThreadPoolExecutor(1) as pool:
            go.failed = ablation.run_jobs(jobs, rows, pool, 2, run)
        return done

    go.made, go.failing, go.file = made, failing, tmp_path / "rows.jsonl"
    return go


def test_a_restart_repeats_no_finished_run(modules, small, run_all):
    grid, _, _ = modules
    assert run_all(small) == ["base 0", f"{grid.MTP} 0", "uniform 0", f"topk, {grid.MTP} 0"]
    assert run_all(small) == []
    assert run_all(small, seeds=2) == [
        *("base 1", f"{grid.MTP} 1", "uniform 1", f"topk, {grid.MTP} 1")
    ]
    assert len(run_all.file.read_text().splitlines()) == 8


def test_of_a_killed_run_what_had_ended_is_kept(modules, small, run_all):
    grid, _, _ = modules
    run_all.failing.add(f"topk, {grid.MTP}")
    run_all(small)
    assert run_all.failed == [f"corrupted/topk, {grid.MTP}, seed 0: a reason"]
    run_all.failing.clear()
    assert run_all(small) == [f"topk, {grid.MTP} 0"]


def test_what_needs_a_failed_model_is_named_and_not_run(modules, small, run_all):
    grid, _, _ = modules
    run_all.failing.add(grid.MTP)
    assert run_all(small) == ["base 0", f"{grid.MTP} 0", "uniform 0"]
    assert len(run_all.failed) == 2
    assert "what it needs failed" in run_all.failed[1]


def test_a_changed_definition_is_run_again_and_replaces_its_row(modules, small, run_all):
    grid, _, _ = modules
    run_all(small)
    uniform, topk = small.arms
    changed = replace(topk, changes=topk.changes | {"weighting.ratio": 0.5})
    assert run_all(replace(small, arms=(uniform, changed))) == [f"topk, {grid.MTP} 0"]
    assert len(run_all.file.read_text().splitlines()) == 4


@pytest.mark.parametrize("what", ["steps", "shipped config", "model", "python"])
def test_every_kind_of_change_counts(modules, small, run_all, monkeypatch, tmp_path, what):
    grid, _, ablation = modules
    run_all(small)
    setting, again = small, ["uniform 0", f"topk, {grid.MTP} 0"]
    if what == "steps":
        setting = replace(small, changes=small.changes | {"max_steps": 3})
    elif what == "shipped config":
        for path in (ROOT / "configs" / "quickstart").glob("*.yaml"):
            cfg = OmegaConf.load(path)
            if path.stem == "rho1":
                cfg.optimizer.lr = 0.5
            OmegaConf.save(cfg, tmp_path / path.name)
        monkeypatch.setattr(grid, "CONFIGS", tmp_path)
    elif what == "model":  # what was trained with the old one must not stand beside the new one
        models = dict(small.family.models)
        models[grid.MTP] = replace(
            models[grid.MTP], changes=models[grid.MTP].changes | {"max_steps": 7}
        )
        setting = replace(small, family=replace(small.family, models=models))
        again = [f"{grid.MTP} 0", f"topk, {grid.MTP} 0"]
    else:
        monkeypatch.setattr(ablation, "python_version", lambda: "3.12.0")
        again = ["base 0", f"{grid.MTP} 0", "uniform 0", f"topk, {grid.MTP} 0"]
    assert run_all(setting) == again


def test_a_model_whose_files_are_elsewhere_is_made_for_who_needs_it(small, run_all):
    """The rows may come with a clone, the files do not."""
    run_all(small)
    run_all.made.clear()
    assert run_all(small) == []
    lines = [x for x in run_all.file.read_text().splitlines() if '"uniform"' not in x[:60]]
    run_all.file.write_text("\n".join(lines) + "\n")
    assert run_all(small) == ["base 0", "uniform 0"]


def test_only_what_there_is_can_be_asked_for(modules):
    grid, _, _ = modules
    (one,) = grid.arm_jobs(1, full=False, only="corrupted/dft")
    assert one.arm == "dft"
    core, full = (grid.arm_jobs(1, full=full, only="corrupted") for full in (False, True))
    assert {job.arm for job in core} < {job.arm for job in full}
    assert {job.setting for job in full} == {"corrupted"}
    with pytest.raises(ValueError, match=r"'corupted' is no setting or arm; there are: corrupted/"):
        grid.arm_jobs(1, full=False, only="corupted")


def test_arms_of_a_seed_differ_in_what_their_names_say(modules):
    """Same data, order, start and steps."""
    grid, _, _ = modules
    own = {"weighting", "reference", "output_dir"}
    for setting in grid.SETTINGS:
        for arm in setting.arms:
            jobs = [grid.arm_job(setting, x, 3) for x in (arm, setting.arms[0])]
            one, other = (grid.changed(job.config, job.changes) for job in jobs)
            assert one["seed"] == other["seed"] == 3
            assert jobs[0].prepare == (*jobs[1].prepare, *grid._data(arm.prepare, 3))
            differing = {key for key in one | other if one.get(key) != other.get(key)}
            allowed = set(own)
            if "one head" in arm.name:
                allowed |= {"model", "checkpointer"}
            if arm.name.startswith("uniform_good"):
                allowed |= {"max_steps", "policy_rewards_above"}
            if arm.name.endswith("nothing spoiled"):
                allowed |= {"stages", "dataset", "rewards"}
            if arm.needs[-1].startswith("critic, "):
                allowed |= {"critic", "rewards", "value_table"}
            assert differing <= allowed, arm.name


# --------------------------------------------------------------------------------- page


@pytest.fixture
def page(modules, tmp_path):
    """page(rows, *settings) -> the text that is written."""
    _, report, _ = modules

    def write(rows, *settings):
        report.write_page(rows, tmp_path / "docs" / "results.md", settings)
        return (tmp_path / "docs" / "results.md").read_text()

    write.folder = tmp_path / "docs"
    return write


def rows_over_seeds(grid, setting, losses, **measures):
    """Rows of every arm and model: ``losses[arm]`` is added to what the seed itself costs."""
    rows = []
    for seed, cost in enumerate((4.0, 4.5, 5.0)):
        for arm in setting.arms:
            job = grid.arm_job(setting, arm, seed)
            jitter = 0.001 * seed
            heads = [cost + losses[arm.name] + jitter * bool(losses[arm.name])] * 2
            rows.append(row_of(job, heads, **measures.get(arm.name, {})))
            for model in job.needs:
                rows.append(row_of(model, [3.25, 3.5] if model.arm == "base" else [3.0, 3.75]))
    return rows


def test_the_page_has_the_numbers_of_its_rows(modules, small, page):
    grid, _, _ = modules
    topk = f"topk, {grid.MTP}"
    marks = {"noise_in_weight": 0.2, "noise_in_data": 0.4, "spikes": 1}
    rows = rows_over_seeds(grid, small, {"uniform": 0.0, topk: -0.1}, **{topk: marks})
    text = page(rows, small)
    assert re.findall(r"^#+ (.*)$", text, re.M) == [
        "What each weighting is worth",
        "Corrupted lines",
        "Models that the arms on lines of source share",
    ]
    # -0.1, -0.099, -0.098: mean -0.099, deviation 0.001, t(0.975, 2) = 4.302653.
    cells = (
        "| -0.0990 [-0.1015, -0.0965] | -0.0990 | -0.0990 | 0.200 of 0.400 | 0.250 | 3 | 9 | 1 |"
    )
    assert f"| {topk} | 4.4010 {cells}" in text
    assert "| uniform | 4.5000 | - | - | - | - | 0.250 | 0 | 9 | 1 |" in text
    assert f"Better than `uniform`: `{topk}` (-0.0990 [-0.1015, -0.0965])." in text
    assert f"| {grid.MTP} | 9 | 3.000 3.750 | 1 |" in text
    assert f"{grid.MTP} minus base, head by head: -0.250, +0.250." in text
    assert "6 runs over 3 seeds" in text
    assert "made up" in text
    picture = (page.folder / "results_corrupted.svg").read_text()
    assert "](results_corrupted.svg)" in text
    assert topk in picture
    assert len(picture) < 60_000


def test_what_loses_is_told_as_plainly(modules, small, page):
    grid, _, _ = modules
    topk = f"topk, {grid.MTP}"
    setting = replace(small, comparisons=((topk, "uniform"),))
    text = page(rows_over_seeds(grid, setting, {"uniform": 0.0, topk: 0.1}), setting)
    assert f"Worse than `uniform`: `{topk}` (+0.1010 [+0.0985, +0.1035])." in text
    assert f"- `{topk}` against `uniform`: +0.1010 [+0.0985, +0.1035], worse." in text
    assert "Better" not in text


def test_rows_of_other_definitions_are_left_out_and_counted(modules, small, page):
    grid, _, _ = modules
    topk = f"topk, {grid.MTP}"
    rows = rows_over_seeds(grid, small, {"uniform": 0.0, topk: 9.0})
    for row in rows:
        if row["arm"] == topk:
            row["definition"] = "old"
    text = page(rows, small)
    assert f"`{topk}`" not in text
    assert "3 rows of other definitions than today's are left out" in text


def test_an_arm_of_one_head_is_compared_on_that_head(modules, small, page):
    grid, _, _ = modules
    topk = f"topk, {grid.MTP}"
    rows = rows_over_seeds(grid, small, {"uniform": 0.0, topk: -0.1})
    for row in rows:
        if row["arm"] == topk:
            row["measures"]["heldout"] = row["measures"]["heldout"][:1]
            row["measures"]["acceptance"] = []
    assert f"| {topk} | 4.4010 | - | -0.0990 | - | - | - | 0 | 9 | 1 |" in page(rows, small)


def test_of_numbers_of_steps_the_best_is_compared_and_the_tries_are_told(modules, small, page):
    grid, _, _ = modules
    tries = tuple(
        replace(small.arms[0], name=f"good, {n} steps", changes={"max_steps": n}, best_of="good")
        for n in (1, 2)
    )
    setting = replace(small, arms=(small.arms[0], *tries), comparisons=(("uniform", "good"),))
    losses = {"uniform": 0.0, "good, 1 steps": 0.2, "good, 2 steps": 0.1}
    text = page(rows_over_seeds(grid, setting, losses), setting)
    assert "- `uniform` against `good` (here `good, 2 steps`): -0.1010" in text
    assert "`good` is the best of 2 arms that were tried (`good, 1 steps`, `good, 2 steps`)" in text


def test_figures_of_a_critic_are_shown_over_seeds(modules, small, page):
    grid, _, _ = modules
    critic = grid.Model("rho1", {"output_dir": "runs/critic_${seed}"})
    family = replace(small.family, models=small.family.models | {"critic": critic})
    setting = replace(small, family=family)
    rows = rows_over_seeds(grid, setting, dict.fromkeys((arm.name for arm in small.arms), 0.0))
    for seed, auc in enumerate((0.8, 0.9, 0.85)):
        row = row_of(grid.model_job(family, "critic", seed), [])
        row["measures"] = {"critic": {"auc_spoiled": {"critic": auc}, "kept": "text"}}
        rows.append(row)
    assert "| critic.auc_spoiled.critic | 0.850 | 0.800 to 0.900 |" in page(rows, setting)


# ------------------------------------------------------------------------------- heads.py


def test_the_page_of_heads_tells_losses_and_speed_apart(modules, monkeypatch, tmp_path):
    """An arm with lower losses that decodes more slowly is better here and worse there."""
    grid, _, _ = modules
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    heads = importlib.import_module("heads")
    monkeypatch.setattr(heads, "PAGE", tmp_path / "heads.md")
    rows = []
    for setting in heads.SETTINGS:
        for seed, cost in enumerate((4.0, 4.5, 5.0)):
            for arm in setting.arms:
                gain = {"rho1": 0.125, "shuffled": 0.0}.get(arm.name, -0.25) * (
                    arm.name != "uniform"
                )
                gain += gain and 0.001 * seed
                fast: dict = {"tokens_per_forward": 1.5 - gain, "per_head": [0.25, 0.125]}
                kinds = ("word_start", "word_rest", "layout", "symbol")
                fast["by_class"] = {kind: {"tokens_per_forward": 1.5} for kind in kinds}
                measures = {key: fast for key in ("decoding", "base_decoding", "decoder")}
                job = grid.arm_job(setting, arm, seed)
                rows.append(row_of(job, [cost - gain] * 2, **measures))
    heads.write_page(rows)
    text = (tmp_path / "heads.md").read_text()
    assert "30 runs over 3 seeds" in text
    # Gains .125, .126, .127 of rho1: mean .126, and Student's t of deviation .001.
    assert "| rho1 | -0.1260 [-0.1285, -0.1235] | -0.1260 [-0.1285, -0.1235] | -0.1260" in text
    told = "better: loss, head 0 (-0.1260), loss, head 1 (-0.1260); worse: tokens/forward (-0.1260)"
    assert f"- `rho1` against `uniform`: {told}" in text
    assert "- `shuffled` against `uniform`: not told apart: loss, head 0 (+0.0000)" in text
    assert text.count("| before training | 5.000 | 5.000 | ") == 2
    assert "0.250 0.125" in text
    assert len((tmp_path / "heads.svg").read_text()) > 5_000
    sys.modules.pop("heads")
