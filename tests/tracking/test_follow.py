"""A run and the process beside it: outages, kills, a store that is not there, what a step costs."""

import json
import os
import textwrap
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from wmtp_modules.run.metric_logging import JSONLLogger, MLflowLogger, make_logger
from wmtp_modules.tracking.outbox import Outbox

ROOT = Path(__file__).parents[2]


def wait_until(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def begin(folder, uri, *, step=0, **options):
    """The two loggers of a run, as ``Run`` makes them."""
    jsonl = JSONLLogger(folder / "metrics.jsonl", resume_step=step)
    logger = MLflowLogger("follow", uri, run_dir=folder, required=False, **options)
    logger.log_config(OmegaConf.create({"lr": 0.1, "resume_from_checkpoint": step > 0}))

    def log(values, step):
        jsonl.log_dict(values, step)
        logger.log_dict(values, step)

    return logger, log


def test_outages_of_the_server_cost_nothing(
    server, followers, mlflow_client, checks, tmp_path, capfd
):
    server.kill()
    logger, log = begin(tmp_path, server.uri)
    log({"loss": 1.0}, 1)
    wait_until(lambda: Outbox(tmp_path).position().problem)
    (told,) = [one for one in followers[0].started.stderr.splitlines() if "Warning" in one]
    assert f"{server.uri} cannot be used (Connection refused): the run goes on" in told
    server.start()
    for step in range(2, 8):
        log({"loss": 1.0 / step}, step)
        if step in (3, 5):
            wait_until(lambda at=step: Outbox(tmp_path).position().step == at)
            server.kill()
        elif step in (4, 6):
            server.start()
    (tmp_path / "curves.png").write_bytes(b"picture")
    logger.log_artifact(tmp_path / "curves.png")
    logger.log_tags({"made_from": "abc"})
    logger.close()
    run = mlflow_client.get_run(logger.run_id)
    assert checks.history(mlflow_client, logger.run_id) == checks.expected(
        tmp_path / "metrics.jsonl"
    )
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "resume_from_checkpoint": "False"}
    assert run.data.tags["made_from"] == "abc"
    assert run.data.tags["exit_reason"] == "finished"
    files = {one.path for one in mlflow_client.list_artifacts(logger.run_id)}
    assert files == {"config.yaml", "curves.png"}


KILLED = """
    import os, sys
    sys.path.insert(0, {root!r})
    from omegaconf import OmegaConf
    from wmtp_modules.run.metric_logging import JSONLLogger, MLflowLogger
    jsonl = JSONLLogger({folder!r} + "/metrics.jsonl")
    logger = MLflowLogger("follow", {uri!r}, run_dir={folder!r}, required=False, resume=None)
    logger.log_config(OmegaConf.create({{"lr": 0.1, "resume_from_checkpoint": False}}))
    for step in range(1, 6):
        jsonl.log("loss", 1.0 / step, step)
    logger._wait(lambda: logger._position().step >= 5)
    jsonl.log("loss", 0.5, 6)
    os.kill(os.getpid(), 9)
"""


def test_a_killed_run_has_the_right_status_and_goes_on(
    server, forks, followers, mlflow_client, checks, tmp_path
):
    """kill -9: what stays behind tells MLflow; a start with the same config is the same run."""
    folder, script = tmp_path / "run", tmp_path / "killed.py"
    values = {"root": str(ROOT), "folder": str(folder), "uri": server.uri}
    script.write_text(textwrap.dedent(KILLED.format(**values)))
    killed = forks.start([script])  # its follower is a real process
    assert killed.wait() == [-9], killed.stderr
    run_id = Outbox(folder).position().run_id
    wait_until(lambda: mlflow_client.get_run(run_id).info.status == "KILLED")
    assert "without a word" in mlflow_client.get_run(run_id).data.tags["exit_reason"]

    logger, log = begin(folder, server.uri, step=3, resume=None)
    wait_until(lambda: logger.run_id)
    assert logger.run_id == run_id
    assert mlflow_client.get_run(run_id).info.status == "RUNNING"
    for step in range(4, 9):
        log({"loss": 1.0 / step}, step)
    logger.close()
    assert mlflow_client.get_run(run_id).info.status == "FINISHED"
    steps = [m.step for m in mlflow_client.get_metric_history(run_id, "loss")]
    assert steps == list(range(1, 9))


