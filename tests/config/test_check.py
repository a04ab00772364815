"""A config with one mistake gives one error that names the key, and shipped-like ones give none."""

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import Field, field_validator, model_validator

from wmtp_modules.config.check import Arguments, Component, ConfigError, Keys, check_config


def block(name: str = "rho1", *, mode: Literal["a", "b"] = "a", ratio: float = 0.6, n: int = 1):
    raise AssertionError("a check must not call this")


def make(tokens, /, folder: Path, *, limit: int | None = None, parts: tuple[int, ...] = (1,)):
    raise AssertionError("a check must not call this")


def make_lenient(**anything):
    raise AssertionError("a check must not call this")


def make_in_quotes(size: "NotDefinedAnywhere"):  # noqa: F821
    raise AssertionError("a check must not call this")


HERE = __name__
not_callable = 3


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """This file is reached as a component under a name of its own."""
    import sys

    module = type(sys)("config_components")
    module.make, module.make_lenient, module.make_in_quotes = make, make_lenient, make_in_quotes
    module.not_callable = not_callable
    monkeypatch.setitem(sys.modules, "config_components", module)
    monkeypatch.setenv("WMTP_ALLOWED_COMPONENTS", f"config_components,{HERE}")


class Folder(Keys):
    folder: str
    files: list[str] | None = None


class Config(Keys):
    seed: int
    lr: float
    clip: float | None
    device: Literal["cpu", "cuda"]
    names: list[str]
    compile: bool
    note: str | None = None
    checkpointer: Folder | None
    weighting: Annotated[dict[str, Any], Arguments(block)]
    optimizer: Annotated[dict[str, Any], Component(given=("params",))]
    data: Annotated[dict[str, Any], Component(given=("tokenizer",))]


VALID = {
    "seed": 3,
    "lr": 1e-5,
    "clip": None,
    "device": "cpu",
    "names": ["x"],
    "compile": False,
    "note": "${device}",
    "checkpointer": {"folder": "a"},
    "weighting": {"name": "rho1", "mode": "b", "ratio": 1},
    "optimizer": {
        "_component_": "torch.optim.AdamW",
        "lr": "${lr}",
        "betas": [0.9, 0.95],
        "weight_decay": 0.1,
    },
    "data": {"_component_": "config_components.make", "folder": "x", "parts": [1, 2]},
}


class AnyData(Config):
    data: Annotated[dict[str, Any], Component()]


class OnlyData(Keys):
    data: Annotated[dict[str, Any], Component()]


class OnlyOptimizer(Keys):
    optimizer: Annotated[dict[str, Any], Component(("params",), makes="Optimizer")]


class OnlyMade(Keys):
    optimizer: Annotated[dict[str, Any], Component(makes="Optimizer")]


def errors_of(config: dict) -> list[str]:
    try:
        check_config(OmegaConf.create(config), Config)
    except ConfigError as error:
        lines = str(error).splitlines()
        return [line.strip() for line in lines[1:]] if len(lines) > 1 else lines
    return []


def changed(path: str, value="DELETE") -> dict:
    """The valid config with one key set or deleted."""
    config = copy.deepcopy(VALID)
    *parents, key = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    if value == "DELETE":
        del node[key]
    else:
        node[key] = value
    return config


class Rate(Keys):
    lr: float = Field(1e-3, gt=0)


class Limits(Keys):
    folder: str
    limit: int = Field(ge=2)


class Ranges(Keys):
    steps: int = Field(ge=1)
    clip: float = Field(gt=0)
    warmup: int | None = Field(None, ge=0)
    optimizer: Annotated[dict[str, Any], Component(("params",), Rate)]
    data: Annotated[dict[str, Any], Component(("tokens",), Limits)]


def ranges(**changes):
    data = {"_component_": "config_components.make", "folder": "a", "limit": 2}
    optimizer = {"_component_": "torch.optim.AdamW", "lr": 1e-9}
    valid = {"steps": 1, "clip": 1e-3, "warmup": 0, "optimizer": optimizer, "data": data}
    return OmegaConf.merge(valid, changes)


