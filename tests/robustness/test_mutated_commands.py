"""20 damaged inputs through the command line, each a real process: it runs or says one sentence."""

import os
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OF_CONFIG, OF_FILES = 12, 8
MOST_SECONDS = 15
# Of a sound command's time right after it, where a slow machine takes longer than that.
MOST_TIMES_A_SOUND_ONE = 1.5

pytestmark = pytest.mark.slow


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tune_run(config: Path, out: Path) -> tuple[subprocess.CompletedProcess, float, float]:
    """A run as its user starts it; with its seconds of the processor and by the clock."""
    command = [Path(sys.executable).with_name("tune"), "run", "recipes/rho1_wmtp_distributed.py"]
    command += ["--config", config, f"output_dir={out}"]
    used, started = processor_seconds(), time.monotonic()
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(out.parent / "hf")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done, processor_seconds() - used, time.monotonic() - started


def takes_too_long(config: Path, sound: Path, folder: Path) -> str:
    """What a command that took too long once takes beside a sound one; "" if it is no slower."""
    said = []
    for attempt in range(3):
        _, used, _ = tune_run(config, folder / f"slow_{attempt}")
        done, beside, _ = tune_run(sound, folder / f"sound_{attempt}")
        assert done.returncode == 0, done.stderr[-1500:]
        said.append(f"{used:.1f} s beside {beside:.1f} s of a sound one")
        print(f"    again: {said[-1]}")
        if used <= max(MOST_SECONDS, MOST_TIMES_A_SOUND_ONE * beside):
            return ""
    return ", ".join(said)


def test_mutated_commands(small_config, text_rows, tmp_path, mutate, tiny_tokenizer_path):
    rng, problems, ran, slowest = random.Random(3), [], 0, 0.0
    (sound := tmp_path / "sound.yaml").write_text(small_config)
    for number in range(OF_CONFIG + OF_FILES):
        path, out = tmp_path / f"run_{number}.yaml", tmp_path / f"out_{number}"
        text = small_config
        names = {path.name, *re.findall(r"[\w.]+(?=:)", small_config)}
        if number < OF_CONFIG:
            path.write_bytes(mutate.change_config(text, rng))
        else:
            original = rng.choice(
                (text_rows / "train.jsonl", text_rows / "val.jsonl", tiny_tokenizer_path)
            )
            damaged = tmp_path / f"damaged_{number}{original.suffix}"
            change = mutate.change_json if original.suffix == ".jsonl" else mutate.change_bytes
            damaged.write_bytes(change(original.read_bytes(), rng))
            path.write_text(text.replace(str(original), str(damaged)))
            names = {damaged.name}
        done, used, wall = tune_run(path, out)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else ""
        print(f"{number}: exit {done.returncode}, {used:.1f} s ({wall:.1f} s), {said[:150]}")
        ran, slowest = ran + (done.returncode == 0), max(slowest, used)
        if "Traceback" in done.stderr:
            problems.append(f"{number}: {done.stderr[-1500:]}")
        elif (done.returncode == 0) != (out / "summary.json").exists():
            problems.append(f"{number}: exit {done.returncode}, files {list(out.glob('*'))}")
        elif done.returncode and not any(name in done.stderr for name in names):
            problems.append(f"{number}: does not name what is wrong: {said}")
        elif used > MOST_SECONDS:  # of the processor: others may keep this one waiting
            (again := tmp_path / f"again_{number}").mkdir()
            if slow := takes_too_long(path, sound, again):
                problems.append(f"{number}: took {used:.1f} s, {slow}")
    print(f"{ran} ran, {OF_CONFIG + OF_FILES - ran} refused, the slowest took {slowest:.1f} s")
    assert not problems, "\n".join(problems)
