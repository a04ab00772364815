"""The servers of docker/compose.yaml, from its own lines and without Docker, and a run in them."""

import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import yaml

from wmtp_modules.storage.store import gather, put

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"
KEYS = {"AWS_ACCESS_KEY_ID": "chosen-key-id", "AWS_SECRET_ACCESS_KEY": "chosen-secret-key"}
pytestmark = pytest.mark.slow


def interpolated(text: str) -> str:
    """${NAME}, ${NAME:-default} and ${NAME:?told}, as Compose has them."""
    return re.sub(r"\$\{(\w+)(?::[-?]([^}]*))?\}", lambda m: KEYS.get(m[1]) or (m[2] or ""), text)


@pytest.fixture
def services():
    return yaml.safe_load(interpolated(COMPOSE.read_text()))["services"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < end, "it does not listen"
        time.sleep(0.05)


@pytest.fixture
def store(services, tmp_path):
    """The service ``store``: its URL. Its image runs rclone with the command that stands there."""
    service, port = services["store"], free_port()
    bucket = tmp_path / service["volumes"][0].split(":")[1].lstrip("/")
    bucket.mkdir(parents=True)
    command = [
        {":9000": f"127.0.0.1:{port}", "/srv": str(tmp_path / "srv")}.get(one, one)
        for one in shlex.split(service["command"])
    ]
    assert str(port) in " ".join(command)
    assert str(tmp_path) in " ".join(command)
    program = Path(sys.executable).with_name("rclone")
    process = subprocess.Popen(
        [program, *command],
        env={**os.environ, **service["environment"]},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def mlflow_command(service, folder: Path, port: int) -> list[str]:
    command = service["command"].replace("/workspace/runs", str(folder))
    command = command.replace("0.0.0.0", "127.0.0.1").replace("--port 5000", f"--port {port}")
    return shlex.split(command)


def trainer_environment(services, store: str, tracking: str, folder: Path) -> dict[str, str]:
    """What the service ``trainer`` has, with these servers in the place of those."""
    told = dict(services["trainer"]["environment"])
    told["WMTP_STORAGE_ENDPOINT"], told["WMTP_TRACKING_URI"] = store, tracking
    told["WMTP_STORAGE_CACHE"] = str(folder / "cache")
    return told


@pytest.fixture
def mlflow_service(services, forks, mlflow_tables, tmp_path, monkeypatch):
    """The service ``mlflow``, its URL: MLflow's own command reads the line, and its application is
    forked with what the command makes of it. (The nightly test below starts the command itself.)
    """
    import mlflow.server
    from mlflow.cli import server as command

    folder, port, told = tmp_path / "mlflow", free_port(), {}
    folder.mkdir()
    shutil.copy(mlflow_tables, folder / "mlflow.db")
    monkeypatch.setattr(mlflow.server, "_run_server", lambda **options: told.update(options))
    program, name, *options = mlflow_command(services["mlflow"], folder, port)
    assert (program, name) == ("mlflow", "server")
    with mock.patch.dict(os.environ):  # in which the command leaves what its workers shall know
        command.main(options, standalone_mode=False)
    assert (told["host"], told["port"]) == ("127.0.0.1", port)
    env = {
        "_MLFLOW_SERVER_FILE_STORE": told["file_store_path"],
        "_MLFLOW_SERVER_ARTIFACT_ROOT": told["default_artifact_root"],
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": told["artifacts_destination"],
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": str(told["serve_artifacts"]).lower(),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    started = forks.start([ROOT / "tests" / "mlflow_server.py", port], env=env, timeout=900)
    while True:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert started.poll() == [None], started.stderr[-2000:]
        time.sleep(0.01)
    return f"http://127.0.0.1:{port}"


def local_config(config, tmp_path, tiny_tokenizer_path, **changes):
    """Of the fixture's run, what comes from the environment is left to it."""
    text = Path(re.__file__).read_text()
    rows = [json.dumps({"text": text[i : i + 60]}) for i in range(0, 6000, 60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    file = config(**changes)
    cfg = yaml.safe_load(file.read_text())
    del cfg["storage"], cfg["metric_logger"]
    cfg["output_dir"] = "${oc.select:storage.root,runs}/run"
    cfg["tokenizer"]["path"] = str(tiny_tokenizer_path)
    for part in ("dataset", "dataset_val"):
        cfg[part]["source"] = str(tmp_path / "rows.jsonl")
    file.write_text(yaml.safe_dump(cfg))
    return file


def assert_logged(tmp_path: Path, uri: str, last_step: int) -> None:
    """The store's folder has the run, and the server its figures."""
    from mlflow import MlflowClient

    run = tmp_path / "srv" / "wmtp" / "runs" / "run"
    assert {"config.yaml", "metrics.jsonl", "summary.json", "run.html"} <= {
        one.name for one in run.iterdir()
    }
    assert (run / "best" / "params.json").exists()
    assert not list(run.rglob(".incomplete"))
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in (run / "config.yaml").read_text()
    run_id = re.search(r"run (\w{32}) in http", (run / "summary.json").read_text())[1]
    client = MlflowClient(uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    steps = [one.step for one in client.get_metric_history(run_id, "loss")]
    assert steps == list(range(1, last_step + 1))


def test_a_file_goes_there_and_comes_back_in_parts(
    services, store, mlflow_service, tmp_path, monkeypatch
):
    """With what the trainer has; and the other server takes a figure."""
    from mlflow import MlflowClient

    for name, value in trainer_environment(services, store, mlflow_service, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store)
    file, url = tmp_path / "file", "s3://wmtp/runs/file"
    file.write_bytes(os.urandom(2**20) * 12)
    digest = gather(url, put(file, url), tmp_path / "back" / "part")
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    client = MlflowClient(mlflow_service)
    run_id = client.create_run(client.create_experiment("compose")).info.run_id
    client.log_metric(run_id, "loss", 1.5)
    assert client.get_run(run_id).data.metrics == {"loss": 1.5}


@pytest.mark.nightly
def test_a_run_in_both_and_on_an_emptied_disk(
    services, store, mlflow_service, forks, config, tmp_path, tiny_tokenizer_path, monkeypatch
):
    """As the trainer has it: it logs there, and a trainer without a disk of its own goes on."""
    monkeypatch.delenv("AWS_ENDPOINT_URL")  # of the fixture that makes the config
    for name, value in trainer_environment(services, store, mlflow_service, tmp_path).items():
        monkeypatch.setenv(name, value)
    file = local_config(config, tmp_path, tiny_tokenizer_path, max_steps=2)
    command = ["recipes/rho1_wmtp_distributed.py", "--config", file, "resume_from_checkpoint=true"]
    first = forks.run(command)
    assert first.wait() == [0], first.stderr
    assert "not in s3" not in first.stderr
    assert_logged(tmp_path, mlflow_service, 2)
    shutil.rmtree(tmp_path / "cache")
    second = forks.run([*command, "max_steps=4"])
    assert second.wait() == [0], second.stderr
    assert "Resumed" in second.stdout + second.stderr
    assert_logged(tmp_path, mlflow_service, 4)


def test_mlflow_lets_in_who_asks_by_the_names_of_compose(services):
    """It answers 403 to other names: a service that is called by another one would be shut out."""
    from mlflow.server.security_utils import is_allowed_host_header

    words = shlex.split(services["mlflow"]["command"])
    allowed = words[words.index("--allowed-hosts") + 1].split(",")
    asked = re.fullmatch(r"http://(.+)", services["trainer"]["environment"]["WMTP_TRACKING_URI"])[1]
    published = f"localhost:{services['mlflow']['ports'][0].split(':')[-1]}"
    assert asked.split(":")[0] in services
    for host in (asked, published):
        assert is_allowed_host_header(allowed, host), host
    assert not is_allowed_host_header(allowed, "example.com")


@pytest.mark.nightly
def test_the_servers_own_commands_and_the_trainers(services, store, tmp_path, monkeypatch):
    """All three services as real processes, the quickstart cut to five steps."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    for name, value in trainer_environment(services, store, uri, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "mlflow").mkdir()
    programs = Path(sys.executable).parent
    command = mlflow_command(services["mlflow"], tmp_path / "mlflow", port)
    server = subprocess.Popen([programs / command[0], *command[1:]])
    try:
        wait_for(port, server, 300)
        trainer = shlex.split(services["trainer"]["command"])
        subprocess.run(
            [programs / trainer[0], *trainer[1:], "max_steps=5", f"assets_dir={tmp_path}/assets"],
            cwd=ROOT,
            check=True,
            timeout=3000,
        )
    finally:
        server.terminate()
        server.wait()
    run = tmp_path / "srv" / "wmtp" / "runs" / "quickstart" / "rho1"
    assert {"summary.json", "metrics.jsonl"} <= {one.name for one in run.iterdir()}
    assert "in http" in (run / "summary.json").read_text()
