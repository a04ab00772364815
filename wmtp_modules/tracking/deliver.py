"""Brings MLflow up to what a run's folder holds: each figure once, in order.

Whether a call that failed has arrived is not known. Before the next one, and at the start, the
store is asked for the last step of each figure; what it has is not sent again.
"""

import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from wmtp_modules.config.secrets import hidden
from wmtp_modules.tracking.outbox import Lines, Order, Outbox, Position
from wmtp_modules.tracking.store import (
    MissingRunError,
    is_there,
    make_run,
    open_client,
    reason_of,
    set_defaults,
)
from wmtp_modules.tracking.system import SYSTEM

MOST_METRICS, MOST_PARAMS = 1000, 100  # of a call
MOST_WAITING = 50_000  # figures in memory; what is beyond stays in the file
MOST_SAMPLES = 1000  # of the machine, in an outage; older ones are dropped
LONGEST_NAME, LONGEST_TAG = 250, 5000
SHORT_VALUE = 250  # characters of a parameter that every version of a server takes
# In MLflow's own words: what stands between may answer 400 for a while, which is BAD_REQUEST.
REFUSED = ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS")


def mlflow_name(name: str) -> str:
    """A name that MLflow takes: other characters become "_", and it has at most 250."""
    return re.sub(r"[^\w./: -]", "_", name, flags=re.ASCII)[:LONGEST_NAME].strip("/") or "_"


