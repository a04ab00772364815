"""A real MLflow server on loopback that is killed and started again in a moment.

As a program: imports MLflow's server once, then forks one child per line of its input, which is a
port, and prints the child's process id when it listens. MLflow's own command takes ten seconds to
start; the application, its handlers and its store are the same.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path


def serve() -> None:
    from mlflow.server import app
    from werkzeug.serving import make_server

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            server = make_server("127.0.0.1", int(line), app, threaded=True)
            print(os.getpid(), flush=True)
            os.close(0)
            server.serve_forever()
            os._exit(0)
        while True:  # reap what was killed
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


class MLflowServer:
    """``start`` and ``kill`` it at will; it keeps its port, its SQLite file and its artifacts."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = f"sqlite:///{folder}/server.db"
        # The names under which MLflow's own command passes these to its application.
        env = os.environ | {
            "_MLFLOW_SERVER_FILE_STORE": self.store,
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true",
        }
        self._log = (folder / "server.log").open("w")
        self._parent = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
        )
        self.pid: int | None = None

    def start(self) -> None:
        assert self.pid is None
        self._parent.stdin.write(f"{self.port}\n")
        self._parent.stdin.flush()
        self.pid = int(self._parent.stdout.readline())

    def kill(self) -> None:
        if self.pid is not None:
            os.kill(self.pid, 9)
            self.pid = None
            while True:  # its port is free when it is gone
                with socket.socket() as one:
                    if one.connect_ex(("127.0.0.1", self.port)):
                        return
                time.sleep(0.01)

    def close(self) -> None:
        self.kill()
        self._parent.stdin.close()
        self._parent.wait(10)
        self._log.close()


if __name__ == "__main__":
    serve()
