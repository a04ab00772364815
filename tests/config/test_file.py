"""A file that is no config, and an argument that is no override, are one sentence each."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from wmtp_modules.config.check import ConfigError
from wmtp_modules.config.file import load_config, read_config


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
        ("--seed=1", r"^--seed=1 is no option of a recipe: give --config FILE"),
    ],
)
def test_what_is_no_override(file, override, match):
    with pytest.raises(ConfigError, match=match) as caught:
        read_config(["--config", str(file), override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"seed: 1\n\tx: 2", r"is not the YAML of a config, mend it there \(.*line 2"),
        (b"seed: 1\x00", "mend it there"),
        (b"\xff\xfe\x80", "mend it there"),
        (b"seed: 1\nseed: 2", "found duplicate key seed"),
        (b"a: !!python/object/apply:os.system [exit]", "could not determine a constructor"),
        (b"a: &x [*x]", "mend it there"),
        (b"a: " + b"[" * 400 + b"]" * 400, "is nested too deeply for a config"),
        (b"a: " + b"9" * 5000, "mend it there"),
        (b"null: 1", "mend it there"),
        (b"3: 1", "the key 3 is no text"),
        (b"- 1", "is a list, not the config of a run"),
        (b"a: ${b", "mend it there"),
        (b"a: !!int ''", "a value of it is not what its !!tag says"),
    ],
)
def test_what_is_no_config(file, content, match):
    file.write_bytes(content)
    for read in (load_config, lambda path: read_config(["--config", str(path)])):
        with pytest.raises(ConfigError, match=match) as caught:
            read(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a config: Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read as a config: No such file"):
        load_config(tmp_path / "nope.yaml")


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
