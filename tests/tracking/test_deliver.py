"""What reaches a real MLflow server: each figure once and in order, whatever fails between."""

import json
import math
import secrets
import shutil
import time
from types import SimpleNamespace

import pytest

from wmtp_modules import sync
from wmtp_modules.run.metric_logging import JSONLLogger
from wmtp_modules.tracking import deliver
from wmtp_modules.tracking.deliver import Delivery, mlflow_name
from wmtp_modules.tracking.outbox import Order, Outbox


class Sent:
    """A run's folder, its logger, and a delivery of it to a store."""

    def __init__(self, folder, uri, **order):
        self.outbox, self.said = Outbox(folder), []
        names = {"token": secrets.token_hex(8), "session": "s", "experiment": "deliver"}
        self.order = Order(uri=uri, **(names | order))
        self.outbox.save(self.order)
        self.jsonl = JSONLLogger(folder / "metrics.jsonl")
        self.uri = uri
        self.anew()

    def anew(self):
        """As another process would begin."""
        self.delivery = Delivery(self.outbox, self.uri, self.said.append)

    def send(self, status=None):
        self.delivery.send(self.order, status)

    def try_send(self, status=None):
        try:
            self.send(status)
        except Exception as error:
            return error
        return None

    @property
    def run_id(self):
        return self.outbox.position().run_id


def test_everything_arrives_once_and_in_order(server, mlflow_client, checks, tmp_path):
    sent = Sent(tmp_path, server.uri, params={"a": "1"}, tags={"made_from": "x"}, run_name="one")
    for step in range(1, 4):
        sent.jsonl.log_dict({"loss": 1 / step, "ess": 0.5}, step)
        sent.send()
    sent.jsonl.log("val_loss", 2.5, 3)  # comes into a line that was delivered
    sent.jsonl.log_dict({"loss": float("nan"), "ess": 0.25}, 4)
    sent.send()
    sent.anew()
    sent.send("FINISHED")
    found = checks.history(mlflow_client, sent.run_id)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    assert math.isnan(found["loss"][-1][1])
    found["loss"][-1] = (4, None)
    assert found == checks.expected(sent.outbox.metrics)
    run = mlflow_client.get_run(sent.run_id)
    assert (run.info.status, run.info.run_name, run.data.params) == ("FINISHED", "one", {"a": "1"})
    assert run.data.tags["made_from"] == "x"


@pytest.mark.parametrize("fault", ["500", "refuse", "lost"])
def test_an_answer_that_is_not_one_is_made_good(proxy, mlflow_client, checks, fault, tmp_path):
    """Every second call fails, or does its work and the answer is lost."""
    sent = Sent(tmp_path, proxy.uri, params={"a": "1"})
    (tmp_path / "curves.png").write_bytes(b"picture")
    sent.order.artifacts = ["curves.png"]
    proxy.fault = lambda path: fault if len(proxy.seen) % 2 else "pass"
    failures = 0
    for step in range(1, 6):
        sent.jsonl.log_dict({"loss": step, "ess": 0.5}, step)
        for _ in range(40):
            if sent.try_send() is None:
                break
            failures += 1
            proxy.seen.append("")  # else the same call would fail for ever
    assert failures > 3
    proxy.fault = lambda path: "pass"
    sent.send("FINISHED")
    assert checks.history(mlflow_client, sent.run_id) == checks.expected(sent.outbox.metrics)
    experiment = mlflow_client.get_run(sent.run_id).info.experiment_id
    token = f"tags.`wmtp.run` = '{sent.order.token}'"
    assert len(mlflow_client.search_runs([experiment], token)) == 1
    assert [one.path for one in mlflow_client.list_artifacts(sent.run_id)] == ["curves.png"]


