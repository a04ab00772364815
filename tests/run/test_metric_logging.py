"""Metric loggers: lines of JSON that survive crashes and resumes, and a real MLflow store."""

import json
import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from wmtp_modules.run.metric_logging import JSONLLogger, MLflowLogger, code_version


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------- JSONL


def test_one_line_per_step_on_disk_at_once(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    logger = JSONLLogger(path)
    logger.log_dict({"loss": torch.tensor(1.5), "count": 3}, step=10)
    assert read_lines(path) == [{"step": 10, "loss": 1.5, "count": 3}]
    logger.log_dict({"val_loss": 2.0}, step=10)
    logger.log("loss", 1.25, step=20)
    assert read_lines(path) == [
        {"step": 10, "loss": 1.5, "count": 3, "val_loss": 2.0},
        {"step": 20, "loss": 1.25},
    ]
    logger.close()


def test_a_rewritten_line_may_become_shorter(tmp_path):
    logger = JSONLLogger(tmp_path / "metrics.jsonl")
    logger.log("loss", 1.23456789, step=1)
    logger.log("loss", 2, step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("-inf"))])
def test_non_finite_numbers_stay_valid_json(tmp_path, value):
    JSONLLogger(tmp_path / "metrics.jsonl").log("loss", value, step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JSONLLogger(path)
    for step in (10, 20, 30):
        logger.log("loss", step / 10, step)
    logger.close()
    with open(path, "a") as file:
        file.write('{"step": 40, "lo')
    logger = JSONLLogger(path, resume_step=20)
    logger.log("val_loss", 9.0, step=20)
    logger.log("loss", 3.5, step=30)
    assert read_lines(path) == [
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 2.0, "val_loss": 9.0},
        {"step": 30, "loss": 3.5},
    ]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_resume_of_damaged_bytes_names_the_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": \xff}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not a JSON object with a step"):
        JSONLLogger(tmp_path / "metrics.jsonl", resume_step=3)


def test_resume_step_0_starts_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JSONLLogger(path).log("val_loss", 1.0, step=0)
    JSONLLogger(path, resume_step=0).log("val_loss", 2.0, step=0)
    assert read_lines(path) == [{"step": 0, "val_loss": 2.0}]


@pytest.mark.parametrize("line", ["not json", '{"loss": 1}', "3"])
def test_resume_of_a_foreign_file_is_refused(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is not a JSON object with a step"):
        JSONLLogger(path, resume_step=5)
    assert path.read_text().endswith(line + "\n")


# ------------------------------------------------------------------------ MLflow


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Folder and URI of one SQLite store: making its tables takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow") / "made" / "on demand"
    return folder, f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def client(store):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store[1])


def test_a_run_can_be_read_back(store, tmp_path):
    folder, uri = store
    logger = MLflowLogger("figures", uri, run_name="first")
    config = OmegaConf.create({"a": {"lr": 1e-5, "names": ["x", "y"]}, "b": "${a.lr}"})
    config.many = {f"key_{i}": i for i in range(150)}  # more than one call takes
    logger.log_config(config)
    logger.log_dict({"loss": torch.tensor(2.0), "ess": 0.5}, step=1)
    logger.log_dict({"loss": 1.0, "bad": float("nan")}, step=2)
    (tmp_path / "curves.png").write_bytes(b"picture")
    logger.log_artifact(tmp_path / "curves.png")
    assert logger.location == (
        f"run {logger.run_id} in {uri} (mlflow ui --backend-store-uri {uri})"
    )
    logger.close()

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(logger.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert client.get_experiment(run.info.experiment_id).name == "figures"
    assert run.data.params == {"a.lr": "1e-05", "a.names": "['x', 'y']", "b": "1e-05"} | {
        f"many.key_{i}": str(i) for i in range(150)
    }
    history = client.get_metric_history(logger.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 2.0), (2, 1.0)]
    assert code_version().items() <= run.data.tags.items()
    assert {f.path for f in client.list_artifacts(logger.run_id)} == {"config.yaml", "curves.png"}
    saved = folder / "mlflow_artifacts" / logger.run_id / "artifacts" / "config.yaml"
    assert OmegaConf.load(saved) == OmegaConf.create(OmegaConf.to_container(config, resolve=True))


def test_a_resumed_run_goes_on_in_place(store, client):
    _, uri = store
    first = MLflowLogger("resume", uri)
    first.log_config(OmegaConf.create({"max_steps": 1}))
    first.log("loss", 2.0, step=1)
    first.close("KILLED")
    assert client.get_run(first.run_id).info.status == "KILLED"

    second = MLflowLogger("resume", uri, run_id=first.run_id)
    assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    second.log_config(OmegaConf.create({"max_steps": 2, "added": True}))
    second.log("loss", 1.0, step=2)
    second.close()
    run = client.get_run(first.run_id)
    assert run.data.params == {"max_steps": "1", "added": "True"}
    assert [m.step for m in client.get_metric_history(first.run_id, "loss")] == [1, 2]
    experiment = client.get_experiment_by_name("resume")
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_close_counts_once(store, client):
    logger = MLflowLogger("close", store[1])
    logger.close("FAILED")
    logger.close("FINISHED")
    assert client.get_run(logger.run_id).info.status == "FAILED"


def test_unknown_run_id(store):
    with pytest.raises(ValueError, match=r"MLflow run 0123 is not in sqlite:///"):
        MLflowLogger("resume", store[1], run_id="0123")


def test_no_store_is_an_error():
    with pytest.raises(ValueError, match=r"set metric_logger.tracking_uri"):
        MLflowLogger("figures")


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        ("nonsense://x", r"store nonsense://x cannot be used \(.*MLFLOW_TRACKING_URI"),
        ("mysql+foo://me:secret@host/y", r"store mysql\+foo://\*\*\*@host/y cannot be used"),
        ("sqlite:///", "is a folder: name a file in it"),
        ("sqlite:////proc/none/x.db", "cannot be used"),
    ],
)
def test_a_store_that_is_none(uri, match, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match=match) as caught:
        MLflowLogger("experiment")
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_store(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"something else entirely" * 100)
    with pytest.raises(ValueError, match=r"mlflow.db cannot be used \(.*not a database"):
        MLflowLogger("experiment", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")


def test_environment_names_the_store(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store[1])
    logger = MLflowLogger("figures", "sqlite:////nowhere/mlflow.db")
    assert logger.tracking_uri == store[1]
    logger.close()


def test_telemetry_is_off_unless_the_user_says_otherwise(store, monkeypatch):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("DO_NOT_TRACK", "false")
    MLflowLogger("figures", store[1]).close()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["DO_NOT_TRACK"] == "false"


def test_code_version_of_a_git_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert not {"git.dirty", "mlflow.source.git.commit"} & code_version().keys()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    tags = code_version()
    assert (tags["mlflow.source.git.commit"], tags["git.dirty"]) == (head, "false")
    assert tags["version.torchtune"] == "0.6.1"
    (tmp_path / "changed").touch()
    assert code_version()["git.dirty"] == "true"


@pytest.mark.nightly
def test_two_crashing_runs_make_one_store_at_once(tmp_path):
    """Neither trips over the other's half-made tables, and both end as FAILED."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    code = (
        "from wmtp_modules.run.metric_logging import MLflowLogger\n"
        f"print(MLflowLogger('both', {uri!r}).run_id, flush=True)\n"
        "raise RuntimeError('a recipe that fails')"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert all("a recipe that fails" in err for _, err in outputs), outputs
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("both").experiment_id])
    assert {run.info.run_id for run in runs} == {out.strip() for out, _ in outputs}
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]