def test_values_in_range_pass():
    check_config(ranges(), Ranges)
    check_config(ranges(warmup=None, clip=2), Ranges)
    config = ranges()
    del config["optimizer"]["lr"], config["warmup"]
    check_config(config, Ranges)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"steps": 1.5}, "steps: must be a whole number, got 1.5"),
        ({"clip": 0.0}, "clip: must be above 0, got 0.0"),
        ({"clip": float("nan")}, "clip: must be a number, got nan"),
        ({"clip": float("inf")}, "clip: must be a finite number, got inf"),
        ({"warmup": -1}, "warmup: must be at least 0, got -1"),
        ({"optimizer": {"lr": -0.1}}, "optimizer.lr: must be above 0, got -0.1"),
        ({"optimizer": {"lr": None}}, "optimizer.lr: must be a number, got null"),
        ({"data": {"limit": 1}}, "data.limit: must be at least 2, got 1"),
        ({"data": {"limit": None}}, "data.limit: must be a whole number, got null"),
    ],
)
def test_values_out_of_range(changes, error):
    with pytest.raises(ConfigError) as caught:
        check_config(ranges(**changes), Ranges)
    assert str(caught.value) == error


def test_a_key_that_the_recipe_needs_may_be_optional_to_the_component():
    config = ranges()
    del config["data"]["limit"]
    with pytest.raises(ConfigError, match=r"^data.limit: missing$"):
        check_config(config, Ranges)


def test_rules_are_asked_where_their_keys_are_right():
    def rule(steps, warmup):
        return f"warmup: {warmup} with {steps}" if (warmup or 0) >= steps else None

    def check(**changes):
        check_config(ranges(**changes), Ranges, [rule])

    check(steps=3, warmup=2)
    check(warmup=None)
    with pytest.raises(ConfigError, match=r"^warmup: 3 with 3$"):
        check(steps=3, warmup=3)
    with pytest.raises(ConfigError, match=r"^steps: must be at least 1, got 0$"):
        check(steps=0, warmup=3)  # not asked: steps is wrong by itself
    with pytest.raises(ConfigError, match="2 errors") as caught:
        check(steps=3, warmup=3, clip=0)  # asked beside other keys that are wrong
    assert "clip: must be above 0" in str(caught.value)
    config = ranges(warmup=3)
    del config["steps"]
    with pytest.raises(ConfigError, match=r"^steps: missing$"):
        check_config(config, Ranges, [rule])


def test_a_rule_may_find_several_things():
    def rule(steps):
        return ["a: missing", "b: missing"] if steps > 2 else []

    check_config(ranges(), Ranges, [rule])
    with pytest.raises(ConfigError, match=r"^2 errors\n  a: missing\n  b: missing$"):
        check_config(ranges(steps=3), Ranges, [rule])


def test_a_recipe_may_have_validators_of_pydantic():
    class Even(Keys):
        n: int
        m: int = 0

        @field_validator("n")
        @classmethod
        def _is_even(cls, n):
            if n % 2:
                raise ValueError(f"must be even, got {n}")
            return n

        @model_validator(mode="after")
        def _is_above(self):
            if self.n <= self.m:
                raise ValueError(f"n: {self.n} must be above m, {self.m}")
            return self

    check_config(OmegaConf.create({"n": 2}), Even)
    with pytest.raises(ConfigError, match=r"^n: must be even, got 3$"):
        check_config(OmegaConf.create({"n": 3}), Even)
    with pytest.raises(ConfigError, match=r"^n: 2 must be above m, 2$"):
        check_config(OmegaConf.create({"n": 2, "m": 2}), Even)


