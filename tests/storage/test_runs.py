"""Whole runs, two ranks and one, whose files are in a store."""

import hashlib
import json
import os
import re
import shutil
import signal
import time
from urllib.parse import quote

import pytest
import yaml

RHO1, EVAL = "recipes/rho1_wmtp_distributed.py", "recipes/eval_mtp.py"
pytestmark = pytest.mark.slow


PLANTED = {  # one of each kind
    "AWS_ACCESS_KEY_ID": "planted-key-id-of-aws",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+of-aws",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "HF_TOKEN": "hf_plantedplantedplantedplanted",
    "MLFLOW_TRACKING_PASSWORD": "planted-of-mlflow",
    "WMTP_TRACKING_URI": "http://me:planted-in-uri@127.0.0.1:{port}",
}
IN_TEXTS = (*list(PLANTED.values())[:-1], "planted-in-uri", "plant/ed@in-uri")


def found_in(places, texts):
    """Files and texts that hold something planted, however it is spelt."""
    spelt = {form.encode() for one in IN_TEXTS for form in (one, quote(one), quote(one, safe=""))}
    contents = {name: text.encode() for name, text in texts.items()}
    for place in places:
        contents |= {str(f): f.read_bytes() for f in place.rglob("*") if f.is_file()}
    assert len(contents) > len(texts)
    return [(name, one) for name, data in contents.items() for one in spelt if one in data]