class Delivery:
    """One run on its way to one store. Any method may raise what MLflow raises: call it again.

    Args:
        outbox: the run's folder.
        uri: of the store, with its password.
        say: takes a sentence for the user.
    """

    def __init__(self, outbox: Outbox, uri: str, say: Callable[[str], None]) -> None:
        set_defaults()
        self._outbox, self._uri, self._say = outbox, uri, say
        self.position: Position = outbox.position()
        self._lines = Lines(outbox.metrics)
        self._waiting: list[Any] = []  # mlflow Metrics
        self._samples: deque[tuple[int, dict[str, float]]] = deque(maxlen=MOST_SAMPLES)
        self._client: Any = None
        self._began = 0  # the run in MLflow, in milliseconds
        self._is_open = self._is_certain = False
        self._params: dict[str, str] | None = None
        self._tags: dict[str, str] = {}

    def send(self, order: Order, status: str | None) -> None:
        """Everything there is to send, then the status of a run that has ended.

        A failing artifact, whose store may be another one, holds up neither figures nor status.
        """
        if self.position.token != order.token:  # of the run that was here before
            self.position = Position(token=order.token)
        self.read()
        try:
            if self._client is None:
                self._client = open_client(self._uri)
            if not self._is_open:
                self._open(order, status)
            self._describe(order)
            while self._waiting:
                self._send_metrics(order)
                self.read()
            self._send_samples()
            failed = self._send_artifacts(order)
            if status is not None and self.position.status != status:
                self._client.set_terminated(self.position.run_id, status)
                self._save(status=status)
        except Exception:
            self._is_certain = False  # and a client may be tied to a store that is gone
            self._is_open = False
            raise
        if failed is not None:
            raise failed

    def sample(self, figures: Mapping[str, float]) -> None:
        """Take up how busy the machine is now, which stands in no file."""
        if figures:
            self._samples.append((int(time.time() * 1000), dict(figures)))

    def read(self) -> None:
        """Take up what is new in the file; it gets the time of now."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        lines = self._lines.new()
        while len(self._waiting) < MOST_WAITING and (figure := next(lines, None)):
            step, name, value = figure
            if not self.position.has(step, name := mlflow_name(name)):
                self._waiting.append(Metric(name, value, now, step))

    def _save(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self.position, name, value)
        self._outbox.save(self.position)

    # ------------------------------------------------------------- the run

    def _open(self, order: Order, status: str | None) -> None:
        """Continue the run, or make one; what MLflow had got of a run that is gone counts no more.

        Raises:
            MissingRunError: if the run that must exist is not there.
        """
        run_id = self.position.run_id or order.run_id
        if run_id is not None and not is_there(self._client, run_id):
            if order.must_exist:
                raise MissingRunError(f"MLflow run {run_id} is not in {hidden(self._uri)}")
            self._say(f"MLflow run {run_id} is not there any more: its figures go to a new one")
            run_id = None
            self.position = Position(token=order.token)
            self._lines, self._waiting = Lines(self._outbox.metrics), []
            self.read()
        if run_id is None:
            made_as = order.experiment, order.artifact_root, order.run_name, order.token
            run_id = make_run(self._client, self._uri, *made_as)
        if status is None:
            self._client.update_run(run_id, status="RUNNING")
            self.position.status = None
        self._began = self._client.get_run(run_id).info.start_time
        self._save(run_id=run_id, session=order.session)
        if order.ended and order.ended != run_id and is_there(self._client, order.ended):
            info = self._client.get_run(order.ended).info
            if info.status == "RUNNING":
                self._client.set_terminated(order.ended, "KILLED")
        self._params, self._tags, self._is_open = None, {}, True

    def _describe(self, order: Order) -> None:
        """Tags and parameters; of a parameter MLflow keeps the first value for ever."""
        from mlflow.entities import Param, RunTag

        tags = {mlflow_name(key): str(value)[:LONGEST_TAG] for key, value in order.tags.items()}
        changed = [RunTag(*tag) for tag in tags.items() if tag not in self._tags.items()]
        for some in _parts(changed, MOST_PARAMS):
            self._or_one_by_one("tags", some)
        self._tags = tags
        if self._params == order.params:
            return
        known = self._client.get_run(self.position.run_id).data.params if order.params else {}
        params: dict[str, str] = {}
        for key, value in order.params.items():
            name = mlflow_name(key)
            if name not in known:
                params.setdefault(name, str(value))
        for some in _parts([Param(*pair) for pair in params.items()], MOST_PARAMS):
            self._or_one_by_one("params", some)
        self._params = dict(order.params)

    # ----------------------------------------------------------- the figures

    def _send_metrics(self, order: Order) -> None:
        if not self._is_certain:
            self._drop_what_is_there()
        some = self._waiting[:MOST_METRICS]
        if some:
            self._or_one_by_one("metrics", some)
        for metric in some:
            self.position.add(metric.step, metric.key)
        del self._waiting[: len(some)]
        self._save(problem=None)

    def _send_samples(self) -> None:
        """Their step is the second since the run began in MLflow."""
        from mlflow.entities import Metric

        if self._samples and not self._is_certain:
            self._drop_what_is_there()
        while self._samples:
            at, figures = self._samples[0]
            step = self._second(at)
            some = [Metric(name, value, at, step) for name, value in figures.items()]
            self._or_one_by_one("metrics", some)
            self._samples.popleft()

    def _second(self, at: int) -> int:
        return (at - self._began) // 1000

    def _drop_what_is_there(self) -> None:
        """Figures go in order, so the last step of each tells which have arrived."""
        run = self._client.get_run(self.position.run_id)
        last = {one.key: one.step for one in run.data._metric_objs}  # ``metrics`` has no steps
        self._waiting = [one for one in self._waiting if one.step > last.get(one.key, -1)]
        seconds = max((step for name, step in last.items() if name.startswith(SYSTEM)), default=-1)
        while self._samples and self._second(self._samples[0][0]) <= seconds:
            self._samples.popleft()
        self._is_certain = True

    def _or_one_by_one(self, what: str, entities: list) -> None:
        """Log a batch; if the store refuses it, log each and leave out those it refuses.

        Raises:
            MlflowException: if the store cannot be used now, or the run was deleted.
        """
        from mlflow.exceptions import MlflowException

        run_id, refused, reason = str(self.position.run_id), [], ""
        try:
            self._client.log_batch(run_id, **{what: entities})
            return
        except MlflowException as error:
            if error.error_code not in REFUSED or not is_there(self._client, run_id):
                raise
        for one in entities:
            try:
                self._client.log_batch(run_id, **{what: [one]})
            except MlflowException as error:
                if error.error_code not in REFUSED:
                    raise
                if what == "params" and self._fits_when_short(one):
                    continue
                refused.append(one.key)
                reason = reason_of(error)
        if refused:
            self._say(f"MLflow refuses the {what} {', '.join(refused)} ({reason}): left out")

    def _fits_when_short(self, param: Any) -> bool:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        short = Param(param.key[:SHORT_VALUE], param.value[:SHORT_VALUE])
        try:
            self._client.log_batch(self.position.run_id, params=[short])
        except MlflowException as error:
            if error.error_code not in REFUSED:
                raise
            return False
        return True

    # ---------------------------------------------------------------- files

    def _send_artifacts(self, order: Order) -> Exception | None:
        """Those that are new or have changed; returns why one could not be sent."""
        failed = None
        for name in order.artifacts:
            path = self._outbox.run_dir / name
            if not path.is_file():  # its run has taken it away again
                continue
            is_now = [path.stat().st_size, path.stat().st_mtime_ns]
            if self.position.artifacts.get(name) == is_now:
                continue
            try:
                self._client.log_artifact(self.position.run_id, str(path))
            except Exception as error:  # of any store's driver
                failed = error
            else:
                self.position.artifacts[name] = is_now
                self._save()
        return failed


def _parts(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]
