"""A whole run on two ranks whose servers and disk fail in the middle."""

import json
import os
import re
import shutil
import signal
import time

import pytest

RHO1 = "recipes/rho1_wmtp_distributed.py"
pytestmark = pytest.mark.nightly  # tests of this folder and of tracking have each fault by itself


def test_two_ranks_go_on_whatever_goes_away(
    s3, server, mlflow_client, refuse_keys, forks, config, names, tmp_path
):
    """The tracking server, the keys, the bucket, all in the middle; at last this disk is full."""
    file = config(metric_logger=None, tracking={"uri": server.uri}, max_steps=20000)
    more = ["save_every_n_steps=40", "run_val_every_n_steps=20000"]
    run = forks.start([RHO1, "--config", file, *more], ranks=2)

    def wait_until(what):
        end = time.monotonic() + 150
        while not what():
            assert time.monotonic() < end
            assert run.poll() == [None, None], run.stderr
            time.sleep(0.1)

    def is_saved():
        return any(name.endswith("manifest.json") for name in names())

    wait_until(is_saved)
    server.kill()
    wait_until(lambda: f"{server.uri} cannot be used" in run.stderr)
    refuse_keys()
    wait_until(lambda: "refuses the credentials" in run.stderr)
    refuse_keys(None)
    server.start()
    wait_until(lambda: "has got everything" in run.stderr)
    while names():  # a state may be on its way
        for name in names():
            s3.delete_object(Bucket="bucket", Key=f"run/{name}")
    kept = [one["Key"] for one in s3.list_objects_v2(Bucket="bucket")["Contents"]]
    kept = {key: s3.get_object(Bucket="bucket", Key=key)["Body"].read() for key in kept}
    for key in kept:
        s3.delete_object(Bucket="bucket", Key=key)
    s3.delete_bucket(Bucket="bucket")
    wait_until(lambda: "no bucket bucket" in run.stderr)
    s3.create_bucket(Bucket="bucket")
    for key, data in kept.items():
        s3.put_object(Bucket="bucket", Key=key, Body=data)
    wait_until(is_saved)
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.wait() == [75, 75], run.stderr
    assert "Traceback" not in run.stderr
    step = int(re.search(r"after step (\d+), which is saved", run.stderr)[1])

    if "wmtp_modules.sync" in run.stderr:  # it had only seconds
        folder = re.search(r"sync (\S+)`", run.stderr)[1]
        sent = forks.run(["-m", "wmtp_modules.sync", folder])
        assert sent.wait() == [0], sent.stderr
    shutil.rmtree(tmp_path / "cache")
    end = [f"max_steps={step + 4}", "save_every_n_steps=2", *more[1:]]
    second = forks.run([RHO1, "--config", file, *end], ranks=2)
    assert second.wait() == [0, 0], second.stderr
    assert f"after step {step}" in second.stdout + second.stderr
    lines = s3.get_object(Bucket="bucket", Key="run/metrics.jsonl")["Body"].read().splitlines()
    wanted = [json.loads(line)["step"] for line in lines if b'"loss"' in line]
    assert wanted == [*range(1, step + 5)]
    run_id = json.loads(s3.get_object(Bucket="bucket", Key="run/summary.json")["Body"].read())
    run_id = re.search(r"run (\w{32})", run_id["tracking"])[1]
    assert [one.step for one in mlflow_client.get_metric_history(run_id, "loss")] == wanted

    end[0] = f"max_steps={step + 8}"
    full = (tmp_path / "cache", "training_state/")
    third = forks.run([RHO1, "--config", file, *end], ranks=2, full_disk=full)
    assert third.wait()[0] == 1
    assert "No space left on device" in third.stderr
    assert "Traceback" not in third.stderr
    fourth = forks.run([RHO1, "--config", file, *end], ranks=2)
    assert fourth.wait() == [0, 0], fourth.stderr
    assert f"after step {step + 4}" in fourth.stdout + fourth.stderr
