"""The ablation's own command, with trainings of a few steps: workers, rows, page, a restart."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    """ablation(arm) -> what the command prints, in a folder with the shipped configs cut short."""
    folder = tmp_path_factory.mktemp("ablation")
    configs = folder / "configs" / "quickstart"
    configs.mkdir(parents=True)
    for path in (ROOT / "configs" / "quickstart").glob("*.yaml"):
        cfg = OmegaConf.load(path)
        if "max_steps" in cfg:
            cfg.update(max_steps=2, num_warmup_steps=1)
        if "critic" in cfg:
            cfg.critic.update(max_steps=2, eval_every_n_steps=1)
        OmegaConf.save(cfg, configs / path.name)

    def run(arm):
        done = subprocess.run(
            [sys.executable, ROOT / "benchmarks" / "ablation.py", "--seeds", "1", "--only", arm],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        return done.stdout

    run.folder = folder
    return run


@pytest.mark.parametrize(
    ("arm", "n_runs", "title"),
    [
        ("corrupted/topk, MTP reference", 3, "Corrupted lines"),
        ("scarce/value", 3, "Critic, good responses scarce"),
    ],
)
def test_an_arm_with_its_models_becomes_rows_and_a_page(ablation, arm, n_runs, title):
    assert f"0 of 1 arms are finished, {n_runs} runs to do" in ablation(arm)
    rows = (ablation.folder / "benchmarks" / "results" / "ablation.jsonl").read_text()
    (row,) = (x for x in map(json.loads, rows.splitlines()) if f"{x['setting']}/{x['arm']}" == arm)
    assert len(row["measures"]["heldout"]) == 4
    assert len(row["measures"]["acceptance"]) == 3
    assert 0 < row["measures"]["noise_in_weight"] < 1
    assert f"## {title}" in (ablation.folder / "docs" / "results.md").read_text()
    assert "1 of 1 arms are finished, 0 runs to do" in ablation(arm)
