import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from wmtp_modules.config.check import ConfigError
from wmtp_modules.files import alone_in
from wmtp_modules.run.controls import name_of, runs_of
from wmtp_modules.run.figures import TrainingError
from wmtp_modules.run.plan import (
    finished,
    in_turn,
    print_losses,
    required_runs,
    run_all,
    train,
    write_summary,
)
from wmtp_modules.run.stopping import Stopped

# ------------------------------------------------------------------- required runs


def test_required_runs_inherit_the_place_and_resume(tmp_path):
    (tmp_path / "base.yaml").write_text("device: cuda\nseed: 3\nresume_from_checkpoint: false\n")
    cfg = {"device": "cpu", "assets_dir": "a", "requires": [str(tmp_path / "base.yaml")]}
    checked = []
    (required,) = required_runs(OmegaConf.create(cfg), checked.append)
    assert required == {
        "device": "cpu",
        "seed": 3,
        "resume_from_checkpoint": True,
        "assets_dir": "a",
    }
    assert checked == [required]
    assert required_runs(OmegaConf.create({}), checked.append) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"requires: .*base.yaml cannot be read as a config: No such file"),
        ("a: [", r"requires: .*base.yaml is not valid YAML"),
        ("- a\n", r"requires: .*base.yaml is a list, not the config of a run"),
    ],
)
def test_required_run_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "base.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        required_runs(OmegaConf.create({"requires": [str(path)]}), lambda cfg: None)


def test_only_the_very_config_has_finished(tmp_path):
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "x": 1, "resume_from_checkpoint": False})
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    assert not finished(cfg)
    write_summary(tmp_path, {"steps": 1})
    assert finished(cfg) == {"steps": 1}
    assert finished(OmegaConf.merge(cfg, {"resume_from_checkpoint": True}))
    assert not finished(OmegaConf.merge(cfg, {"x": 2}))
    logger = {"_component_": "wmtp_modules.run.metric_logging.JSONLLogger"}
    (tmp_path / "config.yaml").write_text(
        OmegaConf.to_yaml(cfg) + "logger:\n"
        "  _component_: wmtp_modules.training.metric_logging.JSONLLogger\n"  # as it was called
    )
    assert finished(OmegaConf.merge(cfg, {"logger": logger}))


def test_a_summary_is_json_that_every_reader_takes(tmp_path):
    write_summary(tmp_path / "new", {"loss": [1.5]})
    assert json.loads((tmp_path / "new" / "summary.json").read_text()) == {"loss": [1.5]}
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        write_summary(tmp_path / "new", {"loss": [math.nan]})
    assert json.loads((tmp_path / "new" / "summary.json").read_text()) == {"loss": [1.5]}


def test_a_required_run_is_made_by_one_and_waited_for_by_the_other(tmp_path, children, capfd):
    def make(name):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        with in_turn(tmp_path / "base"):
            if not (tmp_path / "base" / "model").exists():
                time.sleep(0.3)
                (tmp_path / "base" / "model").write_text(name)
                (tmp_path / name).touch()

    pids = [children.begin(make, name) for name in ("one", "two")]
    assert children.ends(*pids) == [0, 0]
    told = capfd.readouterr().err
    assert any(f"Waiting for pid {pid} on" in told for pid in pids)
    made = (tmp_path / "base" / "model").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"base", made}


def test_runs_of_one_config_do_not_wait_for_themselves(tmp_path, gloo_group):
    """The controls lie in the folder of the run, which holds its lock."""
    cfg = {"output_dir": str(tmp_path), "weighting": {"name": "rho1"}, "controls": ["uniform"]}
    runs = runs_of(OmegaConf.create(cfg), ["rho1", "uniform"])

    def run(one, beside):
        Path(one.output_dir, "ran").touch()
        return {"heldout_loss": {}, "seconds": 1.0}

    with alone_in(tmp_path, wait=False):
        assert run_all(runs, run)["seconds"] == 2.0
    assert len(list(tmp_path.rglob("ran"))) == 2
    assert not list(tmp_path.rglob(".lock"))


