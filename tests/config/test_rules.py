from typing import Annotated, Any

import pytest
from omegaconf import OmegaConf

from wmtp_modules.config.check import Component, ConfigError, Keys, check_config
from wmtp_modules.config.rules import TRAINING_RULES, cpp_compiler


class Config(Keys):
    num_warmup_steps: int
    max_steps: int
    weighting: dict
    dataset: Annotated[dict[str, Any], Component(given=("tokenizer",))]
    dataset_val: Annotated[dict[str, Any], Component(given=("tokenizer",))]
    device: str
    compile: bool
    fp32_master_weights: bool
    optimizer: dict
    controls: list[str] | None = None


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
    check_config(OmegaConf.merge(VALID, changes), Config, TRAINING_RULES)


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
