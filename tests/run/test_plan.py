import json
import math

import pytest
from omegaconf import OmegaConf

from wmtp_modules.config.check import Component, ConfigError, Optional, check_config
from wmtp_modules.config.rules import TRAINING_RULES, cpp_compiler
from wmtp_modules.run import start
from wmtp_modules.run.plan import control_runs, finished, required_runs, write_summary
from wmtp_modules.run.start import exit_with_message

# ------------------------------------------------------------------- one sentence


def leave(error, rank, monkeypatch):
    """What the process says, and how long it waited before."""
    waited = []
    monkeypatch.setattr(start.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as left, exit_with_message(ValueError):
        raise error
    return left.value.code, waited


def test_rank_0_speaks_at_once(monkeypatch):
    assert leave(ConfigError("seed: missing"), 0, monkeypatch) == ("ConfigError: seed: missing", [])


def test_another_rank_waits_to_be_ended_and_gives_its_number(monkeypatch):
    said, waited = leave(ValueError("no GPU here"), 3, monkeypatch)
    assert said == "rank 3: ValueError: no GPU here"
    assert waited == []  # no launcher, whose store would tell of rank 0


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError), exit_with_message(ValueError, OSError):
        raise KeyError("a bug")


# ------------------------------------------------------------------- required runs


def test_required_runs_inherit_the_place_and_resume(tmp_path):
    (tmp_path / "base.yaml").write_text("device: cuda\nseed: 3\nresume_from_checkpoint: false\n")
    cfg = {"device": "cpu", "assets_dir": "a", "requires": [str(tmp_path / "base.yaml")]}
    checked = []
    (required,) = required_runs(OmegaConf.create(cfg), checked.append)
    assert checked == [required]
    assert required == {
        "device": "cpu",
        "seed": 3,
        "resume_from_checkpoint": True,
        "assets_dir": "a",
    }
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


def test_a_run_is_finished_for_the_very_config(tmp_path):
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "x": 1, "resume_from_checkpoint": False})
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    assert not finished(cfg)
    write_summary(tmp_path, {"steps": 1})
    assert finished(cfg)
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


# ------------------------------------------------------------------- rules

SCHEMA = {
    "num_warmup_steps": int,
    "max_steps": int,
    "weighting": dict,
    "dataset": Component(given=("tokenizer",)),
    "dataset_val": Component(given=("tokenizer",)),
    "device": str,
    "compile": bool,
    "fp32_master_weights": bool,
    "optimizer": dict,
    "controls": Optional(list[str]),
}
ROWS = {
    "_component_": "wmtp_modules.data.rows_dataset",
    "source": "a",
    "validation_fraction": 0.1,
    "seed": 3,
}
VALID = {
    "num_warmup_steps": 1,
    "max_steps": 2,
    "weighting": {"name": "rho1"},
    "dataset": ROWS,
    "dataset_val": ROWS | {"split": "validation"},
    "device": "cpu",
    "compile": False,
    "fp32_master_weights": True,
    "optimizer": {},
    "controls": ["uniform", "dft"],
}


def check(**changes):
    check_config(OmegaConf.merge(VALID, changes), SCHEMA, TRAINING_RULES)


def test_rules_allow_what_is_right(monkeypatch):
    check()
    check(controls=None)
    check(dataset_val={"source": "b", "seed": 4})
    check(dataset_val={"validation_fraction": 0.0, "seed": 4})  # not divided by hash
    check(fp32_master_weights=False, optimizer={"bf16_stochastic_round": True})
    check(compile=True, device="cuda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset_val": {"seed": 4}},
            r"^dataset_val: divides the source of dataset with another seed \(3 and 4\)",
        ),
        (
            {"dataset_val": {"validation_fraction": 0.2}},
            r"another validation_fraction \(0.1 and 0.2\), so that rows would be on both sides",
        ),
        ({"dataset": {"validation_fraction": 0}}, r"validation_fraction \(0 and 0.1\)"),
        ({"fp32_master_weights": False}, "bf16_stochastic_round"),
    ],
)
def test_rules_find(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(**changes)


def test_bf16_parameters_are_for_one_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="is for one rank"):
        check(fp32_master_weights=False, optimizer={"bf16_stochastic_round": True})


def test_compiling_on_a_cpu_needs_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    assert cpp_compiler() is None
    with pytest.raises(ConfigError, match=r"compile: true needs a C\+\+ compiler on a CPU and '.*"):
        check(compile=True)
    quantised = {"_component_": "torchao.optim.AdamW8bit"}
    message = r"optimizer: torchao.optim.AdamW8bit needs a C\+\+ compiler .* torch.optim"
    with pytest.raises(ConfigError, match=message):
        check(optimizer=quantised)
    check(optimizer=quantised, device="cuda")
    (tmp_path / "c++").touch(0o755)
    assert cpp_compiler() == str(tmp_path / "c++")
    check(compile=True, optimizer=quantised)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"'g\+\+' is not there: install g\+\+"):
        check(compile=True)


def test_all_of_them_come_at_once():
    with pytest.raises(ConfigError, match="2 errors"):
        check(dataset_val={"seed": 4}, fp32_master_weights=False)


def test_controls_are_the_config_under_other_weightings():
    """Each once, and not the run itself, which a user may have set to one of them."""
    cfg = OmegaConf.create(
        {
            "output_dir": "out",
            "weighting": {"name": "uniform", "ratio": 0.5},
            "controls": ["uniform", "random_topk", "dft", "dft"],
        }
    )
    runs = list(control_runs(cfg))
    assert [run.weighting.name for run in runs] == ["random_topk", "dft"]
    assert [run.output_dir for run in runs] == ["out/controls/random_topk", "out/controls/dft"]
    assert all(run.weighting.ratio == 0.5 for run in runs)
