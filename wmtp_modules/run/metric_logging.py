"""Metric loggers behind torchtune's interface: lines of JSON, and MLflow.

torchtune's own MLflow logger reads an attribute that it never sets and cannot resume a run.
"""

import atexit
import json
import logging
import math
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config
from torchtune.training.metric_logging import MetricLoggerInterface, Scalar, flatten_dict

from wmtp_modules.config.components import todays_name
from wmtp_modules.config.secrets import hidden, without_secrets
from wmtp_modules.files import new_file, sync_command
from wmtp_modules.run.storing import as_named
from wmtp_modules.tracking.outbox import Order, Outbox, Position
from wmtp_modules.tracking.store import uri_of

log = logging.getLogger(__name__)

# Without progress. MLflow's process ends much earlier by itself, but may take long to start where
# all cores are busy.
ANSWER_S = 300.0
STOP_S = 5.0  # the same where a scheduler's grace runs
RESTART_S = 60.0  # between two starts of a process that something ends
last_words: str | None = None


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

    def log_config(self, config: DictConfig) -> None:  # torchtune calls it so
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
    """A run in MLflow, fed by a process beside this one. Make it on one rank only.

    No call but those that make, describe and close it waits for MLflow, and no outage of MLflow
    raises: figures stand in a ``metrics.jsonl``, which the process follows (``tracking/``).
    MLFLOW_TRACKING_URI, if set, goes before ``tracking_uri``, so that a cluster's environment
    decides for every config.

    Args:
        experiment_name: made if not there.
        tracking_uri: such as ``sqlite:///runs/mlflow.db``. The folder of an SQLite file is made
            and new experiments keep their artifacts beside it, in ``mlflow_artifacts``.
        run_name: of a new run; MLflow invents one if left out.
        run_id: run to continue. Steps that MLflow has are not sent again.
        run_dir: folder of a run, which writes ``metrics.jsonl`` there itself. Without one the
            logger writes figures to a folder of its own.
        resume: whether the run in ``run_dir`` goes on; None: if it has the same config.
        required: whether a store that cannot be used at the start is an error, not a warning.
        artifact_root: where a new experiment keeps its artifacts, such as ``s3://bucket/mlflow``;
            None leaves it to the server.

    Raises:
        ValueError: if no tracking URI is known, or the store or the run to continue must be there
            and is not.
    """

    def __init__(
        self,
        experiment_name: str = "wmtp",
        tracking_uri: str | None = None,
        run_name: str | None = None,
        run_id: str | None = None,
        run_dir: str | Path | None = None,
        resume: bool | None = False,
        required: bool = True,
        artifact_root: str | None = None,
    ) -> None:
        for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):  # what the user set stays
            os.environ.setdefault(name, "true")
        self._uri = uri_of(tracking_uri)
        self.tracking_uri = hidden(self._uri)
        self._resume, self._required = resume, required
        self._own: JSONLLogger | None = None
        if run_dir is None:
            run_dir = tempfile.mkdtemp(prefix="wmtp_mlflow_")
            self._own = JSONLLogger(Path(run_dir) / "metrics.jsonl")
        self._outbox = Outbox(run_dir)
        self._before = self._outbox.order()
        self._follower: subprocess.Popen | None = None
        self._started_at, self._is_closed = 0.0, False
        self._known = Position()
        self._order = Order(
            uri=self.tracking_uri,
            experiment=experiment_name,
            token=secrets.token_hex(16),
            session=secrets.token_hex(16),
            run_name=run_name,
            run_id=run_id,
            must_exist=self._own is not None,
            artifact_root=artifact_root,
            tags=code_version(),
        )
        # A recipe that raises never reaches close(): its run must not show as running for ever.
        atexit.register(self._fail)
        if self._own:
            self._begin()

    def _begin(self) -> None:
        """Hand over what there is, as the same run as before or another, and start to deliver."""
        before, order = self._before, self._order
        resume = self._resume
        if before and resume is None:
            resume = _but_resume(before.params) == _but_resume(order.params)
        if before and (resume or (order.run_id and order.run_id == self._outbox.position().run_id)):
            order.token = before.token
        elif before:
            order.ended = self._outbox.position().run_id  # a kill has left it as running
        self._hand_over()
        self._start_follower()
        if self._required:
            self._wait(lambda: self._position().run_id or self._position().problem)
            problem = self._position().problem
            if problem or not self._position().run_id:
                self._is_closed = True
                atexit.unregister(self._fail)
                if self._follower:
                    self._follower.kill()
                raise ValueError(
                    f"{problem or f'the MLflow store {self.tracking_uri} does not answer'}: check "
                    "tracking.uri or metric_logger.tracking_uri, or the environment variable "
                    "MLFLOW_TRACKING_URI, which goes before both"
                )

    def _hand_over(self) -> None:
        try:
            self._outbox.save(self._order)
        except OSError as error:  # training states meet the full disk too, and say so
            log.warning("What MLflow shall get of the run is not kept: %s", error)

    def _start_follower(self) -> None:
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"MLFLOW_TRACKING_URI": self._uri, "PYTHONPATH": os.pathsep.join(paths)}
        env |= {"OMP_NUM_THREADS": "1"} | ({"WMTP_QUIET_TRACKING": "1"} if self._required else {})
        command = [sys.executable, "-m", "wmtp_modules.tracking.follow"]
        command += [str(self._outbox.run_dir), self._order.session, str(os.getpid())]
        self._started_at = time.monotonic()
        try:
            # In a session of its own: signals to the run are not for it.
            self._follower = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:  # no processes left, no memory
            log.warning("No process follows the run for MLflow: %s", error)

    def _position(self) -> Position:
        """What MLflow has of this run, as far as is known."""
        position = self._outbox.position()
        if position.token == self._order.token and position.session == self._order.session:
            self._known = position  # else another start has the folder, or it is removed
        return self._known

    def _wait(self, until: Callable[[], object], longest: float = ANSWER_S) -> None:
        """Wait until something is so, or the follower has left, or nothing moves for so long."""
        moved, seen = time.monotonic(), None
        while not until() and time.monotonic() - moved < longest:
            if self._follower is None or self._follower.poll() is not None:
                return
            if (position := self._outbox.position()) != seen:
                moved, seen = time.monotonic(), position
            time.sleep(0.05)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while MLflow has not answered."""
        return self._position().run_id

    @property
    def location(self) -> str:
        """Where the run is and the command that shows it."""
        self._wait(lambda: self.run_id or self._position().problem)
        uri = self.tracking_uri  # it is printed, and written to summary.json
        command = f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        show = "" if uri.startswith("http") else f" ({command})"
        if self.run_id is None:
            return f"not yet in {uri}{show}: `{sync_command(self._outbox.run_dir)}` sends it"
        return f"run {self.run_id} in {uri}{show}"

    def log_config(self, config: DictConfig) -> None:
        """Store the resolved config as the artifact ``config.yaml`` and its keys as parameters.

        Parameters never change in MLflow: a resumed run keeps those that it began with, and
        ``config.yaml`` is the current one. MLflow cuts values beyond 6000 characters.
        """
        plain = without_secrets(as_named(OmegaConf.to_container(config, resolve=True)))
        self._order.params = {key: str(value) for key, value in flatten_dict(plain).items()}
        self._outbox.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(plain, self._outbox.folder / "config.yaml")
        self._order.artifacts.append("tracking/config.yaml")
        if self._follower is None:
            self._begin()
        else:
            self._hand_over()

    def log_tags(self, tags: Mapping[str, object]) -> None:
        """What else is known about the run: its machine, its data."""
        self._order.tags |= {key: hidden(str(value)) for key, value in tags.items()}
        self._hand_over()

    def log(self, name: str, data: Scalar, step: int) -> None:
        self.log_dict({name: data}, step)

    def log_dict(self, payload: Mapping[str, Scalar], step: int) -> None:
        """Numbers or one-element tensors; those of a run with ``run_dir`` are in its file."""
        if self._own:
            self._own.log_dict(payload, step)
        if self._has_left() and time.monotonic() - self._started_at > RESTART_S:
            self._start_follower()

    def _has_left(self) -> bool:
        """Whether something has killed the process beside this one, as long as the run goes on."""
        return self._follower is not None and self._follower.poll() is not None

    def log_artifact(self, path: str | Path) -> None:
        self._order.artifacts.append(str(Path(path).absolute()))
        self._hand_over()

    def close(
        self, status: str = "FINISHED", reason: str | None = None, patience: float = ANSWER_S
    ) -> None:
        """End the run as ``FINISHED``, ``FAILED`` or ``KILLED``; a second call does nothing.

        Waits until MLflow has all, at most ``patience`` seconds without progress; what it has not
        got then the process beside this one goes on to send for some seconds, and says so if it
        cannot.
        """
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self._fail)
        if self._own:
            self._own.close()
        self._order.status = status
        self._order.tags["exit_reason"] = hidden(reason or status.lower())
        self._hand_over()
        if self._has_left():
            self._start_follower()
        self._wait(lambda: False, patience)
        self._position()
        if self._follower and self._follower.poll() not in (None, 0, 1):  # 1: it has said so
            log.warning(
                "MLflow may not have got everything of %s: `%s` sends the rest",
                self._outbox.run_dir,
                sync_command(self._outbox.run_dir),
            )
        if self._own and self._follower and self._follower.poll() == 0:
            shutil.rmtree(self._outbox.run_dir, ignore_errors=True)

    def _fail(self) -> None:
        error = getattr(sys, "last_value", None)  # of the traceback that has ended this process
        told = f"{type(error).__name__}: {error}" if error else None
        self.close("FAILED", last_words or told or "ended by an error", patience=STOP_S)


def make_logger(
    cfg: DictConfig, run_dir: Path, run_id: str | None = None, resume: bool | None = False
) -> Any:
    """The logger that a config names; None if it names none.

    MLflow's follows ``run_dir/metrics.jsonl``. Its store is the logger's own, else that of the
    block ``tracking``, which alone is enough.
    """
    tracking, block = cfg.get("tracking") or {}, cfg.get("metric_logger")
    if block is None and not tracking.get("uri"):
        return None
    name = f"{MLflowLogger.__module__}.{MLflowLogger.__name__}"
    block = block or OmegaConf.create(
        {
            "_component_": name,
            "experiment_name": tracking.get("experiment") or "wmtp",
            "run_name": tracking.get("run_name") or run_dir.name,
        }
    )
    known: dict[str, Any] = {"run_id": run_id} if run_id else {}
    if todays_name(block["_component_"]) == name:
        known |= {"run_dir": run_dir, "resume": resume}
        known["required"] = bool(tracking.get("required"))
        known["artifact_root"] = tracking.get("artifact_root")
        if not block.get("tracking_uri"):
            known["tracking_uri"] = tracking.get("uri")
    return config.instantiate(block, **known)


def note_last_words(sentence: str) -> None:
    """The sentence with which this process ends by an error: MLflow gets it as the reason."""
    global last_words
    last_words = sentence


def _but_resume(params: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in params.items() if key != "resume_from_checkpoint"}


def describe_machine(device: torch.device, ranks: int) -> dict:
    """What a run was made on, or a speed or a time limit measured."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "ranks": ranks,
        "python": platform.python_version(),
    }


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
