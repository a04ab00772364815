"""Metric loggers behind torchtune's interface: lines of JSON, and MLflow.

torchtune's own MLflow logger reads an attribute that it never sets and cannot resume a run.
"""

import atexit
import json
import math
import os
import subprocess
import time
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune.training.metric_logging import MetricLoggerInterface, Scalar, flatten_dict

from wmtp_modules.config.secrets import hidden, without_secrets
from wmtp_modules.files import new_file, only_writer
from wmtp_modules.run.storing import as_named


def _number(value: Any) -> int | float:
    return value.item() if hasattr(value, "item") else value


class JSONLLogger(MetricLoggerInterface):
    """One JSON object per logged step, on disk as soon as it is logged.

    What one step logs in several calls (training figures, then validation) becomes one line. Make
    it on one rank only. ``resume_step`` are steps already done: lines of later ones, and a last
    line that a crash left incomplete, are dropped. 0 starts the file over.

    Raises:
        ValueError: if the file to continue has a line that is not a JSON object with a step.
    """

    def __init__(self, path: str | Path, *, resume_step: int = 0) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._kept_lines(resume_step) if resume_step and self._path.exists() else []
        with new_file(self._path) as beside:  # a crash here must not cost the earlier steps
            beside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._file = open(self._path, "r+", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._line: dict[str, Any] = lines[-1] if lines else {}
        end = self._file.seek(0, os.SEEK_END)
        self._line_start = end - (len(json.dumps(self._line)) + 1 if lines else 0)

    def _kept_lines(self, resume_step: int) -> list[dict]:
        complete, _, _ = self._path.read_bytes().rpartition(b"\n")
        kept = []
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                record = json.loads(line)
                if record["step"] <= resume_step:
                    kept.append(record)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{self._path} line {number} is not a JSON object with a step: {line[:80]!r}; "
                    "correct or move the file to resume"
                ) from error
        return kept

    def log_config(self, config: DictConfig) -> None:
        """Nothing: the run writes ``config.yaml`` beside the file."""

    def log(self, name: str, data: Scalar, step: int) -> None:
        self.log_dict({name: data}, step)

    def log_dict(self, payload: Mapping[str, Scalar], step: int) -> None:
        """Add numbers or one-element tensors to the line of ``step``, which never falls."""
        if self._line.get("step") != step:
            self._line = {"step": step}
            self._line_start = self._file.seek(0, os.SEEK_END)
        for name, value in payload.items():
            number = _number(value)
            # JSON has no NaN or infinity, and most readers reject Python's spelling of them.
            self._line[name] = number if math.isfinite(number) else None
        try:
            self._file.seek(self._line_start)
            self._file.write(json.dumps(self._line, allow_nan=False) + "\n")
            self._file.truncate()
            self._file.flush()
        except OSError as error:
            reason = error.strerror or error
            raise OSError(error.errno, f"{self._path} could not be written ({reason})") from error

    def close(self) -> None:
        self._file.close()


