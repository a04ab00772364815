"""What is secret stays out of what a run writes, wherever it stands in a config or a text."""

import pytest
from omegaconf import OmegaConf

from wmtp_modules.config.secrets import hidden, without_secrets
from wmtp_modules.run.metric_logging import MLflowLogger
from wmtp_modules.run.plan import finished, write_summary
from wmtp_modules.run.resume import kept
from wmtp_modules.run.start import exit_with_message

SECRET = "open-sesame-42"


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:{SECRET}@host:5000/mlflow",
        f"postgresql+psycopg2://me:{SECRET}@host/db",
        f"mysql://me:open@{SECRET}@host/db",  # not escaped
        f"https://{SECRET}@host/repo.git",
        f"azure://host/container?sig={SECRET}&x=1",
        f"mssql+pyodbc:///?odbc_connect=Driver=x;UID=me;PWD={SECRET};Server=y",
        f"tune run --config x metric_logger.api_key={SECRET}",
        f"cannot open {SECRET} as it is no address",
    ],
)
def test_a_text_is_shown_without_its_secret(text, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    assert SECRET not in hidden(text)
    assert "***" in hidden(text)


@pytest.mark.parametrize(
    "text", ["sqlite:///runs/mlflow.db", "a@b", "file://x y@z", "max_tokens=3", "https://host/a@b"]
)
def test_what_is_no_secret_stays(text):
    assert hidden(text) == text


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"),
        *("MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "DB_PASSWD"),
    ],
)
def test_a_secret_of_the_environment_is_hidden_wherever_it_stands(name, monkeypatch):
    monkeypatch.setenv(name, SECRET)
    cfg = OmegaConf.create({"a": [{"b": f"x ${{oc.env:{name}}} y"}], "c": SECRET})
    assert kept(cfg) == {"a": [{"b": "x *** y"}], "c": "***"}


def test_keys_that_name_a_secret_are_hidden_and_others_are_not():
    given = {"api_key": SECRET, "hub": {"token": SECRET, "password": ""}, "seed": 1}
    given |= {"tokenizer": {"path": "t"}, "batch_tokens": 64, "max_new_tokens": "64", "keys": "k"}
    assert without_secrets(given) == given | {
        "api_key": "***",
        "hub": {"token": "***", "password": ""},
    }


def test_an_error_is_told_without_it(capsys):
    with pytest.raises(SystemExit) as left, exit_with_message(ValueError):
        raise ValueError(f"https://me:{SECRET}@host does not answer")
    assert left.value.code == "ValueError: https://***@host does not answer"


def test_a_config_with_a_secret_is_found_finished(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{SECRET}@host")
    logger = {"tracking_uri": "${oc.env:MLFLOW_TRACKING_URI}"}
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "metric_logger": logger, "x": 1})
    OmegaConf.save(OmegaConf.create(kept(cfg)), tmp_path / "config.yaml")
    write_summary(tmp_path, {"steps": 1})
    assert SECRET not in (tmp_path / "config.yaml").read_text()
    assert finished(cfg) == {"steps": 1}
    assert finished(OmegaConf.merge(cfg, {"x": 2})) is None


def test_mlflow_keeps_none(tmp_path):
    logger = MLflowLogger("x", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    uri = f"https://me:{SECRET}@host"
    logger.log_config(OmegaConf.create({"metric_logger": {"tracking_uri": uri, "token": SECRET}}))
    logger.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "config.yaml" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_the_shells_working_directory_is_no_password(monkeypatch, tmp_path):
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setenv("DB_PWD", SECRET)
    assert hidden(f"cannot open {tmp_path}/train.jsonl") == f"cannot open {tmp_path}/train.jsonl"
    assert hidden(f"x {SECRET}") == "x ***"
