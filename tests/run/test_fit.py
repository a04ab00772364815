"""What ``activation_checkpointing: auto`` is, by the recipe's own estimate."""

import io
import json
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from wmtp_modules import estimate_memory
from wmtp_modules.config.rules import checkpointing_of
from wmtp_modules.run import fit

RECIPE = Path(__file__).parents[2] / "recipes" / "rho1_wmtp_distributed.py"
CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def cfg(tmp_path):
    cfg = OmegaConf.load(RECIPE.parents[1] / "configs" / "quickstart" / "base.yaml")
    cfg.update(assets_dir=str(tmp_path), activation_checkpointing="auto", batch_size=16)
    return OmegaConf.merge(cfg, {"output_dir": str(tmp_path / "out")})


@pytest.fixture
def asked(monkeypatch):
    """The command lines of estimates, which run in this process."""
    commands = []

    def run(command, **_):
        commands.append(command)
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = estimate_memory.main([*map(str, command[3:])])
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    monkeypatch.setattr(fit.subprocess, "run", run)
    monkeypatch.setattr(fit.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(fit.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(fit, "share_from_rank_zero", lambda value: value)
    monkeypatch.setattr(fit, "_chosen", {})
    return commands


def test_auto_is_the_lightest_that_leaves_a_tenth(cfg, asked, monkeypatch, caplog, capsys):
    recipe = estimate_memory.load_recipe(RECIPE)
    _, peaks = estimate_memory.lightest(cfg, 1, 0.0, recipe)
    assert [*peaks] == ["none", "selective", "full"]
    assert peaks["none"] > peaks["selective"] > peaks["full"]
    chosen = {}
    for gib in (peaks["none"] / 0.9 + 1e-6, peaks["none"], peaks["selective"], 0.01):
        monkeypatch.setattr(fit, "memory_gib", lambda _, gib=gib: gib)
        one = fit.fitted(cfg, str(RECIPE), CPU)
        chosen[gib] = checkpointing_of(one)
        again = fit.fitted(cfg | {"seed": cfg.seed}, str(RECIPE), CPU)
        assert checkpointing_of(again) == chosen[gib]
    assert [*chosen.values()] == ["none", "selective", "full", "full"]
    assert len(asked) == 4  # each once
    assert "activation_checkpointing: selective, the lightest with a tenth of" in caplog.text


def test_what_is_not_auto_stays(cfg, asked):
    cfg.activation_checkpointing = "selective"
    assert fit.fitted(cfg, str(RECIPE), CPU) is cfg
    assert not asked


def test_a_recipe_that_cannot_be_estimated_is_checkpointed(cfg, asked, tmp_path, caplog):
    mine = tmp_path / "mine.py"
    mine.write_text("def check(cfg): ...\n")
    assert checkpointing_of(fit.fitted(cfg, str(mine), CPU)) == "full"
    assert "no estimate was made" in caplog.text
    assert "has no class with setup_model" in caplog.text


def test_memory_is_shared_by_the_ranks_of_a_machine(monkeypatch):
    whole = fit.memory_gib(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert fit.memory_gib(CPU) == pytest.approx(whole / 4)


@pytest.mark.nightly  # the process itself; what it says is above
def test_it_runs_beside_a_launched_rank(cfg, asked, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(fit.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(fit, "_chosen", {})
    assert fit._choose(cfg, str(RECIPE), CPU) == "none"
    assert json.loads(next(iter(fit._chosen)))[1] > 0
