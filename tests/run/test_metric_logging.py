"""Metric loggers: lines of JSON that survive crashes and resumes; what a run tells of its code."""

import json
import os
import subprocess

import pytest
import torch

from wmtp_modules.run.metric_logging import JSONLLogger, code_version


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------- JSONL


def test_one_line_per_step_on_disk_at_once(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    logger = JSONLLogger(path)
    logger.log_dict({"loss": torch.tensor(1.5), "count": 3}, step=10)
    assert read_lines(path) == [{"step": 10, "loss": 1.5, "count": 3}]
    logger.log_dict({"val_loss": 2.0}, step=10)
    logger.log("loss", 1.25, step=20)
    assert read_lines(path) == [
        {"step": 10, "loss": 1.5, "count": 3, "val_loss": 2.0},
        {"step": 20, "loss": 1.25},
    ]
    logger.close()


def test_a_rewritten_line_may_become_shorter(tmp_path):
    logger = JSONLLogger(tmp_path / "metrics.jsonl")
    logger.log("loss", 1.23456789, step=1)
    logger.log("loss", 2, step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("-inf"))])
def test_non_finite_numbers_stay_valid_json(tmp_path, value):
    JSONLLogger(tmp_path / "metrics.jsonl").log("loss", value, step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JSONLLogger(path)
    for step in (10, 20, 30):
        logger.log("loss", step / 10, step)
    logger.close()
    with open(path, "a") as file:
        file.write('{"step": 40, "lo')
    logger = JSONLLogger(path, resume_step=20)
    logger.log("val_loss", 9.0, step=20)
    logger.log("loss", 3.5, step=30)
    assert read_lines(path) == [
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 2.0, "val_loss": 9.0},
        {"step": 30, "loss": 3.5},
    ]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_resume_of_damaged_bytes_names_the_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": \xff}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not a JSON object with a step"):
        JSONLLogger(tmp_path / "metrics.jsonl", resume_step=3)


def test_resume_step_0_starts_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JSONLLogger(path).log("val_loss", 1.0, step=0)
    JSONLLogger(path, resume_step=0).log("val_loss", 2.0, step=0)
    assert read_lines(path) == [{"step": 0, "val_loss": 2.0}]


@pytest.mark.parametrize("line", ["not json", '{"loss": 1}', "3"])
def test_resume_of_a_foreign_file_is_refused(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is not a JSON object with a step"):
        JSONLLogger(path, resume_step=5)
    assert path.read_text().endswith(line + "\n")


def test_code_version_of_a_git_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert not {"git.dirty", "mlflow.source.git.commit"} & code_version().keys()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    tags = code_version()
    assert (tags["mlflow.source.git.commit"], tags["git.dirty"]) == (head, "false")
    assert tags["version.torchtune"] == "0.6.1"
    (tmp_path / "changed").touch()
    assert code_version()["git.dirty"] == "true"
