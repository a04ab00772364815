"""The evaluation's commands as a user types them: real `tune run` processes, killed and all."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from wmtp_modules.sandbox.jobs import SandboxError
from wmtp_modules.sandbox.pool import Sandbox

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/eval_mtp.py"

NEWLINE = b"\n"

pytestmark = pytest.mark.slow


def command(*args, ranks=None):
    launcher = ["--nproc_per_node", str(ranks)] if ranks else []
    return [Path(sys.executable).with_name("tune"), "run", *launcher, RECIPE, *map(str, args)]


def tune_run(*args, ranks=None, timeout=900):
    return subprocess.run(
        command(*args, ranks=ranks),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    """A sandbox tier is there."""
    try:
        with Sandbox(workers=1):
            pass
    except SandboxError as error:
        pytest.skip(f"no sandbox here: {error}")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """configs/quickstart/eval.yaml as README has it, with its files elsewhere."""
    folder = tmp_path_factory.mktemp("quickstart_eval")
    args = ["--config", "configs/quickstart/eval.yaml", f"output_dir={folder}/eval"]
    args += [f"assets_dir={folder}/assets"]
    args += [f"metric_logger.tracking_uri=sqlite:///{folder}/mlflow.db"]
    done = tune_run(*args, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    return args, done, folder


@pytest.fixture
def many(tmp_path):
    """Tasks and as many ready-made samples, each of which takes a moment."""
    tasks = [
        {
            "task_id": f"Own/{n}",
            "prompt": f"def f{n}(x):\n",
            "entry_point": f"f{n}",
            "canonical_solution": "    return x\n",
            "test": "def check(candidate):\n    assert candidate(1) == 1\n",
        }
        for n in range(2)
    ]
    slow = "    import time\n    time.sleep(0.05)\n    return x\n"
    samples = [{"task_id": f"Own/{n % 2}", "completion": slow} for n in range(200)]
    for name, rows in {"tasks": tasks, "samples": samples}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--config", "configs/eval/score.yaml", "task=humaneval"),
        *(f"source={tmp_path}/tasks.jsonl", f"samples={tmp_path}/samples.jsonl"),
    ]


def kill_when(condition, args):
    """Start a run in a session of its own and kill -9 the recipe as soon as ``condition()``."""
    process = subprocess.Popen(
        command(*args),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while survivors := processes_of_session(process.pid):
        assert time.monotonic() < deadline, f"left behind: {survivors}"
        time.sleep(0.1)


def processes_of_session(session):
    """Command lines of the processes of a session, zombies left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[3] == str(session) and fields[0] != "Z":
                found.append((folder / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return found


def n_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_the_quickstart_solves_tasks_that_it_has_not_seen(quickstart):
    _, _, folder = quickstart
    report = json.loads((folder / "eval" / "report.json").read_text())
    assert report["pass_at_k"]["1"]["value"] > 0.2
    assert report["pass_at_k"]["1"]["low"] > 0
    assert report["reference_failures"] == []
    assert report["samples"] == 50 * 10 * 2
    assert set(report["oracle_temperature"]) == {"1", "5", "10"}
    assert report["published"] == []  # they are another benchmark's
    assert report["identical"] is True
    assert report["tokens_per_forward"] > 1.3
    losses = [row["loss"] for row in report["per_head"]]
    assert losses == sorted(losses)  # the farther, the harder


def test_the_quickstart_tells_what_it_found_and_where_it_is(quickstart):
    _, done, folder = quickstart
    assert "pass@1 at temperature 0.2" in done.stdout
    assert "head 3: loss" in done.stdout
    assert "tokens per forward" in done.stdout
    for name in ("report.json", "report.md", "report.png"):
        assert str(folder / "eval" / name) in done.stdout
        assert (folder / "eval" / name).exists()


def test_the_quickstart_again_does_nothing_twice(quickstart):
    """Neither data nor model nor samples nor results are made again."""
    args, _, folder = quickstart
    names = ["samples.jsonl", "results.jsonl", "references.jsonl"]
    before = {name: (folder / "eval" / name).read_bytes() for name in names}
    model = (folder / "assets" / "model" / "last" / "consolidated.pth").stat().st_mtime_ns
    report = json.loads((folder / "eval" / "report.json").read_text())
    done = tune_run(*args, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert before == {name: (folder / "eval" / name).read_bytes() for name in names}
    assert (folder / "assets/model/last/consolidated.pth").stat().st_mtime_ns == model
    again = json.loads((folder / "eval" / "report.json").read_text())
    for key in ("pass_at_k", "verdicts", "generation", "per_head"):
        assert again[key] == report[key]


def test_killed_in_mid_generation(quickstart, tmp_path):
    """What was written stays, what is missing is made, and all is as if nothing had happened."""
    args, _, folder = quickstart
    args = [*args, f"output_dir={tmp_path}/out", "stages=[generate]", "generation.batch_size=7"]
    path = tmp_path / "out" / "samples.jsonl"
    kill_when(lambda: n_lines(path) >= 21, args)
    kept = path.read_bytes().splitlines(keepends=True)
    assert len(kept) < 1000
    done = tune_run(*args)
    assert done.returncode == 0, done.stderr[-4000:]
    complete = [line for line in kept if line.endswith(b"\n")]
    assert path.read_bytes().startswith(b"".join(complete))
    whole = {row["key"]: row["completion"] for row in read_rows(folder / "eval/samples.jsonl")}
    rows = read_rows(path)
    assert Counter(row["key"] for row in rows) == Counter(whole.keys())
    assert {row["key"]: row["completion"] for row in rows} == whole


def test_killed_in_mid_execution(many, tmp_path):
    args = [*many, f"output_dir={tmp_path}/out"]
    path = tmp_path / "out" / "results.jsonl"
    kill_when(lambda: n_lines(path) >= 20, args)
    kept = path.read_bytes()
    done = tune_run(*args)
    assert done.returncode == 0, done.stderr[-4000:]
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    rows = read_rows(path)
    assert len(rows) == len({row["key"] for row in rows}) == 200
    assert {row["verdict"] for row in rows} == {"pass"}
    assert f"results.jsonl: 200 programs, {kept.count(NEWLINE)} done already" in done.stderr


def test_a_full_disk_keeps_what_was_done(many, tmp_path):
    """One sentence; with more room the same command goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk is a mounted tmpfs, which takes root")
    try:
        args = [*many, f"output_dir={disk}/out"]
        full = tune_run(*args)
        assert full.returncode == 1
        assert "Traceback" not in full.stderr
        assert "make room and start the same command again" in full.stderr.splitlines()[-1]
        path = disk / "out" / "results.jsonl"
        kept = path.read_bytes()
        assert 20 < kept.count(NEWLINE) < 200
        assert kept.endswith(b"\n")
        assert not (disk / "out" / "report.json").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        done = tune_run(*args)
        assert done.returncode == 0, done.stderr[-4000:]
        assert path.read_bytes().startswith(kept)
        assert len({row["key"] for row in read_rows(path)}) == 200
    finally:
        subprocess.run(["umount", str(disk)], check=True)