def test_a_store_a_server_and_secrets(
    s3, server, forks, config, names, mlflow_client, tmp_path, monkeypatch
):
    """Two ranks against both: sound, resumed on an empty disk, failed. No byte has a secret."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value.format(port=server.port))
    where = tmp_path / "environment.yaml"
    own = {"root": "s3://bucket", "cache": str(tmp_path / "cache")}
    tracking = {"uri": "${oc.env:WMTP_TRACKING_URI}"}
    where.write_text(yaml.safe_dump({"storage": own, "tracking": tracking}))
    place = "${oc.select:storage.root,runs}/run"
    file = config(output_dir=place, metric_logger=None, storage=None, max_steps=2)
    text = file.read_text().replace("storage: null\n", "").replace("metric_logger: null\n", "")
    file.write_text(text)
    command, texts = [RHO1, "--config", file, f"environment={where}"], {}

    first = forks.run(command, ranks=2)
    assert first.wait() == [0, 0], first.stderr
    texts |= {"first out": first.stdout, "first err": first.stderr}
    assert {"summary.json", "last/params.json", "tracking/run.json"} <= names()

    def objects():
        page = s3.list_objects_v2(Bucket="bucket")
        keys = [one["Key"] for one in page["Contents"]]
        return {k: s3.get_object(Bucket="bucket", Key=k)["Body"].read() for k in keys}

    def read(name):
        return json.loads(objects()[f"run/{name}"])

    run_id = re.search(r"run (\w{32}) in http", read("summary.json")["tracking"])[1]
    run = mlflow_client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["output_dir"] == "s3://bucket/run"
    shutil.rmtree(tmp_path / "cache")
    second = forks.run([*command, "max_steps=4"], ranks=2)
    assert second.wait() == [0, 0], second.stderr
    texts |= {"second out": second.stdout, "second err": second.stderr}
    assert "Resumed" in second.stdout + second.stderr
    history = mlflow_client.get_metric_history(run_id, "loss")
    assert [one.step for one in history] == [1, 2, 3, 4]
    assert mlflow_client.get_run(run_id).info.status == "FINISHED"

    monkeypatch.setenv("WMTP_TRACKING_URI", "http://me:plant/ed@in-uri@127.0.0.1:9/")
    third = forks.run([*command, "max_steps=6", "tracking.required=true"], ranks=2)
    assert third.wait()[0] == 1  # the launcher would end the other one
    assert "cannot be used" in third.stderr
    assert "Traceback" not in third.stderr
    texts |= {"third out": third.stdout, "third err": third.stderr}
    texts |= {f"s3 {name}": data.decode("latin-1") for name, data in objects().items()}
    assert found_in([tmp_path, server.folder], texts) == []


@pytest.mark.nightly
def test_from_the_store_into_the_store(s3, forks, config, names, tmp_path):
    """Trained, gone on with on an empty disk by other ranks, and evaluated: all by URL."""
    first = forks.run([RHO1, "--config", config()], ranks=2)
    assert first.wait() == [0, 0], first.stderr
    assert "not in s3" not in first.stderr
    assert "Store        s3://bucket/run" in first.stdout
    kept = names()
    assert {n.split("/")[1] for n in kept if n[:9] == "training_"} == {"step_000004"}
    assert {"summary.json", "config.yaml", "metrics.jsonl", "best/consolidated.pth"} <= kept
    assert {"last/params.json", "training_state/step_000004/manifest.json"} <= kept
    assert not {n for n in kept if "incomplete" in n or "lock" in n or "store.json" in n}

    def read(name):
        return s3.get_object(Bucket="bucket", Key=f"run/{name}")["Body"].read().decode()

    assert yaml.safe_load(read("config.yaml"))["dataset"]["source"] == "s3://bucket/train.jsonl"
    assert str(tmp_path) not in read("config.yaml").replace(str(tmp_path / "logs"), "").replace(
        str(tmp_path / "cache"), ""
    )
    shutil.rmtree(tmp_path / "cache")
    file = config(max_steps=6, batch_size=4, storage={"cache": str(tmp_path / "other")})
    second = forks.run([RHO1, "--config", file])
    assert second.wait() == [0], second.stderr
    assert re.search(r"Resumed \S*step_000004 after step 4", second.stderr + second.stdout)
    steps = [json.loads(line)["step"] for line in read("metrics.jsonl").splitlines()]
    assert steps == [0, 1, 2, 3, 4, 5, 6]
    assert {n.split("/")[1] for n in names() if n[:9] == "training_"} == {"step_000006"}
    assert json.loads(read("summary.json"))["steps"] == 6

    evaluation = {
        "output_dir": "s3://bucket/evaluation",
        "storage": {"cache": str(tmp_path / "third")},
        **{"stages": ["heldout"], "device": "cpu", "dtype": "fp32", "seed": 1},
        "checkpointer": {"checkpoint_dir": "s3://bucket/run/best"},
        "tokenizer": {
            "_component_": "torchtune.models.llama2.llama2_tokenizer",
            "path": "${checkpointer.checkpoint_dir}/tokenizer.model",
            "max_seq_len": None,
        },
        "heldout": {"source": "s3://bucket/val.jsonl", "batch_tokens": 128},
    }
    file.write_text(yaml.safe_dump(evaluation))
    third = forks.run([EVAL, "--config", file])
    assert third.wait() == [0], third.stderr
    assert {"config.yaml"} < names("evaluation/")
    assert any("report" in name or "evaluation" in name for name in names("evaluation/"))


@pytest.mark.nightly
def test_the_store_goes_away_in_the_middle(s3, refuse_keys, forks, config, names):
    """The run goes on to its end, which says what is not up; sync sends it later."""
    refuse_keys(16)
    run = forks.run([RHO1, "--config", config()])
    assert run.wait() == [0], run.stderr
    told = [line for line in run.stderr.splitlines() if "wmtp_modules.sync" in line]
    assert len(told) == 1
    assert "s3://bucket/run" in told[0]
    assert "AWS_ACCESS_KEY_ID" in told[0]
    refuse_keys(None)
    folder = re.search(r"sync (\S+)`", told[0])[1]
    sent = forks.run(["-m", "wmtp_modules.sync", folder])
    assert sent.wait() == [0], sent.stderr
    assert {"summary.json", "last/params.json"} <= names()
    assert not {n for n in names() if "incomplete" in n}


@pytest.mark.parametrize("fault", ["bucket", "keys"])
def test_a_store_that_cannot_be_used_is_one_sentence(forks, config, refuse_keys, fault):
    if fault == "keys":
        refuse_keys()
    file = config(output_dir="s3://bucket/run" if fault == "keys" else "s3://gone/run")
    run = forks.run([RHO1, "--config", file])
    assert run.wait() == [1]
    (told,) = [line for line in run.stderr.splitlines() if "StoreError" in line]
    assert "Traceback" not in run.stderr
    assert ("s3://gone/run" if fault == "bucket" else "AWS_ACCESS_KEY_ID") in told


@pytest.mark.nightly
def test_a_run_that_is_told_to_stop(s3, server, mlflow_client, forks, config, names):
    """It saves, sends what it can in a few seconds, and what is in the store is whole."""
    own = {"metric_logger": None, "tracking": {"uri": server.uri}}
    file = config(max_steps=2000, save_every_n_steps=20, run_val_every_n_steps=2000, **own)
    run = forks.start([RHO1, "--config", file])
    end = time.monotonic() + 200

    def is_tracked():  # what follows the run takes seconds to start
        return any(one.name == "wmtp" for one in mlflow_client.search_experiments())

    while not (any(name.endswith("manifest.json") for name in names()) and is_tracked()):
        assert time.monotonic() < end
        assert run.poll() == [None], run.stderr
        time.sleep(0.2)
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.wait() == [75], run.stderr

    def read(name):
        return s3.get_object(Bucket="bucket", Key=f"run/{name}")["Body"].read()

    states = {n.split("/")[1] for n in names() if n.endswith("manifest.json")}
    assert states
    for state in states - {n.split("/")[1] for n in names() if n.endswith(".incomplete")}:
        manifest = read(f"training_state/{state}/manifest.json")
        for name, known in json.loads(manifest)["files"].items():
            data = read(f"training_state/{state}/{name}")
            assert hashlib.sha256(data).hexdigest() == known["sha256"]
    left = "wmtp_modules.sync" in run.stderr
    step = int(re.search(r"after step (\d+), which is saved", run.stderr)[1])
    if not left:
        assert states == {f"step_{step:06d}"}
        assert json.loads(read("exit.json")) == {"reason": "SIGTERM", "step": step}
        assert b"Stopped by SIGTERM" in read("run.html")
    (experiment,) = [e for e in mlflow_client.search_experiments() if e.name == "wmtp"]
    (tracked,) = mlflow_client.search_runs([experiment.experiment_id], max_results=1)
    assert (tracked.info.status, tracked.data.tags["exit_reason"]) == ("KILLED", "SIGTERM")
    pictures = {one.path for one in mlflow_client.list_artifacts(tracked.info.run_id)}
    assert "run.html" in pictures
