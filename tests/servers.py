"""Real servers on loopback for the tests of several folders: MLflow's, and one that speaks S3."""

import http.server
import os
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from wmtp_modules.files import only_writer

HERE = Path(__file__).parent


# ------------------------------------------------------------------------------- MLflow


class MLflowServer:
    """``start`` and ``kill`` it at will; it keeps its port, its SQLite file and its artifacts."""

    def __init__(self, fork_server, folder: Path) -> None:
        self.folder = folder
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
def mlflow_tables(tmp_path_factory):
    """An SQLite file with MLflow's tables and nothing in them, to be copied: they take seconds."""
    from wmtp_modules.tracking.store import open_client

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # one for all of them
    file = folder / "mlflow_tables.db"
    with only_writer(file):
        if not file.exists():
            made = folder / "mlflow" / "made on demand" / "tables.db"
            open_client(f"sqlite:///{made}")
            made.rename(file)
    return file


@pytest.fixture(scope="session")
def mlflow_server(fork_server, mlflow_tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow_server")
    shutil.copy(mlflow_tables, folder / "server.db")
    return MLflowServer(fork_server, folder)


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


# ---------------------------------------------------------------------------------- S3

KEYS = {
    "AWS_ACCESS_KEY_ID": "testing-key",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session")
def s3_server():
    from moto.server import ThreadedMotoServer  # seconds

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def s3_client(s3_server):
    import boto3

    own = {"aws_access_key_id": "own", "aws_secret_access_key": "own"}
    return boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1", **own)


@pytest.fixture
def s3(s3_client, s3_server, monkeypatch, tmp_path):
    """A client of an emptied server with the bucket ``bucket``; the environment names both."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no credentials of this machine's user
    post(s3_server, "reset")
    s3_client.create_bucket(Bucket="bucket")
    yield s3_client
    post(s3_server, "reset-auth", b"inf")


def post(server: str, what: str, data: bytes = b"") -> None:
    url, plain = f"{server}/moto-api/{what}", {"Content-Type": "text/plain"}
    request = urllib.request.Request(url, data=data, headers=plain, method="POST")
    urllib.request.urlopen(request, timeout=10).close()


@pytest.fixture
def refuse_keys(s3, s3_server):
    """refuse_keys(after): so many requests later the server knows no credentials; None: it does."""

    def refuse(after: int | None = 0) -> None:
        post(s3_server, "reset-auth", b"inf" if after is None else str(after).encode())

    return refuse


@pytest.fixture
def names(s3):
    """names(prefix): the objects below it, without it."""

    def listed(prefix: str = "run/") -> set[str]:
        page = s3.list_objects_v2(Bucket="bucket", Prefix=prefix)
        return {one["Key"].removeprefix(prefix) for one in page.get("Contents", [])}

    return listed
