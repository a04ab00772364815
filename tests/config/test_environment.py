"""Environments below a recipe's YAML, and which variables may stand in what is sent somewhere."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from wmtp_modules.config import environment
from wmtp_modules.config.check import ConfigError
from wmtp_modules.config.environment import FOR_URLS, file_of, of_required, refuse_variables
from wmtp_modules.config.file import read_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(recipe, *overrides): the config of a YAML with these keys."""
    monkeypatch.delenv("WMTP_ENVIRONMENT", raising=False)
    for name in FOR_URLS:
        if name.startswith("WMTP_"):
            monkeypatch.delenv(name, raising=False)

    def read(recipe, *overrides):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return read_config(["--config", str(file), *overrides])

    return read


def test_local_is_the_default_and_needs_no_server(read):
    cfg = read({"seed": 1, "output_dir": "${oc.select:storage.root,runs}/x"})
    assert (cfg.tracking.uri, cfg.output_dir) == ("sqlite:///runs/mlflow.db", "runs/x")
    assert "environment" not in cfg


def test_the_recipe_goes_before_the_environment_and_the_command_line_before_both(read, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "storage: {root: s3://b/me, cache: /c}\ntracking: {uri: http://h, required: true}"
    )
    recipe = {"tracking": {"uri": "http://recipe"}, "output_dir": "${storage.root}/x"}
    cfg = read(recipe, f"environment={own}", "storage.cache=/other")
    assert cfg.tracking == {"uri": "http://recipe", "required": True}
    assert (cfg.storage.cache, cfg.output_dir) == ("/other", "s3://b/me/x")


def test_the_variable_chooses_and_the_command_line_goes_before_it(read, monkeypatch):
    monkeypatch.setenv("WMTP_ENVIRONMENT", "cluster")
    monkeypatch.setenv("WMTP_STORAGE_ROOT", "s3://b/w")
    monkeypatch.setenv("WMTP_TRACKING_URI", "http://mlflow:5000")
    cfg = read({"seed": 1})
    assert (cfg.storage.root, cfg.tracking.uri) == ("s3://b/w", "http://mlflow:5000")
    assert cfg.storage.endpoint is None
    refuse_variables(cfg)
    assert read({"seed": 1}, "environment=local").tracking.uri.startswith("sqlite")


def test_a_folder_may_have_environments_of_its_own(read, tmp_path, monkeypatch):
    """Beside those that came with the library; one of the same name goes before."""
    monkeypatch.chdir(tmp_path)
    assert read({"seed": 1}).storage.root == "runs"
    own = tmp_path / environment.FOLDER
    own.mkdir(parents=True)
    (own / "local.yaml").write_text("storage: {root: mine}")
    (own / "lab.yaml").write_text("storage: {root: labs}")
    assert read({"seed": 1}).storage.root == "mine"
    assert read({"seed": 1}, "environment=lab").storage.root == "labs"
    assert file_of("cluster").name == "cluster.yaml"


def test_an_environment_that_is_none(read, tmp_path):
    with pytest.raises(ConfigError, match=r"environment=clutser: .* has cluster, local"):
        read({}, "environment=clutser")
    with pytest.raises(ConfigError, match=r"nope.yaml cannot be read"):
        read({}, f"environment={tmp_path}/nope.yaml")
    (tmp_path / "more.yaml").write_text("max_steps: 3")
    with pytest.raises(ConfigError, match=r"max_steps: an environment has the blocks"):
        read({}, f"environment={tmp_path}/more.yaml")


def test_a_required_run_goes_to_the_same_place_under_its_own_name():
    tracking = {"uri": "http://h", "run_name": "x", "required": True}
    cfg = OmegaConf.create({"storage": {"root": "s3://b"}, "tracking": tracking})
    assert of_required(cfg) == {
        "storage": {"root": "s3://b"},
        "tracking": {"uri": "http://h", "required": True},
    }
    assert of_required(OmegaConf.create({})) == {}


def test_no_shipped_recipe_names_a_server_or_a_store():
    for path in ROOT.glob("configs/*/*.yaml"):
        if path.parent.name != "environments":
            text = path.read_text()
            assert not any(word in text for word in ("tracking_uri", "uri:", "s3://", ".db")), path


@pytest.mark.parametrize(
    "config",
    [
        {"tracking": {"uri": "http://${oc.env:PLANTED}@host"}},
        {"tracking": {"uri": "${oc.env:PLANTED}"}},
        {"tracking": {"artifact_root": "${oc.env:NOT_SET,${oc.env:PLANTED}}"}},
        {"a": "${oc.env:PLANTED}", "b": "${a}", "storage": {"root": "s3://bucket/${b}"}},
        {"a": "${oc.env:PLANTED}", "dataset": {"source": "s3://bucket/${a}.jsonl"}},
        {"n": "PLANTED", "output_dir": "s3://bucket/${oc.env:${n}}"},
        {"storage": {"endpoint": "http://host/${oc.decode:${oc.env:PLANTED}}"}},
        {"metric_logger": {"tracking_uri": "${oc.env:PLANTED}"}},
        {"requires": ["hf://a/${oc.env:PLANTED}"]},
    ],
)
def test_no_config_sends_a_variable_somewhere(config, monkeypatch):
    monkeypatch.setenv("PLANTED", "planted-secret")
    monkeypatch.delenv("WMTP_URL_VARIABLES", raising=False)
    with pytest.raises(ConfigError, match=r"WMTP_URL_VARIABLES=(PLANTED|NOT_SET)") as caught:
        refuse_variables(OmegaConf.create(config))
    assert "planted-secret" not in str(caught.value)
    monkeypatch.setenv("WMTP_URL_VARIABLES", "OTHER, PLANTED,NOT_SET")
    refuse_variables(OmegaConf.create(config))
    assert OmegaConf.create({"x": "${oc.env:PLANTED}"}).x == "planted-secret"


def test_what_is_sent_nowhere_may_stand(monkeypatch):
    monkeypatch.setenv("PLANTED", "planted-secret")
    refuse_variables(OmegaConf.create({"metric_logger": {"api_key": "${oc.env:PLANTED}"}}))
    refuse_variables(OmegaConf.create({"tracking": {"uri": "sqlite:////${oc.env:HOME}/x.db"}}))