def test_valid_config_passes():
    assert errors_of(VALID) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("note", "DELETE"),
        ("note", None),
        ("clip", 2),
        ("checkpointer", None),
        ("checkpointer.files", ["a"]),
        ("data.limit", None),
        ("optimizer.foreach", None),
        ("weighting", {}),
        ("data", {"_component_": "config_components.make_lenient", "anything": 1}),
        ("data.parts", []),
    ],
)
def test_other_valid_values(path, value):
    if path == "data" and isinstance(value, dict):
        check_config(OmegaConf.create(changed(path, value)), AnyData)
    else:
        assert errors_of(changed(path, value)) == []


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("sed", 3, "sed: unknown key (did you mean 'seed'?)"),
        ("optimizer.learning_rte", 3, "optimizer.learning_rte: unknown key (did you mean 'lr'?)"),
        ("checkpointer.x", 1, "checkpointer.x: unknown key (known: files, folder)"),
        ("weighting.rato", 1, "weighting.rato: unknown key (did you mean 'ratio'?)"),
        ("seed", "DELETE", "seed: missing"),
        ("checkpointer", "DELETE", "checkpointer: missing"),
        ("checkpointer.folder", "DELETE", "checkpointer.folder: missing"),
        ("data.folder", "DELETE", "data.folder: missing"),
        ("seed", 1e3, "seed: must be a whole number, got 1000.0 (write 1000)"),
        ("seed", True, "seed: must be a whole number, got true"),
        ("seed", None, "seed: must be a whole number, got null"),
        ("compile", 1, "compile: must be true or false, got 1"),
        ("device", "tpu", "device: must be one of 'cpu', 'cuda', got 'tpu'"),
        ("names", "x", "names: must be a list, got 'x'"),
        ("names", ["x", 1], "names[1]: must be text, got 1"),
        (
            "clip",
            "1e-5",
            "clip: must be a number, got '1e-5', which is text (write it without quotes)",
        ),
        (
            "optimizer.lr",
            "1e-5",
            "optimizer.lr: must be a number, got '1e-5', which is text (write it without quotes)",
        ),
        ("optimizer.lr", None, "optimizer.lr: must be a number, got null"),
        (
            "optimizer.betas",
            [0.9],
            "optimizer.betas: must be a longer list, got [0.9]",
        ),
        (
            "optimizer.betas",
            [0.9, 0.95, 1],
            "optimizer.betas: must be a list of at most 2, got [0.9, 0.95, 1]",
        ),
        ("data.parts", [1, "x"], "data.parts[1]: must be a whole number, got 'x'"),
        ("checkpointer", "a", "checkpointer: must be a block of keys, got 'a'"),
        ("weighting", None, "weighting: must be a block of keys, got null"),
        ("weighting.mode", "c", "weighting.mode: must be one of 'a', 'b', got 'c'"),
        ("weighting.n", 0.5, "weighting.n: must be a whole number, got 0.5"),
        (
            "note",
            "${nope}",
            "note: '${nope}' does not resolve (Interpolation key 'nope' not found)",
        ),
        ("note", "???", "note: must be given a value, got '???'"),
        ("data.folder", 3, "data.folder: must be text, got 3"),
        (
            "data.folder",
            b"x",
            "data.folder: must be text, a number, a list or keys, got bytes",
        ),
        (
            "data.folder",
            "a\0b",
            "data.folder: 'a\\x00b' holds a character no text may have (NUL, or half a surrogate)",
        ),
        ("seed", 2**63, "seed: a whole number of 64 bits is too large, 63 are used"),
        ("weighting.ratio", float("nan"), "weighting.ratio: must be a number, got nan"),
        ("weighting", {1: 2}, "weighting.1: a key must be text"),
        ("data.limit", "x", "data.limit: must be a whole number, got 'x'"),
        ("data.parts", 3, "data.parts: must be a list, got 3"),
        ("data.tokens", 3, "data.tokens: given by the recipe, leave it out"),
        ("optimizer.params", 3, "optimizer.params: given by the recipe, leave it out"),
        (
            "optimizer._component_",
            "DELETE",
            "optimizer: missing _component_, the dotted path of what to build",
        ),
        ("optimizer._component_", 3, "optimizer._component_: must be a dotted path, got 3"),
        (
            "optimizer._component_",
            "torch.optim.Adamw",
            "optimizer._component_: 'torch.optim.Adamw' does not import: 'torch.optim' has no "
            "'Adamw' (did you mean 'AdamW'?)",
        ),
        (
            "data._component_",
            "config_components.not_callable",
            "data._component_: 'config_components.not_callable' is a int, not callable",
        ),
        (
            "data",
            {"_component_": "config_components.make_lenient"},
            "data._component_: make_lenient has no room for 'tokenizer', given by the recipe",
        ),
        (
            "data",
            {
                "_component_": "config_components.make",
                "folder": {"_component_": "torch.optim.nope"},
            },
            "data.folder._component_: 'torch.optim.nope' does not import: 'torch.optim' has no "
            "'nope'",
        ),
        (
            "data",
            {
                "_component_": "config_components.make",
                "folder": "a",
                "parts": [{"_component_": "torch.optim.SGD", "lrr": 1}],
            },
            "data.parts[0].lrr: unknown key (did you mean 'lr'?)",
        ),
    ],
)
def test_one_mistake_one_error(path, value, error):
    errors = errors_of(changed(path, value))
    assert error in errors
    assert len(errors) == 1


def test_all_errors_come_at_once():
    config = changed("seed", "x") | {"extra": 1}
    del config["lr"]
    with pytest.raises(ConfigError, match="4 errors") as caught:
        check_config(OmegaConf.create(config), Config)
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "optimizer.lr",  # ${lr}
        "extra",
        "lr",
        "seed",
    ]


def test_annotation_that_does_not_evaluate_still_checks_names():
    config = {"data": {"_component_": "config_components.make_in_quotes", "sizes": 1}}
    with pytest.raises(ConfigError, match=r"^data.sizes: unknown key \(did you mean 'size'\?\)$"):
        check_config(OmegaConf.create(config), OnlyData)


def make_odd(
    copy: list["NotDefined"],  # noqa: F821
    _x: int = 1,
    *,
    model_config: Path | None = None,
    sizes: list[int] | int = 1,
):
    raise AssertionError("a check must not call this")