def test_what_a_lost_position_file_knew_the_server_knows(server, mlflow_client, checks, tmp_path):
    sent = Sent(tmp_path, server.uri)
    for step in range(5):
        sent.jsonl.log("loss", step, step)
    sent.send()
    before = sent.run_id
    (tmp_path / "tracking" / ".position.json").unlink()
    sent.jsonl.log("loss", 5, 5)
    sent.anew()
    sent.send()
    assert sent.run_id == before
    assert checks.history(mlflow_client, before) == checks.expected(sent.outbox.metrics)


def test_figures_that_are_there_take_no_room(server, mlflow_client, checks, tmp_path, monkeypatch):
    """Of a long run: who begins anew reads past all that was delivered, and ends with the last."""
    monkeypatch.setattr(deliver, "MOST_WAITING", 4)
    sent = Sent(tmp_path, server.uri)
    for step in range(9):
        sent.jsonl.log_dict({"loss": step, "ess": 0.5}, step)
    sent.send()
    sent.jsonl.log_dict({"loss": 9, "ess": 0.5}, 9)
    sent.anew()
    sent.send("FINISHED")
    assert checks.history(mlflow_client, sent.run_id) == checks.expected(sent.outbox.metrics)
    assert sent.outbox.position().step == 9


def test_a_resumed_run_resends_no_step(server, mlflow_client, tmp_path):
    sent = Sent(tmp_path, server.uri)
    for step in range(6):
        sent.jsonl.log("tokens_per_s", step, step)
    sent.send()
    sent.jsonl = JSONLLogger(tmp_path / "metrics.jsonl", resume_step=3)  # its state was older
    sent.anew()
    for step in range(4, 8):
        sent.jsonl.log("tokens_per_s", 100 + step, step)
        sent.send()
    found = mlflow_client.get_metric_history(sent.run_id, "tokens_per_s")
    assert [(m.step, m.value) for m in found] == [*((s, s) for s in range(6)), (6, 106), (7, 107)]


@pytest.mark.parametrize("when", ["between", "at once"])
def test_a_deleted_run_is_made_anew_whole(server, mlflow_client, checks, when, tmp_path):
    sent = Sent(tmp_path, server.uri, params={"a": "1"})
    sent.jsonl.log("loss", 1.0, 1)
    sent.send()
    first = sent.run_id
    mlflow_client.delete_run(first)
    if when == "between":
        sent.anew()
    sent.jsonl.log("loss", 2.0, 2)
    sent.try_send()
    sent.send("FINISHED")
    assert sent.run_id != first
    assert any(first in sentence for sentence in sent.said)
    assert checks.history(mlflow_client, sent.run_id) == {"loss": [(1, 1.0), (2, 2.0)]}
    assert mlflow_client.get_run(sent.run_id).data.params == {"a": "1"}


def test_long_and_odd_names_and_values(server, mlflow_client, tmp_path):
    params = {"päth/to": "x", "long": "v" * 20_000, "k" * 400: "1", "empty": "", "a=b": "c\nd"}
    params |= {f"key_{i}": str(i) for i in range(250)}
    sent = Sent(tmp_path, server.uri, params=params, tags={"t" * 300: "w" * 9000})
    sent.jsonl.log_dict({"loss@1": 1.0, "späte": 2.0, "x" * 300: 3.0, "ok": 4.0}, 1)
    sent.jsonl.log_dict({"big": 1e308, "text": 1.0}, 2)
    with sent.outbox.metrics.open("a") as file:
        file.write(json.dumps({"step": 3, "note": "a word", "ok": 5.0}) + "\n")
    sent.send("FINISHED")
    run = mlflow_client.get_run(sent.run_id)
    assert {"p_th/to", "long", "a_b", "empty", "key_249"} <= run.data.params.keys()
    assert run.data.params["long"].startswith("vvv")
    assert {"loss_1", "sp_te", "ok", "big"} <= run.data.metrics.keys()
    assert run.data.metrics["ok"] == 5.0
    assert "note" not in run.data.metrics


