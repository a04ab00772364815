"""What is secret stays out of what a run writes, wherever it stands in a config or a text."""

import logging
import sys

import pytest
from omegaconf import OmegaConf

from wmtp_modules.config.secrets import guard_output, hidden, without_secrets
from wmtp_modules.run import storing
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
        f"https://me:p/{SECRET}@host/mlflow",  # a slash in a password, not escaped
        f"https://me:p@/{SECRET}@host/mlflow",
        f"https://host/x?password={SECRET}",
        f"https://host/x?a=b&token={SECRET}&c=d",
        f"https://host/x?X-Amz-Signature={SECRET}&X-Amz-Date=1",
        f"connect(password='{SECRET}')",
        f"Authorization: Bearer {SECRET}",
    ],
)
def test_a_text_is_shown_without_its_secret(text, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    assert SECRET not in hidden(text)
    assert "***" in hidden(text)


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:///runs/mlflow.db",
        "a@b",
        "file://x y@z",
        "max_tokens=3",
        "https://host/a@b",
        "hf://org/name@main",
    ],
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


def test_a_value_is_hidden_wherever_it_stands_that_a_config_had_under_such_a_name(monkeypatch):
    monkeypatch.setenv("HARMLESS", "open/sesame 43")
    cfg = {"logger": {"api_key": "${oc.env:HARMLESS}"}, "uri": "http://me:ali+baba/44@host"}
    cfg |= {"pin": {"password": 12345678}, "output_dir": "runs/x"}
    storing.localized(OmegaConf.create(cfg))
    for text in ("open/sesame 43", "open%2Fsesame%2043", "open%2Fsesame+43", "ali+baba/44"):
        assert hidden(f"cannot use {text}!") == "cannot use ***!"
    assert hidden("12345678") == "***"
    assert kept(OmegaConf.create(cfg))["pin"] == {"password": "***"}


def test_shapes_of_tokens_are_known():
    for token in ("hf_" + "aB3" * 10, "AKIA" + "ABCD" * 4, "ASIA" + "ABC2" * 4):
        assert hidden(f"refused {token}.") == "refused ***."


def test_logs_and_tracebacks(monkeypatch, capsys, caplog):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    made = logging.getLogRecordFactory()
    try:
        guard_output()
        logging.getLogger("x").warning("cannot reach %s", f"http://me:{SECRET}@host")
        try:
            raise RuntimeError(f"http://me:{SECRET}@host")
        except RuntimeError as error:
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        logging.setLogRecordFactory(made)
    assert caplog.messages == ["cannot reach http://***@host"]
    told = capsys.readouterr().err
    assert "RuntimeError: http://***@host" in told
    assert SECRET not in told


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
