"""A finished run goes into the registry of a real server, and out of it into a folder."""

import json
import re
import shutil

import pytest
import torch

from wmtp_modules.checkpoints.read import Checkpoint
from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.sharding import init_weights_
from wmtp_modules.registry.__main__ import main
from wmtp_modules.registry.card import model_card
from wmtp_modules.registry.models import Registry, register_run

LOSSES = {"base": [3.0, 4.0], "longer|run": [2.5, 3.5], "rho1": [2.0, 3.25]}


@pytest.fixture
def make_run(tmp_path, tiny_model_args, tiny_tokenizer_path):
    """make_run(seed): the folder of a finished run."""

    def make(seed: int = 0):
        folder = tmp_path / f"run_{seed}"
        model = mtp_llama2(**tiny_model_args)
        init_weights_(model, seed)
        save_meta(model, folder / "best", tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
        summary = {
            "steps": 1200,
            "heldout_loss": LOSSES,
            "tokens_per_forward": {"base": 1.25, "rho1": 1.5},
            "controls": {"longer|run": {"max_steps": 2000}},
            "data": {"tokens": 12345, "packs": 67},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        config = {
            "checkpointer": {"checkpoint_dir": "/models/`7B`"},
            "weighting": {"name": "rho1", "ratio": 0.6},
            "dataset": {"source": "s3://user:hunter2@bucket/train.jsonl"},
            "max_steps": 1200,
        }
        (folder / "config.yaml").write_text(json.dumps(config))
        return folder

    return make


def test_from_a_run_to_a_folder_that_recipes_take(server, make_run, tmp_path, capsys):
    run = make_run()
    uri = f"--uri={server.uri}"
    assert main([uri, "register", str(run), "tiny mtp"]) == 0
    assert "tiny mtp version 1 registered (@candidate)" in capsys.readouterr().out
    # The same weights are the same version; others are another.
    assert main([uri, "register", str(run), "tiny mtp"]) == 0
    assert "version 1 was registered" in capsys.readouterr().out
    assert main([uri, "register", str(make_run(1)), "tiny mtp"]) == 0
    assert main([uri, "fetch", "tiny mtp", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err
    assert "has no version production: it has @candidate, 1, 2" in said
    assert main([uri, "promote", "tiny mtp", "1"]) == 0
    assert main([uri, "fetch", "tiny mtp", str(tmp_path / "got")]) == 0
    shutil.rmtree(run)  # a version is a copy
    assert main([uri, "fetch", "tiny mtp", str(tmp_path / "again"), "--which", "1"]) == 0
    first, second = (Checkpoint(tmp_path / name) for name in ("got", "again"))
    wanted = mtp_llama2(**first.args)
    init_weights_(wanted, 0)
    kept = {key: tensor.detach() for key, tensor in wanted.named_parameters()}
    assert kept
    for key, tensor in kept.items():
        assert torch.equal(first.read(key), tensor)
        assert torch.equal(second.read(key), tensor)
    assert (tmp_path / "got" / "README.md").read_text().startswith("---\nlicense: other")
    capsys.readouterr()
    assert main([uri, "list", "tiny mtp"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"2  @candidate +run \w+", lines[0])
    assert re.match(r"1  @production +run \w+", lines[1])


def test_without_a_uri_it_is_the_environment_s(make_run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WMTP_TRACKING_URI", raising=False)
    monkeypatch.setenv("WMTP_ENVIRONMENT", "cluster")
    assert main(["list", "nobody"]) == 1
    assert "WMTP_TRACKING_URI" in capsys.readouterr().err
    monkeypatch.setenv("WMTP_TRACKING_URI", f"sqlite:///{tmp_path}/mine.db")
    assert main(["list", "nobody"]) == 1
    assert f"registered in sqlite:///{tmp_path}/mine.db" in capsys.readouterr().err


def test_what_was_changed_in_the_store_is_not_handed_out(server, make_run, tmp_path):
    run, registry = make_run(), Registry(server.uri)
    version, _ = registry.register(run, "m")
    (found,) = registry._search("m")
    other = make_run(1) / "best" / "consolidated.pth"
    path = found.source.partition("mlflow-artifacts:/")[2].partition("/models/")
    registry._client.log_artifact(found.run_id, str(other), f"models/{path[2]}")
    with pytest.raises(ValueError, match="version 1 of m is not what was registered"):
        registry.fetch("m", tmp_path / "got", version)
    assert not (tmp_path / "got").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(ValueError, match="mine holds something"):
        registry.fetch("m", tmp_path / "mine", version)


def test_a_registry_that_is_away_is_a_warning_with_the_command(make_run, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = make_run()
    register_run(run, "m")
    assert "The model is not registered" in caplog.text
    assert f"python -m wmtp_modules.registry register {run} m" in caplog.text
    assert "hunter2" not in caplog.text


def test_mistakes_are_one_sentence(make_run, tmp_path, capsys):
    places = {"run": make_run(), "tmp": tmp_path}
    for argv, message in (
        (["promote", "nobody"], "no model nobody is registered"),
        (["register", "{run}", "a/b"], "cannot name a model"),
        (["register", "{tmp}", "m"], "no training run has ended there"),
        (["register", "{run}", "m", "--evaluation", "{tmp}"], "report.json is not there"),
    ):
        words = [part.format(**places) for part in argv]
        assert main([f"--uri=sqlite:///{tmp_path}/mlflow.db", *words]) == 1
        *_, said = capsys.readouterr().err.splitlines()  # MLflow may say that it makes a file
        assert said.startswith("error: ")
        assert message in said


def test_the_card_says_what_the_folder_says(make_run, tmp_path):
    run = make_run()
    (tmp_path / "report.json").write_text(json.dumps({"pass": {"pass@1": 0.25}, "n": 3}))
    card = model_card(run, "m", tmp_path)
    assert "| base | 3.0000 | 4.0000 | 3.5000 | 1.25 |  |" in card
    assert r"| longer\|run | 2.5000 | 3.5000 | 3.0000 |  | `max_steps=2000` |" in card
    assert "| pass.pass@1 | 0.2500 |" in card
    assert "for 1,200 steps with `rho1` weights" in card
    assert "12,345 tokens, 67 packs" in card
    assert "hunter2" not in card
    assert "ratio: 0.6" in card