def test_what_the_server_refuses_holds_up_nothing_else(
    server, mlflow_client, tmp_path, monkeypatch
):
    """A name that MLflow refuses is left out with a sentence; all others arrive."""
    monkeypatch.setattr("wmtp_modules.tracking.deliver.mlflow_name", lambda name: name)
    sent = Sent(tmp_path, server.uri, params={"bad@": "1", "good": "2"})
    sent.jsonl.log_dict({"bad@": 1.0, "good": 2.0}, 1)
    sent.send("FINISHED")
    run = mlflow_client.get_run(sent.run_id)
    assert (run.data.params, run.data.metrics) == ({"good": "2"}, {"good": 2.0})
    assert len([one for one in sent.said if "bad@" in one]) == 2


def test_names():
    assert mlflow_name("loss_head_0/val: x.y-z") == "loss_head_0/val: x.y-z"
    assert mlflow_name("a@b=ü") == "a_b__"
    assert len(mlflow_name("x" * 999)) == 250


def test_sync_sends_the_rest_of_a_killed_run(server, mlflow_client, checks, tmp_path, capsys):
    run_dir = tmp_path / "run" / "controls" / "uniform"
    run_dir.mkdir(parents=True)
    sent = Sent(run_dir, server.uri)
    sent.jsonl.log("loss", 1.0, 1)
    sent.send()
    sent.jsonl.log("loss", 2.0, 2)
    server.kill()
    with pytest.raises(SystemExit) as ended:
        sync.main([str(tmp_path / "run")])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert f"the MLflow store {server.uri} cannot be used" in told
    assert "Traceback" not in told
    server.start()
    assert sent.run_id in sync.send_figures(run_dir)
    run = mlflow_client.get_run(sent.run_id)
    assert run.info.status == "KILLED"
    assert "without a word" in run.data.tags["exit_reason"]
    assert checks.history(mlflow_client, sent.run_id) == checks.expected(sent.outbox.metrics)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        sync.main([str(tmp_path / "empty")])
    assert "keeps nothing for MLflow or a store" in capsys.readouterr().err


def test_a_locked_sqlite_store(tmp_path, mlflow_tables, checks, monkeypatch):
    import sqlite3

    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(mlflow_tables, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db?timeout=1"
    sent = Sent(tmp_path / "run", uri)
    sent.jsonl.log("loss", 1.0, 1)
    sent.send()
    with sqlite3.connect(tmp_path / "mlflow.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        sent.jsonl.log("loss", 2.0, 2)
        assert sent.try_send() is not None
        other.rollback()
    sent.send("FINISHED")
    history = checks.history(MlflowClient(uri), sent.run_id)
    assert history == checks.expected(sent.outbox.metrics)


def test_the_machine_s_load_arrives_once_beside_the_figures(
    proxy, mlflow_client, checks, tmp_path, monkeypatch
):
    """Its steps are seconds; every answer to it is lost once, and another process goes on."""
    clock = SimpleNamespace(time=lambda: started + ticks, monotonic=time.monotonic)
    sent, started, ticks = Sent(tmp_path, proxy.uri), time.time(), 0
    sent.send()
    began = mlflow_client.get_run(sent.run_id).info.start_time
    monkeypatch.setattr(deliver, "time", clock)
    seconds = []
    for step in range(1, 5):
        ticks += 10
        seconds.append((int(clock.time() * 1000) - began) // 1000)
        sent.delivery.sample({"system/cpu": step, "system/disk": 2 * step})
        sent.jsonl.log("loss", step, step)
        proxy.fault = lambda path: "lost" if "log-batch" in path else "pass"
        assert sent.try_send() is not None
        proxy.fault = lambda path: "pass"
        if step == 3:
            sent.delivery.sample({})  # within an interval
        sent.send()
    found = checks.history(mlflow_client, sent.run_id)
    assert found.pop("system/cpu") == list(zip(seconds, range(1, 5), strict=True))
    assert [value for _, value in found.pop("system/disk")] == [2, 4, 6, 8]
    assert found == checks.expected(sent.outbox.metrics)
