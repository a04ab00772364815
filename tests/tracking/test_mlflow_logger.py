"""MLflow's logger as a config names it, and by hand: a real SQLite store, errors, resuming."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from wmtp_modules.run.metric_logging import MLflowLogger, code_version

pytestmark = pytest.mark.usefixtures("followers")


@pytest.fixture(scope="module")
def store(mlflow_tables, tmp_path_factory):
    """Folder and URI of one SQLite store."""
    folder = tmp_path_factory.mktemp("mlflow with a space")
    shutil.copy(mlflow_tables, folder / "mlflow.db")
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
        f"run {logger.run_id} in {uri} (mlflow ui --backend-store-uri '{uri}')"  # to be copied
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
    first.close("FINISHED")  # counts for nothing
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


def test_environment_names_the_store_and_telemetry_is_off_unless_it_says_otherwise(
    store, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store[1])
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("DO_NOT_TRACK", "false")
    logger = MLflowLogger("figures", "sqlite:////nowhere/mlflow.db")
    assert logger.tracking_uri == store[1]
    logger.close()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["DO_NOT_TRACK"] == "false"


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
