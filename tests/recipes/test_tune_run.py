"""The command line as a user types it: a real `tune run`, and forked starts that equal it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RECIPE = "recipes/rho1_wmtp_distributed.py"
OF_MACHINE = {"tokens_per_s", "memory_gib"}

pytestmark = pytest.mark.slow


def readme_command():
    """What follows ``uv run tune run`` in README's first command."""
    (command,) = re.findall(r"^pip install uv && uv run tune run (.+)$", README, re.MULTILINE)
    return shlex.split(command)


def tune(*args):
    """A real one."""
    return subprocess.run(
        [Path(sys.executable).with_name("tune"), "run", *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def quickstart(tiny_quickstarts):
    """README's first command in a few steps, its files elsewhere."""
    folder = tiny_quickstarts.folder
    mlflow = {
        "_component_": "wmtp_modules.run.metric_logging.MLflowLogger",
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
        "experiment_name": "quickstart",
        "run_name": "${weighting.name}",
    }
    config = tiny_quickstarts.config("rho1", metric_logger=mlflow)
    *command, shipped = readme_command()
    assert shipped == "configs/quickstart/rho1.yaml"
    done = tune(*command, config)
    assert done.returncode == 0, done.stderr[-4000:]
    return done, folder / "rho1"


def figures_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in OF_MACHINE} for line in lines]


def test_quickstart_tells_what_it_found_and_where_everything_is(quickstart):
    done, folder = quickstart
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["heldout_loss"]) == ["base", "uniform", "random_topk", "rho1"]
    assert {"steps", "seconds", "corrupted_share"} <= summary.keys()
    beside = summary["reference"]
    assert (beside["heads"], len(beside["heldout_loss"])) == (4, 4)
    for losses in summary["heldout_loss"].values():
        assert all(f"{loss:.3f}" in done.stdout for loss in losses)
    for name in ("best", "run.html", "curves.png", "summary.json"):
        what = folder / name
        assert str(what) in done.stdout
        assert what.exists()
    assert "mlflow ui --backend-store-uri" in done.stdout + done.stderr
    (manifest,) = folder.parent.rglob("scores/manifest.json")
    tags = json.loads((folder / "tracking" / "run.json").read_text())["tags"]
    assert json.loads(tags["scores.reference"]) == json.loads(manifest.read_text())["fingerprint"]


def test_a_forked_start_equals_a_real_one(quickstart, forks, tiny_quickstarts, tmp_path):
    """What the other tests rely on: forked ranks train, read and write the same, to the bit."""
    _, folder = quickstart
    command = [RECIPE, "--config", tiny_quickstarts.config("rho1"), f"output_dir={tmp_path}/out"]
    alone = ["controls=null", f"reference.table_dir={tmp_path}/scores"]
    done = forks.run([*command, *alone], ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    real, forked = (torch.load(f / "last" / "consolidated.pth") for f in (folder, tmp_path / "out"))
    assert real.keys() == forked.keys()
    assert all(torch.equal(forked[name], tensor) for name, tensor in real.items())
    assert figures_of(tmp_path / "out") == figures_of(folder)
    names = {path.name for path in folder.iterdir()}
    more = {"torchtune_config.yaml", "tracking", "controls"}
    assert names - more == {path.name for path in (tmp_path / "out").iterdir()} - more


@pytest.mark.nightly  # tests/golden holds both recipes on two ranks to mathematics that know none
def test_two_ranks_equal_one_process(quickstart, forks, tiny_quickstarts, tmp_path):
    """Same joint micro-batch, shared by two ranks or not: same losses, same weights."""
    lines, beside = {}, {}
    for ranks, batch_size in ((2, 2), (None, 4)):
        folder = tmp_path / f"ranks_{ranks}"
        config = tiny_quickstarts.config(
            "rho1", max_steps=4, num_warmup_steps=1, run_val_every_n_steps=2, controls=None
        )
        command = [RECIPE, "--config", config, f"output_dir={folder}", f"batch_size={batch_size}"]
        done = forks.run(command, ranks=ranks)
        assert done.returncode == 0, done.stderr[-4000:]
        lines[ranks] = figures_of(folder)
        beside[ranks] = json.loads((folder / "summary.json").read_text())["reference"]
    for key in ("heldout_loss", "model_heldout_loss"):
        assert beside[2][key] == pytest.approx(beside[None][key], rel=1e-6)
    assert len(lines[2]) == len(lines[None]) >= 4
    for two, one in zip(lines[2], lines[None], strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)


TYPO = "optimizer.learning_rte=3"
SENTENCE = "ConfigError: optimizer.learning_rte: unknown key (did you mean 'lr'?)"


def with_typo(tmp_path):
    return [RECIPE, "--config", "configs/quickstart/rho1.yaml", TYPO, f"output_dir={tmp_path}"]


def test_a_typo_is_one_sentence(forks, tmp_path):
    done = forks.run(with_typo(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"{SENTENCE}\n"


@pytest.mark.nightly  # a silent launcher: tests/distributed/test_signals.py; two ranks: below
def test_a_typo_is_one_sentence_of_two_ranks(tmp_path):
    """It is also the last line: torchrun would add a traceback of its own."""
    done = tune("--nproc_per_node", 2, *with_typo(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count("learning_rte: unknown key") == 1
    assert done.stderr.splitlines()[-1] == SENTENCE
    assert "Traceback" not in done.stderr


def test_a_typo_is_one_sentence_each_time(forks, tmp_path):
    """Whichever rank is the faster, and however late a launcher ends the other."""
    started = [forks.start(with_typo(tmp_path), ranks=2) for _ in range(3)]
    for done in started:
        codes = done.wait()
        assert codes[0] == 1
        assert codes[1] != 0
        assert done.stderr.count("unknown key") == done.stderr.count(SENTENCE) == 1, done.stderr


def test_a_truncated_checkpoint_is_one_sentence(quickstart, forks, tiny_quickstarts, tmp_path):
    broken = tmp_path / "base"
    shutil.copytree(tiny_quickstarts.folder / "rho1_assets" / "base" / "last", broken)
    file = broken / "consolidated.pth"
    file.write_bytes(file.read_bytes()[:-1000])
    done = forks.run(
        [
            *(RECIPE, "--config", tiny_quickstarts.config("rho1")),
            *(f"checkpointer.checkpoint_dir={broken}", f"output_dir={tmp_path}/out"),
        ]
    )
    assert done.returncode == 1
    assert "consolidated.pth" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