def test_arguments_may_be_called_as_they_like_and_be_of_several_kinds():
    class Odd(Keys):
        odd: Annotated[dict[str, Any], Arguments(make_odd, required=("sizes",))]

    def check(**odd):
        check_config(OmegaConf.create({"odd": odd}), Odd)

    check(copy=[1], _x=2, model_config="a", sizes=[3])
    with pytest.raises(ConfigError) as caught:
        check(cpy=[1], _x="2", model_config=3, sizes=[3, "a"])
    assert str(caught.value).splitlines()[1:] == [
        "  odd.cpy: unknown key (did you mean 'copy'?)",
        "  odd._x: must be a whole number, got '2', which is text (write it without quotes)",
        "  odd.model_config: must be text, got 3",
        "  odd.sizes[1]: must be a whole number, got 'a'",
    ]
    with pytest.raises(ConfigError, match=r"odd.sizes: must be a list or a whole number, got 'a'$"):
        check(copy=[], sizes="a")
    with pytest.raises(ConfigError, match=r"^odd.sizes: missing$"):
        check(copy=[])


def test_unannotated_default_number_rejects_text():
    """torchao's optimizers have no annotations."""
    config = {"optimizer": {"_component_": "torchao.optim.AdamW8bit", "lr": "1e-5"}}
    with pytest.raises(ConfigError, match=r"^optimizer.lr: must be a number, got '1e-5'"):
        check_config(OmegaConf.create(config), OnlyOptimizer)


def test_command_line_overrides_are_checked():
    """As torchtune merges them: 1e-5 is a number, a new key is unknown, None is null."""
    from argparse import Namespace

    from torchtune.config._utils import _merge_yaml_and_cli_args

    def merged(*overrides):
        return _merge_yaml_and_cli_args(Namespace(**copy.deepcopy(VALID)), list(overrides))

    check_config(merged("lr=1e-5", "checkpointer=None", "~note"), Config)
    with pytest.raises(ConfigError, match=r"^optimizer.lrr: unknown key \(did you mean 'lr'\?\)$"):
        check_config(merged("optimizer.lrr=1"), Config)


# ---------------------------------------------------------------- random mutations


def leaf_paths(node: dict, prefix: str = ""):
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from leaf_paths(value, f"{prefix}{key}.")


PATHS = [p for p in leaf_paths(VALID) if not p.endswith("_component_")]
REFERRED = {"lr", "device"}  # other keys are interpolated from these and fail with them
NOT_REQUIRED = {"note", "weighting.name", "weighting.mode", "weighting.ratio", "data.parts"}
NOT_REQUIRED |= {"optimizer.lr", "optimizer.betas", "optimizer.weight_decay"}


@given(path=st.sampled_from(sorted(set(PATHS) - REFERRED)), position=st.integers(0, 20))
@settings(max_examples=60, deadline=None, database=None)
def test_any_typo_is_one_error_at_its_place(path, position):
    parent, _, key = path.rpartition(".")
    typo = key[: position % len(key)] + "q" + key[position % len(key) :]
    config = changed(path)
    node = config
    for part in filter(None, parent.split(".")):
        node = node[part]
    node[typo] = 1
    (error,) = errors_of(config)
    where = f"{parent}.{typo}" if parent else typo
    assert error.startswith(f"{where}: unknown key (")


@pytest.mark.parametrize("path", PATHS)
def test_any_deletion_of_a_required_key_is_one_error(path):
    errors = [e for e in errors_of(changed(path)) if "does not resolve" not in e]
    assert errors == ([] if path in NOT_REQUIRED else [f"{path}: missing"])


@pytest.mark.parametrize("path", sorted(set(PATHS) - REFERRED))
def test_any_wrong_type_is_one_error(path):
    is_block = path in ("checkpointer", "weighting", "optimizer", "data")
    (error,) = errors_of(changed(path, 5 if is_block else {"unexpected": 1}))
    assert error.startswith(f"{path}: must be ")


def test_a_component_has_to_make_what_is_needed():
    check_config(OmegaConf.create({"optimizer": VALID["optimizer"] | {"lr": 1}}), OnlyOptimizer)
    wrong = {"optimizer": {"_component_": "wmtp_modules.data.rows_dataset", "source": "x"}}
    with pytest.raises(ConfigError, match=r"rows_dataset' makes a Dataset, not a Optimizer$"):
        check_config(OmegaConf.create(wrong), OnlyOptimizer)
    unsaid = {"optimizer": {"_component_": "config_components.make_lenient"}}
    check_config(OmegaConf.create(unsaid), OnlyMade)