def test_another_run_in_the_folder_leaves_the_killed_one_as_killed(
    server, followers, mlflow_client, tmp_path
):
    first, log = begin(tmp_path, server.uri)
    log({"loss": 1.0}, 1)
    wait_until(lambda: Outbox(tmp_path).position().step == 1)
    run_id = first.run_id
    followers[0].kill()  # with the run, as a machine that loses its power
    first._is_closed = True
    second, _ = begin(tmp_path, server.uri)
    second.close("FAILED", "TrainingError: nothing left")
    assert second.run_id != run_id
    assert mlflow_client.get_run(run_id).info.status == "KILLED"
    ended = mlflow_client.get_run(second.run_id)
    assert ended.info.status == "FAILED"
    assert ended.data.tags["exit_reason"] == "TrainingError: nothing left"


@pytest.mark.parametrize("required", [True, False])
def test_no_server_at_the_start(required, followers, server, tmp_path):
    server.kill()
    cfg = OmegaConf.create(
        {
            "metric_logger": {
                "_component_": "wmtp_modules.run.metric_logging.MLflowLogger",
                "experiment_name": "x",
            },
            "tracking": {"uri": f"http://me:secret-word@127.0.0.1:{server.port}"},
        }
    )
    cfg.tracking.required = required
    logger = make_logger(cfg, tmp_path)
    if required:
        with pytest.raises(ValueError, match=r"store http://\*\*\*@127.*cannot be used"):
            logger.log_config(cfg)
        return
    logger.log_config(cfg)
    assert "not yet in http://***@" in logger.location
    assert f"wmtp_modules.sync {tmp_path}" in logger.location
    logger.close(patience=20)
    kept = "".join(file.read_text() for file in (tmp_path / "tracking").iterdir())
    assert "secret-word" not in kept + followers[0].started.stderr
    assert json.loads((tmp_path / "tracking" / "run.json").read_text())["status"] == "FINISHED"


def test_a_logged_step_does_not_wait(proxy, followers, tmp_path):
    """At most a millisecond with a server that answers in half a second; the median of many."""
    proxy.fault = lambda path: 0.5
    logger, log = begin(tmp_path, proxy.uri)
    metrics = {f"figure_{i}": i / 7 for i in range(35)}
    seconds = []
    for step in range(1, 201):
        started = time.perf_counter()
        log(metrics, step)
        seconds.append(time.perf_counter() - started)
    assert sorted(seconds)[100] < 1e-3
    proxy.fault = lambda path: "pass"
    logger.close()
    assert Outbox(tmp_path).position().step == 200


def test_only_tracking_is_enough_and_none_is_none(server, followers, mlflow_client, tmp_path):
    assert make_logger(OmegaConf.create({}), tmp_path) is None
    cfg = OmegaConf.create({"tracking": {"uri": server.uri}})
    logger = make_logger(cfg, tmp_path / "my_run")
    logger.log_config(cfg)
    logger.close()
    assert mlflow_client.get_run(logger.run_id).info.run_name == "my_run"
    assert os.listdir(tmp_path / "my_run") == ["tracking"]


def test_a_follower_that_was_killed_before_the_end_has_a_successor(
    server, followers, mlflow_client, checks, tmp_path
):
    """It would be too early to start another one for the next step, but not for the last."""
    logger, log = begin(tmp_path, server.uri)
    log({"loss": 1.0}, 1)
    wait_until(lambda: Outbox(tmp_path).position().step == 1)
    followers[0].kill()
    wait_until(lambda: followers[0].poll() is not None)
    log({"loss": 0.5}, 2)
    assert len(followers) == 1
    logger.close()
    assert len(followers) == 2
    figures = checks.history(mlflow_client, logger.run_id)
    assert figures == checks.expected(tmp_path / "metrics.jsonl") == {"loss": [(1, 1.0), (2, 0.5)]}
    assert mlflow_client.get_run(logger.run_id).info.status == "FINISHED"