def test_each_run_stands_in_figures_under_its_name_with_what_it_changes(
    tmp_path, gloo_group, capsys
):
    """Two of them have one weighting; what an earlier list of controls had is left out."""
    cfg = OmegaConf.create(
        {
            "output_dir": str(tmp_path),
            "weighting": {"name": "rho1"},
            "max_steps": 8,
            "controls": {"uniform": None, "much_longer_uniform": {"max_steps": 16}},
        }
    )
    cfg.controls.much_longer_uniform["weighting.name"] = "uniform"
    losses = {"uniform": [3.0], "much_longer_uniform": [2.0], "rho1": [1.0]}
    beside_of = {}

    def run(one, beside):
        name = name_of(one)
        beside_of[name] = dict(beside)
        own = {"base": [4.0], name: losses[name], "gone": [0.0]}
        return {
            "heldout_loss": own,
            "tokens_per_forward": {"base": 1.5, name: losses[name][0], "gone": 9.0},
            "seconds": 1.0,
            "steps": one.max_steps,
            "controls": {"gone": {}},
        }

    summary = run_all(runs_of(cfg, ["rho1", "uniform"]), run)
    assert summary["heldout_loss"] == {"base": [4.0]} | losses
    tokens = {"base": 1.5, "uniform": 3.0, "much_longer_uniform": 2.0, "rho1": 1.0}
    assert summary["tokens_per_forward"] == tokens
    assert summary["controls"] == {
        "uniform": {"weighting.name": "uniform"},
        "much_longer_uniform": {"max_steps": 16, "weighting.name": "uniform"},
    }
    metrics = {name: tmp_path / "controls" / name / "metrics.jsonl" for name in losses}
    metrics.pop("rho1")
    assert beside_of["rho1"] == metrics
    print_losses(summary)
    *lines, said = capsys.readouterr().out.splitlines()[2:]
    assert [line.split() for line in lines] == [
        ["head", "0", "mean", "tokens/forward"],
        ["base", "4.000", "4.000", "1.50"],
        ["uniform", "3.000", "3.000", "3.00"],
        ["much_longer_uniform", "2.000", "2.000", "2.00", "max_steps=16", "weighting.name=uniform"],
        ["rho1", "1.000", "1.000", "1.00"],
    ]
    assert len({line.index(".") for line in lines[1:]}) == 1  # in columns
    assert said == f"{summary['steps']} steps are too few to judge a weighting by: docs/results.md"
    print_losses(summary | {"steps": 80, "tokens_per_forward": {"rho1": 1.25}})
    out = capsys.readouterr().out
    assert "too few" not in out
    assert ["uniform", "3.000", "3.000", "-"] in [line.split() for line in out.splitlines()]
    print_losses(summary | {"tokens_per_forward": {}})  # of runs that are older than the figure
    assert "forward" not in capsys.readouterr().out


def test_a_finished_control_does_not_mind_what_stands_beside_it(tmp_path):
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "controls": ["a", "b"], "x": 1})
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    write_summary(tmp_path, {"steps": 1})
    assert finished(OmegaConf.merge(cfg, {"controls": None}))
    assert not finished(OmegaConf.merge(cfg, {"controls": ["a"]}))  # its picture shows them
    assert not finished(OmegaConf.merge(cfg, {"controls": None, "x": 2}))


@pytest.mark.parametrize(
    ("raised", "ends", "is_drawn"),
    [
        (None, None, False),  # its own end draws it
        (Stopped("SIGTERM", 3), Stopped, False),  # so has it
        (TrainingError("the loss is nan"), SystemExit, True),
        (RuntimeError("a device hangs"), RuntimeError, False),  # who knows what still works
    ],
)
def test_a_run_that_fails_is_drawn(tmp_path, gloo_group, raised, ends, is_drawn):
    def go():
        if raised:
            raise raised

    drawn = []
    recipe = SimpleNamespace(train=go, finish=lambda beside: {}, draw=lambda: drawn.append(1))
    recipe.watchdog, recipe.model_args, recipe.device = nullcontext(), {}, "cpu"
    stops = SimpleNamespace(step_by_step=nullcontext)
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "device": "cpu"})
    with pytest.raises(ends) if ends else nullcontext():
        train(recipe, cfg, stops, {}, 0.0)
    assert drawn == [1] * is_drawn
    assert (tmp_path / "summary.json").exists() == (raised is None)
