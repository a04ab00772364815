"""An MLflow store and the run in it: found, made, or made anew where it was deleted."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from wmtp_modules.config.secrets import HIDDEN, hidden
from wmtp_modules.files import only_writer

TOKEN = "wmtp.run"  # tag by which a run is found whose making was not answered
# Read when mlflow is imported; what the user set stays. Whoever delivers repeats by itself, and
# what has hung for half a minute is better asked again.
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # it tells of each migration of a new file
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "300",
}


def set_defaults() -> None:
    """Before the first import of mlflow in a process."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


class MissingRunError(ValueError):
    """The run to continue is not in the store."""


def uri_of(named: str | None) -> str:
    """The store's URI: MLFLOW_TRACKING_URI, if set, goes before the one a config names.

    Raises:
        ValueError: if there is none, it is an SQLite file that is a folder, or one whose password
            was hidden when it was kept.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or named
    if not uri:
        raise ValueError(
            "no MLflow store: set metric_logger.tracking_uri or tracking.uri, for example to "
            "sqlite:///runs/mlflow.db, or the environment variable MLFLOW_TRACKING_URI"
        )
    if HIDDEN in uri:
        raise ValueError(
            f"the MLflow store {uri} is kept without its password: set the environment variable "
            "MLFLOW_TRACKING_URI"
        )
    file = sqlite_file(uri)
    return f"sqlite:///{file}" if file else uri


def sqlite_file(uri: str) -> Path | None:
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


def open_client(uri: str) -> Any:
    """MLflow's client of a store. The folder of an SQLite file is made."""
    from mlflow import MlflowClient  # takes seconds: only for who uses it

    database = sqlite_file(uri)
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    # Opening an SQLite store makes its tables; two processes that do so at once both fail.
    with only_writer(database) if database else nullcontext():
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)  # a server is only met by asking it something
    return client


def is_there(client: Any, run_id: str) -> bool:
    """Whether a run can be written to: it is known and not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        # A proxy whose server is away may answer 404 as well, but not in MLflow's words.
        if error.error_code == "RESOURCE_DOES_NOT_EXIST" and run_id in str(error):
            return False
        raise


def make_run(
    client: Any,
    uri: str,
    experiment: str,
    artifact_root: str | None,
    name: str | None,
    token: str,
) -> str:
    """The id of a new run, or of the one that an earlier call made whose answer was lost.

    New experiments of an SQLite file keep their artifacts beside it, in ``mlflow_artifacts``, where
    no ``artifact_root`` is given.
    """
    database = sqlite_file(uri)
    artifacts = (database.parent / "mlflow_artifacts").as_uri() if database else None
    artifacts = f"{artifact_root.rstrip('/')}/{experiment}" if artifact_root else artifacts
    experiment_id = _experiment_id(client, experiment, artifacts)
    found = client.search_runs([experiment_id], f"tags.`{TOKEN}` = '{token}'", max_results=1)
    if found:
        return found[0].info.run_id
    return client.create_run(experiment_id, run_name=name, tags={TOKEN: token}).info.run_id


def _experiment_id(client: Any, name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is not None:
        return found.experiment_id
    try:
        return client.create_experiment(name, artifact_location=artifact_location)
    except MlflowException:
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id  # another run made it between the two calls


def problem_of(uri: str, error: Exception) -> str:
    """One sentence's begin: what is wrong with a store."""
    if isinstance(error, MissingRunError):
        return str(error)
    return f"the MLflow store {hidden(uri)} cannot be used ({reason_of(error)})"


def reason_of(error: Exception) -> str:
    """What MLflow, SQLAlchemy, a driver or a server said, in one line without secrets.

    Of a connection that fails MLflow quotes all layers of its client; the lowest one says why.
    """
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.errno and not below.filename:
            return f"{below.strerror}"
        if isinstance(below, TimeoutError):
            return "no answer in time"
        below = below.__cause__ or below.__context__
    text = hidden(str(error).partition("\n")[0]) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