class MLflowLogger(MetricLoggerInterface):
    """A run in MLflow: config, code version, metrics and artifacts. Make it on one rank only.

    MLFLOW_TRACKING_URI, if set, goes before ``tracking_uri``, so that a cluster's environment
    decides for every config.

    Args:
        experiment_name: made if not there.
        tracking_uri: such as ``sqlite:///runs/mlflow.db``. The folder of an SQLite file is made
            and new experiments keep their artifacts beside it, in ``mlflow_artifacts``.
        run_name: of a new run; MLflow invents one if left out.
        run_id: run to continue. MLflow appends: steps that are trained again stand there twice.

    Raises:
        ValueError: if no tracking URI is known, the store cannot be used, or the run is not there.
    """

    def __init__(
        self,
        experiment_name: str,
        tracking_uri: str | None = None,
        run_name: str | None = None,
        run_id: str | None = None,
    ) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri
        if not uri:
            raise ValueError(
                "no MLflow store: set metric_logger.tracking_uri, for example to "
                "sqlite:///runs/mlflow.db, or the environment variable MLFLOW_TRACKING_URI"
            )
        # Read when mlflow is imported; what the user set stays.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        from mlflow import MlflowClient  # takes seconds: only for who uses it
        from mlflow.exceptions import MlflowException

        database = _sqlite_file(uri)
        self._resumed = run_id is not None
        try:
            if database:
                database.parent.mkdir(parents=True, exist_ok=True)
                uri = f"sqlite:///{database}"
            # Opening an SQLite store makes its tables; two processes that do so at once both fail.
            with only_writer(database) if database else nullcontext():
                self._client: Any = MlflowClient(tracking_uri=uri)
            if run_id is None:
                artifacts = (database.parent / "mlflow_artifacts").as_uri() if database else None
                experiment_id = self._experiment_id(experiment_name, artifacts)
                self.run_id = self._client.create_run(
                    experiment_id, run_name=run_name, tags=code_version()
                ).info.run_id
        except Exception as error:  # of MLflow, SQLAlchemy, a driver, or what the server answers
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"the MLflow store {hidden(uri)} cannot be used "
                f"({hidden(reason)}): check metric_logger.tracking_uri, or the "
                "environment variable MLFLOW_TRACKING_URI, which goes before it"
            ) from error
        self.tracking_uri = uri
        if run_id is not None:
            try:
                self._client.update_run(run_id, status="RUNNING")
            except MlflowException as error:
                raise ValueError(hidden(f"MLflow run {run_id} is not in {uri}: {error}")) from error
            self.run_id = run_id
            for key, value in code_version().items():
                self._client.set_tag(run_id, key, value)
        # A recipe that raises never reaches close(): its run must not show as running for ever.
        atexit.register(self.close, "FAILED")

    def _experiment_id(self, name: str, artifact_location: str | None) -> str:
        from mlflow.exceptions import MlflowException

        if (found := self._client.get_experiment_by_name(name)) is not None:
            return found.experiment_id
        try:
            return self._client.create_experiment(name, artifact_location=artifact_location)
        except MlflowException:
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id  # another run made it between the two calls

    @property
    def location(self) -> str:
        """Where the run is and the command that shows it."""
        uri = hidden(self.tracking_uri)  # it is printed, and written to summary.json
        return f"run {self.run_id} in {uri} (mlflow ui --backend-store-uri {uri})"

    def log_config(self, config: DictConfig) -> None:
        """Store the resolved config as the artifact ``config.yaml`` and its keys as parameters.

        Parameters never change in MLflow: a resumed run keeps those that it began with, and
        ``config.yaml`` is the current one. MLflow cuts values beyond 6000 characters.
        """
        from mlflow.entities import Param

        plain = without_secrets(as_named(OmegaConf.to_container(config, resolve=True)))
        flat = flatten_dict(plain)
        known = self._client.get_run(self.run_id).data.params if self._resumed else {}
        params = [Param(key, str(value)) for key, value in flat.items() if key not in known]
        for start in range(0, len(params), 100):  # as many as MLflow takes in one call
            self._client.log_batch(self.run_id, params=params[start : start + 100])
        self._client.log_text(self.run_id, OmegaConf.to_yaml(plain), artifact_file="config.yaml")

    def log(self, name: str, data: Scalar, step: int) -> None:
        self.log_dict({name: data}, step)

    def log_dict(self, payload: Mapping[str, Scalar], step: int) -> None:
        """Log numbers or one-element tensors in one write."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, _number(value), now, step) for key, value in payload.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def log_artifact(self, path: str | Path) -> None:
        self._client.log_artifact(self.run_id, str(path))

    def close(self, status: str = "FINISHED") -> None:
        """End the run as ``FINISHED``, ``FAILED`` or ``KILLED``; a second call does nothing."""
        if self._client is not None:
            self._client.set_terminated(self.run_id, status)
            self._client = None
            atexit.unregister(self.close)


def _sqlite_file(uri: str) -> Path | None:
    """Absolute path of the file of an SQLite URI; None for another store."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix):
        return None
    file = Path(uri.removeprefix(prefix)).absolute()
    if file.is_dir():  # SQLAlchemy would try for two minutes
        raise ValueError(
            f"the MLflow store {uri} is a folder: name a file in it, such as "
            "sqlite:///runs/mlflow.db"
        )
    return file


def code_version() -> dict[str, str]:
    """Package versions, and the commit of the current folder if it is under git."""
    names = ("torch", "torchtune", "torchao", "wmtp")
    tags = {f"version.{name}": version(name) for name in names}

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(("git", *args), capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    if changes is not None:
        tags["git.dirty"] = "true" if changes else "false"
    return tags
