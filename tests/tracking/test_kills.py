"""The promise as a whole: kill the server and the run as often as you like, nothing is lost."""

import json
import os
import random
import signal
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from wmtp_modules.tracking.outbox import Outbox

ROOT = Path(__file__).parents[2]
# A run in small: a step takes 50 ms, every 7th is a state to resume from.
RUN = """
    import json, sys, time
    from pathlib import Path
    from omegaconf import OmegaConf
    from wmtp_modules.run import metric_logging
    from wmtp_modules.run.metric_logging import JSONLLogger, MLflowLogger
    metric_logging.RESTART_S = 1.0
    folder, uri, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    state = folder / "state.json"
    step = json.loads(state.read_text()) if state.exists() else 0
    jsonl = JSONLLogger(folder / "metrics.jsonl", resume_step=step)
    logger = MLflowLogger("kills", uri, run_dir=folder, required=False, resume=bool(step) or None)
    logger.log_config(OmegaConf.create({"lr": 0.1}))
    longest = 0.0
    while step < last or not (folder / "enough").exists():
        step += 1
        time.sleep(0.05)
        started = time.perf_counter()
        for one in (jsonl, logger):
            one.log_dict({f"figure_{i}": step / (i + 1) for i in range(30)}, step)
        longest = max(longest, time.perf_counter() - started)
        if step % 10 == 0:
            for one in (jsonl, logger):
                one.log_dict({"val_loss": 1 / step}, step)
        if step % 7 == 0:
            state.with_suffix(".new").write_text(json.dumps(step))
            state.with_suffix(".new").replace(state)  # a kill leaves the one before
    logger.close(patience=200)
    print(logger.run_id, longest)
"""


def followers_of(folder):
    """Processes that follow this folder for MLflow."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        if "wmtp_modules.tracking.follow" in words and str(folder) in words:
            yield int(path.parent.name)


@pytest.mark.nightly  # minutes
@pytest.mark.parametrize("seed", [0, 1])
def test_20_kills_of_the_server_and_2_of_the_run(
    seed, server, forks, mlflow_client, checks, tmp_path
):
    """Between two kills something is delivered; every fourth time the follower is killed too."""
    draw, last = random.Random(seed), 900
    script, folder = tmp_path / "run.py", tmp_path / "run"
    script.write_text(textwrap.dedent(RUN))
    folder.mkdir()
    argv, kills, delivered = [script, folder, server.uri, last], 0, []

    def start():
        return forks.start(argv, env={"PYTHONPATH": str(ROOT)}, timeout=900)

    def kill_servers():
        nonlocal kills, delivered
        while kills < 20:
            before = Outbox(folder).position().step
            end = time.monotonic() + 120
            while (now := Outbox(folder).position().step) <= before:
                assert time.monotonic() < end
                time.sleep(0.02)
            delivered.append(now)
            time.sleep(draw.uniform(0.0, 1.5))  # in the middle of a call, or between two
            server.kill()
            if kills % 4 == 3:
                for pid in followers_of(folder):
                    os.kill(pid, signal.SIGKILL)
            kills += 1
            time.sleep(draw.uniform(0.0, 3.0))
            server.start()
        (folder / "enough").touch()

    run = start()
    killer = threading.Thread(target=kill_servers)
    killer.start()
    for at in sorted(draw.sample(range(100, last - 300), 2)):
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < at:
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
        run.wait()
        run = start()
    killer.join()
    assert run.wait(900) == [0], run.stderr[-3000:]
    assert kills == 20
    assert delivered == sorted({*delivered})  # each time the position had moved on
    run_id = Outbox(folder).position().run_id
    found = checks.history(mlflow_client, run_id)
    wanted, wrong = checks.expected(folder / "metrics.jsonl"), {}
    for name in sorted({*found, *wanted}):
        has, wants = found.get(name, []), wanted.get(name, [])
        steps = Counter(step for step, _ in has)
        lacks = [step for step, _ in wants if step not in steps]
        twice = [step for step, times in steps.items() if times > 1]
        if has != wants:
            wrong[name] = {"lacks": lacks[:9], "twice": twice[:9], "order": has == sorted(has)}
    assert wrong == {}, run.stderr[-3000:]
    info = mlflow_client.get_run(run_id).info
    assert info.status == "FINISHED"
    token = mlflow_client.get_run(run_id).data.tags["wmtp.run"]
    same = mlflow_client.search_runs([info.experiment_id], f"tags.`wmtp.run` = '{token}'")
    assert len(same) == 1
    print(json.dumps({"figures": sum(map(len, found.values())), "run": run.stdout}))
