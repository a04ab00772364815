"""What MLflow has, beside what a run's file has; processes that follow runs, forked."""

import json
import os
import subprocess
from pathlib import Path

import pytest


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def history(client, run_id: str) -> dict[str, list]:
    """(step, value) of each figure in the order in which MLflow has got them."""
    keys = client.get_run(run_id).data.metrics
    return {
        key: [(m.step, m.value) for m in client.get_metric_history(run_id, key)] for key in keys
    }


def expected(path: Path) -> dict[str, list]:
    """The same from a run's file."""
    found: dict[str, list] = {}
    for line in lines_of(path):
        step = line.pop("step")
        for key, value in line.items():
            found.setdefault(key, []).append((step, value))
    return found


@pytest.fixture
def checks():
    class Checks:
        history = staticmethod(history)
        expected = staticmethod(expected)

    return Checks


class Forked:
    """A process of the fork server behind what is used of ``subprocess.Popen``."""

    def __init__(self, forks, command: list[str], env: dict[str, str]) -> None:
        changes = {key: value for key, value in env.items() if os.environ.get(key) != value}
        self.started = forks.start(command[1:], env=changes, timeout=900)

    def poll(self) -> int | None:
        return self.started.poll()[0]

    def kill(self) -> None:
        self.started.send_signal(9)


@pytest.fixture
def followers(forks, monkeypatch):
    """Processes that follow runs, which are forked: importing MLflow takes seconds."""
    made: list[Forked] = []

    real = subprocess.Popen

    def popen(command, *args, **options):
        if "wmtp_modules.tracking.follow" not in command:
            return real(command, *args, **options)
        made.append(Forked(forks, command, options["env"]))
        return made[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    return made
