"""The critic's commands as a user types them: real `tune run` processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/critic_wmtp_distributed.py"

pytestmark = pytest.mark.slow


def tune_run(*args, ranks=None):
    command = [Path(sys.executable).with_name("tune"), "run"]
    command += ["--nproc_per_node", str(ranks)] if ranks else []
    return subprocess.run(
        [*command, RECIPE, *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """configs/quickstart/critic.yaml as README has it, with its files elsewhere."""
    folder = tmp_path_factory.mktemp("quickstart_critic")
    done = tune_run(
        *("--config", "configs/quickstart/critic.yaml"),
        f"output_dir={folder}/critic",
        f"assets_dir={folder}/assets",
        f"metric_logger.tracking_uri=sqlite:///{folder}/mlflow.db",
        ranks=2,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done, folder


def test_the_critic_beats_both_baselines_by_ten_points(quickstart):
    _, folder = quickstart
    summary = json.loads((folder / "critic" / "summary.json").read_text())
    critic = summary["critic"]
    assert critic["pair_accuracy"] >= max(critic["length_only"], 0.5) + 0.1
    assert {"pair_accuracy", "length_only", "auc"} <= critic.keys()
    assert set(summary["heldout_loss"]) == {"base", "uniform", "shuffled", "critic"}
    assert all(len(loss) == 4 for loss in summary["heldout_loss"].values())
    # Fine-tuning works. Whether weights help is a finding, which README has, and no condition.
    assert sum(summary["heldout_loss"]["uniform"]) < sum(summary["heldout_loss"]["base"])
    assert {"share", "chance"} <= summary["delta_near_mutation"].keys()


def test_the_quickstart_tells_everything_and_where_it_is(quickstart):
    done, folder = quickstart
    for words in ("length alone", "AUC across problems", "largest |delta| within 3 tokens"):
        assert words in done.stdout
    critic = folder / "critic" / "critic"
    for what in (
        *(critic / name for name in ("calibration.png", "weights.html")),
        *(folder / "critic" / name for name in ("best", "curves.png", "summary.json")),
    ):
        assert str(what) in done.stdout
        assert what.exists()


def test_two_ranks_equal_one_process(quickstart, tmp_path):
    """Same joint batches, shared by two ranks or not: critic, values, advantages and weights."""
    _, folder = quickstart
    config = OmegaConf.load(ROOT / "configs/quickstart/critic.yaml")
    for key in ("prepare", "requires", "controls"):
        del config[key]
    config.update(max_steps=3, run_val_every_n_steps=3, log_every_n_steps=1)
    config.critic.update(max_steps=6, eval_every_n_steps=3)
    config.metric_logger = {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": str(tmp_path / "logs"),
    }
    OmegaConf.save(config, tmp_path / "config.yaml")
    lines, records, heads = {}, {}, {}
    for ranks, share in ((2, 1), (None, 2)):
        output = tmp_path / f"ranks_{ranks}"
        done = tune_run(
            *("--config", tmp_path / "config.yaml", f"assets_dir={folder}/assets"),
            f"output_dir={output}",
            f"rewards.table_dir={output}/rewards",
            f"critic.checkpoint_dir={output}/critic",
            f"value_table.table_dir={output}/values",
            f"critic.batch_size={8 * share}",
            f"batch_size={2 * share}",
            "allow_uninformative_critic=true",
            ranks=ranks,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        text = (output / "metrics.jsonl").read_text()
        lines[ranks] = [json.loads(line) for line in text.splitlines()]
        records[ranks] = json.loads((output / "critic" / "critic.json").read_text())
        heads[ranks] = load_file(output / "critic" / "value_head.safetensors")
    assert records[2]["heldout_losses"] == pytest.approx(records[None]["heldout_losses"], rel=1e-6)
    for key in ("pair_accuracy", "value_loss", "auc"):
        got, want = (records[ranks]["report"][key] for ranks in (2, None))
        assert got == pytest.approx(want, rel=1e-5)
    # A pairwise objective leaves the output's bias open: its gradient is rounding, which AdamW
    # blows up, and the fitted shift takes it back. What counts is the constant both make together.
    together = {ranks: x["scale"] * x["out.bias"] + x["shift"] for ranks, x in heads.items()}
    assert together[2].item() == pytest.approx(together[None].item(), rel=1e-3, abs=1e-6)
    for key, want in heads[None].items():
        if key not in ("out.bias", "shift"):
            assert (heads[2][key] - want).norm() <= 1e-3 * want.norm(), key
    assert len(lines[2]) == len(lines[None]) >= 3
    for two, one in zip(lines[2], lines[None], strict=True):
        for key in one.keys() - {"tokens_per_s", "memory_gib"}:
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


def test_what_a_control_would_hide_is_found_before_it_trains(quickstart, tmp_path):
    """uniform needs no critic, so it could train for hours before the next run finds none."""
    _, folder = quickstart
    done = tune_run(
        *("--config", "configs/quickstart/critic.yaml", f"assets_dir={folder}/assets"),
        *("stages=[policy]", f"output_dir={tmp_path}"),
    )
    assert done.returncode == 1
    assert f"{tmp_path}/critic holds no trained critic: add 'critic' to stages" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "controls").exists()


def test_a_typo_is_one_sentence(tmp_path):
    done = tune_run(
        *("--config", "configs/quickstart/critic.yaml", "critic.objektive=pairwise"),
        f"output_dir={tmp_path}",
    )
    assert done.returncode == 1
    assert "critic.objektive: unknown key (did you mean 'objective'?)" in done.stderr
    assert "Traceback" not in done.stderr
