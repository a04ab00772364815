"""The evaluation's commands, killed and all: forked starts, as test_tune_run.py has them."""

import json
import signal
import time
from collections import Counter

import pytest

from wmtp_modules.sandbox.jobs import SandboxError
from wmtp_modules.sandbox.pool import Sandbox

RECIPE = "recipes/eval_mtp.py"
TRAINING = "recipes/rho1_wmtp_distributed.py"
NEWLINE = b"\n"

pytestmark = pytest.mark.slow


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
def quickstart(fork_server, tiny_quickstarts):
    """README's command in a few steps, after its model was trained as the command would."""
    folder = tiny_quickstarts.folder
    config = tiny_quickstarts.config("eval")
    done = fork_server.run([TRAINING, "--config", folder / "eval_base.yaml"], ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    args = ["--config", config, "generation.samples_per_task=2", "k=[1,2]"]
    done = fork_server.run([RECIPE, *args], ranks=2)
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


def kill_when(condition, started):
    """kill -9 the recipe as soon as ``condition()``; all that it started ends too."""
    deadline = time.monotonic() + 100
    while not condition():
        assert started.poll() == [None], f"it ended before it could be killed: {started.stderr}"
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    assert started.wait_for_end(60) == [-signal.SIGKILL]


def n_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_the_quickstart_tells_what_it_found_and_where_it_is(quickstart):
    _, done, folder = quickstart
    report = json.loads((folder / "eval" / "report.json").read_text())
    assert report["samples"] == 50 * 2 * 2
    assert report["reference_failures"] == []
    assert set(report["oracle_temperature"]) == {"1", "2"}
    assert report["published"] == []  # they are another benchmark's
    assert report["identical"] is True
    assert len(report["per_head"]) == 4
    assert "pass@1 at temperature" in done.stdout
    assert "head 3: loss" in done.stdout
    assert "tokens per forward" in done.stdout
    for name in ("report.json", "report.md", "report.png"):
        assert str(folder / "eval" / name) in done.stdout
        assert (folder / "eval" / name).exists()


def test_the_quickstart_again_does_nothing_twice(quickstart, forks):
    """Neither data nor model nor samples nor results are made again."""
    args, _, folder = quickstart
    names = ["samples.jsonl", "results.jsonl", "references.jsonl"]
    before = {name: (folder / "eval" / name).read_bytes() for name in names}
    model = folder / "eval_assets" / "model" / "last" / "consolidated.pth"
    made_at = model.stat().st_mtime_ns
    report = json.loads((folder / "eval" / "report.json").read_text())
    done = forks.run([RECIPE, *args], ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert before == {name: (folder / "eval" / name).read_bytes() for name in names}
    assert model.stat().st_mtime_ns == made_at
    again = json.loads((folder / "eval" / "report.json").read_text())
    for key in ("pass_at_k", "verdicts", "generation", "per_head"):
        assert again[key] == report[key]


def test_killed_in_mid_generation(quickstart, forks, tmp_path):
    """What was written stays, what is missing is made, and all is as if nothing had happened."""
    args, _, folder = quickstart
    args = [RECIPE, *args, f"output_dir={tmp_path}/out", "stages=[generate]"]
    args += ["generation.batch_size=7"]
    path = tmp_path / "out" / "samples.jsonl"
    kill_when(lambda: n_lines(path) >= 21, forks.start(args))
    kept = path.read_bytes().splitlines(keepends=True)
    assert len(kept) < 200
    done = forks.run(args)
    assert done.returncode == 0, done.stderr[-4000:]
    complete = [line for line in kept if line.endswith(b"\n")]
    assert path.read_bytes().startswith(b"".join(complete))
    whole = {row["key"]: row["completion"] for row in read_rows(folder / "eval/samples.jsonl")}
    rows = read_rows(path)
    assert Counter(row["key"] for row in rows) == Counter(whole.keys())
    assert {row["key"]: row["completion"] for row in rows} == whole


def test_killed_in_mid_execution(many, forks, tmp_path):
    args = [RECIPE, *many, f"output_dir={tmp_path}/out"]
    path = tmp_path / "out" / "results.jsonl"
    kill_when(lambda: n_lines(path) >= 20, forks.start(args))
    kept = path.read_bytes()
    done = forks.run(args)
    assert done.returncode == 0, done.stderr[-4000:]
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    rows = read_rows(path)
    assert len(rows) == len({row["key"] for row in rows}) == 200
    assert {row["verdict"] for row in rows} == {"pass"}
    assert f"results.jsonl: 200 programs, {kept.count(NEWLINE)} done already" in done.stderr


def test_a_full_disk_keeps_what_was_done(many, forks, tmp_path):
    """One sentence; with more room the same command goes on."""
    out = tmp_path / "out"
    args = [RECIPE, *many, f"output_dir={out}"]
    full = forks.run(args, full_disk=(out, 20))
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert "make room and start the same command again" in full.stderr.splitlines()[-1]
    kept = (out / "results.jsonl").read_bytes()
    assert 0 < kept.count(NEWLINE) < 200
    assert kept.endswith(b"\n")
    assert not (out / "report.json").exists()
    done = forks.run(args)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (out / "results.jsonl").read_bytes().startswith(kept)
    assert len({row["key"] for row in read_rows(out / "results.jsonl")}) == 200
