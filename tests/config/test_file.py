"""A file that is no config, and an argument that is no override, are one sentence each."""

from typing import Annotated, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from torchtune import config as torchtune_config

from wmtp_modules.config.check import Component, ConfigError, Keys, check_config
from wmtp_modules.config.components import MOVED, locate
from wmtp_modules.config.file import load_config, read_config
from wmtp_modules.run.metric_logging import JSONLLogger


class Config(Keys):
    logger: Annotated[dict[str, Any], Component()]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\nmodel:\n  _component_: a.b\n  width: 2\nname: ${seed}\n")
    return path


def test_overrides_are_merged(file):
    config = read_config(["seed=2", "--config", str(file), "model.width=1e-3", "~name"])
    assert config == {"seed": 2, "model": {"_component_": "a.b", "width": 0.001}}
    config = read_config([f"--config={file}", "model=c.d", "seed=None"])
    assert config.model == {"_component_": "c.d", "width": 2}
    assert config.seed is None
    assert OmegaConf.to_container(config)["name"] == "${seed}"


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("seed", r"the overrides seed cannot be merged into .*run.yaml \(.*key=value"),
        ("~nope", "Could not find key nope"),
        ("seed=[1", "cannot be merged"),
        ("seed=${", "cannot be merged"),
        ("--seed=1", r"^--seed=1 is not an option of a recipe: give --config FILE"),
    ],
)
def test_what_is_no_override(file, override, match):
    with pytest.raises(ConfigError, match=match) as caught:
        read_config(["--config", str(file), override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"seed: 1\n\tx: 2", r"is not valid YAML, correct it there \(.*line 2"),
        (b"seed: 1\x00", "correct it there"),
        (b"\xff\xfe\x80", "correct it there"),
        (b"seed: 1\nseed: 2", "found duplicate key seed"),
        (b"a: !!python/object/apply:os.system [exit]", "could not determine a constructor"),
        (b"a: &x [*x]", "correct it there"),
        (b"a: " + b"[" * 400 + b"]" * 400, "is nested too deeply for a config"),
        (b"a: " + b"9" * 5000, "correct it there"),
        (b"null: 1", "correct it there"),
        (b"3: 1", "the key 3 is not text"),
        (b"- 1", "is a list, not the config of a run"),
        (b"a: ${b", "correct it there"),
        (b"a: !!int ''", "a value is not what its !!tag says"),
    ],
)
def test_what_is_no_config(file, content, match):
    file.write_bytes(content)
    for read in (load_config, lambda path: read_config(["--config", str(path)])):
        with pytest.raises(ConfigError, match=match) as caught:
            read(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_config(file):
    config = load_config(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_config(file) == config
    assert read_config(["--config", str(file), "seed=2"]).seed == 2


def test_what_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a config: Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read as a config: No such file"):
        load_config(tmp_path / "nope.yaml")


OLD_LOGGER = "wmtp_modules.training.metric_logging.JSONLLogger"


@pytest.mark.parametrize("overrides", [[], ["logger._component_=" + OLD_LOGGER]])
def test_a_logger_under_its_old_name_is_checked_and_made(file, tmp_path, overrides):
    component = "a.b" if overrides else OLD_LOGGER
    file.write_text(f"logger:\n  _component_: {component}\n  path: {tmp_path / 'metrics.jsonl'}\n")
    cfg = read_config(["--config", str(file), *overrides])
    check_config(cfg, Config)
    logger = torchtune_config.instantiate(cfg.logger)
    assert type(logger) is JSONLLogger
    logger.close()


def test_an_override_of_a_whole_component_by_its_old_name(file):
    cfg = read_config(["--config", str(file), "model=wmtp_modules.quickstart.prepare_stdlib"])
    assert cfg.model["_component_"] == "wmtp_modules.quickstarts.stdlib.prepare_stdlib"


def test_only_components_are_renamed_wherever_they_stand(file):
    file.write_text(
        "a: [{_component_: wmtp_modules.quickstart_eval.prepare_functions}, '???', null, '${b}']\n"
        "b: {_component_: '${c}', d: wmtp_modules.quickstart.prepare_stdlib}\n"
        "c: wmtp_modules.quickstarts.stdlib.prepare_stdlib\n_component_: ???\n"
    )
    assert OmegaConf.to_container(load_config(file)) == {
        "a": [
            {"_component_": "wmtp_modules.quickstarts.functions.prepare_functions"},
            *("???", None, "${b}"),
        ],
        "b": {"_component_": "${c}", "d": "wmtp_modules.quickstart.prepare_stdlib"},
        "c": "wmtp_modules.quickstarts.stdlib.prepare_stdlib",
        "_component_": "???",
    }


@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("quickstart", "prepare_stdlib"),
        ("quickstart_eval", "prepare_functions"),
        ("training.metric_logging", "MLflowLogger"),
    ],
)
def test_what_has_moved_is_there(old, name):
    assert locate(f"{MOVED['wmtp_modules.' + old]}.{name}").__name__ == name


YAML_BITS = ("a", ": ", "\n", "- ", "[", "]", "{", "}", "${", "&x ", "*x", "!!int ", "'", "\t")


@given(st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(YAML_BITS)).map("".join)))
@settings(
    max_examples=300,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_bytes_are_a_config_or_one_sentence(tmp_path, content):
    path = tmp_path / "any.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = ""
    try:
        assert isinstance(load_config(path), DictConfig)
    except ConfigError as error:
        said = str(error)
    assert not said or ("any.yaml" in said and "\n" not in said)
