"""What README says of its three quickstarts, by its own commands: claims over whole trainings.

That files, tables and ranks are right is held by tests/recipes/test_tune_run*.py with quickstarts
of a few steps.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"uv run (tune run .+quickstart/.+)$", (ROOT / "README.md").read_text(), re.M)

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """quickstart(config) -> README's command with its files elsewhere: its folder, what it said."""

    def run(config):
        (command,) = (line for line in COMMANDS if line.endswith(f"quickstart/{config}.yaml"))
        folder = tmp_path_factory.mktemp(config)
        more = [f"output_dir={folder}/out", f"assets_dir={folder}/assets"]
        more += [f"tracking.uri=sqlite:///{folder}/mlflow.db"]
        tune = Path(sys.executable).with_name("tune")
        done = subprocess.run(
            [tune, *shlex.split(command)[1:], *more],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=3000,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return folder, done.stdout

    return run


def test_rho1_beats_its_controls(quickstart):
    """By held-out loss on clean text at equal steps. How much weight noise gets is no measure."""
    folder, _ = quickstart("rho1")
    summary = json.loads((folder / "out" / "summary.json").read_text())
    mean = {name: sum(loss) / 4 for name, loss in summary["heldout_loss"].items()}
    assert mean["rho1"] < mean["uniform"]
    assert mean["rho1"] < mean["random_topk"]
    assert summary["corrupted_share"]["data"] == pytest.approx(0.4, abs=0.05)
    assert (summary["reference"]["heads"], summary["reference"]["not_below"]) == (4, [])


def test_the_critic_knows_and_its_weights_beat_the_filter(quickstart):
    """By how little they beat uniform ones here is a finding over seeds, in docs/results.md."""
    folder, _ = quickstart("critic")
    summary = json.loads((folder / "out" / "summary.json").read_text())
    critic, area = summary["critic"], summary["critic"]["auc_spoiled"]
    assert critic["pair_accuracy"] > critic["token_table"] + 0.2
    assert area["critic"] > area["token_table"] + 0.1
    mean = critic["mean_value"]
    assert mean["start"] == pytest.approx(mean["good_share"], abs=0.05)
    share = summary["weight_on_spoiled"]
    assert 0 < share["critic"] < 0.92 * share["data"]  # half of the weight is uniform
    losses = summary["heldout_loss"]
    for name in ("uniform", "critic", "oracle"):
        assert sum(losses[name]) < sum(losses["base"])
    assert sum(losses["critic"]) < sum(losses["uniform_good"])


def test_the_evaluated_model_solves_tasks_that_it_has_not_seen(quickstart):
    folder, said = quickstart("eval")
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["pass_at_k"]["1"]["value"] > 0.2
    assert report["pass_at_k"]["1"]["low"] > 0
    assert report["reference_failures"] == []
    assert report["samples"] == 50 * 10 * 2
    assert report["identical"] is True
    assert report["tokens_per_forward"] > 1.3
    losses = [row["loss"] for row in report["per_head"]]
    assert losses == sorted(losses)  # the farther, the harder
    assert "pass@1 at temperature 0.2" in said
