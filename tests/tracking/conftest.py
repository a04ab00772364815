"""One real MLflow server for all tests of what is sent to it."""

import http.server
import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

HERE = Path(__file__).parent


class MLflowServer:
    """``start`` and ``kill`` it at will; it keeps its port, its SQLite file and its artifacts."""

    def __init__(self, fork_server, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        # The names under which MLflow's own command passes these to its application.
        self._env = {
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/server.db",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self._forks, self.started = fork_server, None

    def start(self) -> None:
        argv = [HERE / "mlflow_server.py", self.port]
        self.started = self._forks.start(argv, env=self._env, timeout=900)
        while not self._listens():
            assert self.started.poll() == [None], self.started.stderr[-2000:]
            time.sleep(0.01)

    def _listens(self) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self.started is not None:
            self.started.send_signal(9)
            self.started.wait()
            self.started = None


@pytest.fixture(scope="session")
def mlflow_server(fork_server, tmp_path_factory):
    server = MLflowServer(fork_server, tmp_path_factory.mktemp("mlflow_server"))
    server.start()
    with urllib.request.urlopen(f"{server.uri}/api/2.0/mlflow/experiments/get?experiment_id=0"):
        server.kill()  # its tables are made, which takes longest
    return server


@pytest.fixture
def server(mlflow_server, forks, monkeypatch):
    """The server, running at the start of a test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    mlflow_server.start()
    yield mlflow_server
    mlflow_server.kill()


@pytest.fixture
def mlflow_client(server):
    from mlflow import MlflowClient

    return MlflowClient(server.uri)


class Proxy:
    """A TCP listener before the server that passes each request on, or plays a fault.

    ``fault`` takes the request's number since it was set and returns "pass", "500", "refuse" (the
    connection closes unanswered), "lost" (the server gets it, the answer is lost), or seconds that
    the answer takes.
    """

    def __init__(self, port: int) -> None:
        self.fault, self.seen = (lambda path: "pass"), []
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do(self) -> None:
                proxy.seen.append(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                what = proxy.fault(self.path)
                if what == "500":
                    self.send_error(500)
                    return
                if what == "refuse":
                    self.connection.close()
                    return
                if isinstance(what, float):
                    time.sleep(what)
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}{self.path}",
                    data=body or None,
                    method=self.command,
                    headers={"Content-Type": self.headers.get("Content-Type") or "text/plain"},
                )
                try:
                    with urllib.request.urlopen(request) as answer:
                        status, content = answer.status, answer.read()
                except urllib.error.HTTPError as error:
                    status, content = error.code, error.read()
                except OSError:
                    self.send_error(502)
                    return
                if what == "lost":
                    self.connection.close()
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do

            def log_message(self, *_) -> None:
                """pytest's output is not the place."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def proxy(server):
    one = Proxy(server.port)
    yield one
    one.close()


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def history(client, run_id: str) -> dict[str, list]:
    """(step, value) of each figure in the order in which MLflow has got them."""
    keys = client.get_run(run_id).data.metrics
    return {
        key: [(m.step, m.value) for m in client.get_metric_history(run_id, key)] for key in keys
    }


def expected(path: Path) -> dict[str, list]:
    """The same from a run's file."""
    found: dict[str, list] = {}
    for line in lines_of(path):
        step = line.pop("step")
        for key, value in line.items():
            found.setdefault(key, []).append((step, value))
    return found


@pytest.fixture
def checks():
    class Checks:
        history = staticmethod(history)
        expected = staticmethod(expected)

    return Checks


class Forked:
    """A process of the fork server behind what is used of ``subprocess.Popen``."""

    def __init__(self, forks, command: list[str], env: dict[str, str]) -> None:
        changes = {key: value for key, value in env.items() if os.environ.get(key) != value}
        self.started = forks.start(command[1:], env=changes, timeout=900)

    def poll(self) -> int | None:
        return self.started.poll()[0]

    def kill(self) -> None:
        self.started.send_signal(9)


@pytest.fixture
def followers(forks, monkeypatch):
    """Processes that follow runs, which are forked: importing MLflow takes seconds."""
    made: list[Forked] = []

    real = subprocess.Popen

    def popen(command, *args, **options):
        if "wmtp_modules.tracking.follow" not in command:
            return real(command, *args, **options)
        made.append(Forked(forks, command, options["env"]))
        return made[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    return made
