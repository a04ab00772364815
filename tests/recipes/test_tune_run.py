"""The command line as a user types it: real `tune run` processes from the repository's root."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RECIPE = "recipes/rho1_wmtp_distributed.py"

pytestmark = pytest.mark.slow


def readme_command():
    """What follows ``uv run tune run`` in README's first command."""
    (command,) = re.findall(r"^pip install uv && uv run tune run (.+)$", README, re.MULTILINE)
    return shlex.split(command)


def tune_run(*args, ranks=None, timeout=600):
    launcher = ["--nproc_per_node", str(ranks)] if ranks else []
    return tune(*launcher, RECIPE, *args, timeout=timeout)


def tune(*args, timeout):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [Path(sys.executable).with_name("tune"), "run", *map(str, args)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return tmp_path_factory.mktemp("quickstart") / "assets"


@pytest.fixture(scope="module")
def quickstart(assets):
    """README's first command, with its files elsewhere."""
    done = tune(
        *readme_command(),
        f"output_dir={assets.parent}/rho1",
        f"assets_dir={assets}",
        f"metric_logger.tracking_uri=sqlite:///{assets.parent}/mlflow.db",
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done, assets.parent / "rho1"


def test_quickstart_beats_its_controls(quickstart):
    """Rho-1 turns away from noise; uniform and random selection cannot."""
    _, folder = quickstart
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["heldout_loss"]) == ["base", "uniform", "random_topk", "rho1"]
    mean = {name: sum(loss) / 4 for name, loss in summary["heldout_loss"].items()}
    assert mean["rho1"] < mean["uniform"]
    assert mean["rho1"] < mean["random_topk"]
    share = summary["corrupted_share"]
    assert share["data"] == pytest.approx(0.4, abs=0.05)
    assert share["selected"] < share["data"] - 0.05
    assert {"steps", "seconds"} <= summary.keys()


def test_quickstart_tells_where_everything_is(quickstart):
    done, folder = quickstart
    for what in (folder / "best", folder / "curves.png", folder / "summary.json"):
        assert str(what) in done.stdout
        assert what.exists()
    assert "mlflow ui --backend-store-uri" in done.stdout + done.stderr


def test_two_ranks_equal_one_process(quickstart, assets, tmp_path):
    """Same joint micro-batch, shared by two ranks or not: same losses, same weights."""
    config = OmegaConf.load(ROOT / "configs/quickstart/rho1.yaml")
    config.update(assets_dir=str(assets), max_steps=4, num_warmup_steps=1)
    config.update(run_val_every_n_steps=2, log_every_n_steps=1)
    config.metric_logger = {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": str(tmp_path / "logs"),
    }
    for key in ("prepare", "requires", "controls"):
        del config[key]
    OmegaConf.save(config, tmp_path / "config.yaml")
    lines = {}
    for ranks, batch_size in ((2, 2), (None, 4)):
        folder = tmp_path / f"ranks_{ranks}"
        done = tune_run(
            "--config",
            tmp_path / "config.yaml",
            f"output_dir={folder}",
            f"batch_size={batch_size}",
            ranks=ranks,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        text = (folder / "metrics.jsonl").read_text()
        lines[ranks] = [json.loads(line) for line in text.splitlines()]
    assert len(lines[2]) == len(lines[None]) >= 4
    for two, one in zip(lines[2], lines[None], strict=True):
        for key in one.keys() - {"tokens_per_s", "memory_gib"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_typo_is_one_sentence(tmp_path, ranks):
    """Of the two ranks only one says it; torchrun adds a traceback of its own."""
    done = tune_run(
        "--config",
        "configs/quickstart/rho1.yaml",
        "optimizer.learning_rte=3",
        f"output_dir={tmp_path}",
        ranks=ranks,
    )
    assert done.returncode == 1
    sentence = "ConfigError: optimizer.learning_rte: unknown key (did you mean 'lr'?)"
    assert done.stderr.count(sentence) == 1
    assert ("Traceback" in done.stderr) == (ranks is not None)


def test_a_truncated_checkpoint_is_one_sentence(quickstart, assets, tmp_path):
    broken = tmp_path / "base"
    shutil.copytree(assets / "base" / "last", broken)
    file = broken / "consolidated.pth"
    file.write_bytes(file.read_bytes()[:-1000])
    done = tune_run(
        "--config",
        "configs/quickstart/rho1.yaml",
        f"assets_dir={assets}",
        f"checkpointer.checkpoint_dir={broken}",
        f"output_dir={tmp_path}/out",
    )
    assert done.returncode == 1
    assert "consolidated.pth" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
