"""A run of two ranks, killed with -9 again and again, against the same run left alone.

    uv run python benchmarks/kill_resume.py --kills 50

All its processes are killed together at random moments, while they train, save and start, and the
same command goes on. At the end its parameters have to be the ones of the uninterrupted run, bit
for bit, and no state that had its name may have been lost or damaged by a kill. Files go to
runs/kill_resume.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from common import hardware

from wmtp_modules.files import file_hash
from wmtp_modules.quickstarts.stdlib import prepare_stdlib
from wmtp_modules.run.training_state import MANIFEST

WITHOUT_TIME = ("tokens_per_s", "memory_gib")


def command(folder: Path, assets: Path, steps: int) -> list[str]:
    overrides = {
        "output_dir": folder,
        "assets_dir": assets,
        "resume_from_checkpoint": "true",
        # Depends on the joint micro-batch and on its number: a wrong position would show.
        "weighting.name": "random_topk",
        "max_steps": steps,
        "save_every_n_steps": 3,
        "keep_last": 2,
        "run_val_every_n_steps": steps // 8,
        "log_every_n_steps": 1,
        "batch_size": 4,
    }
    return [
        *(str(Path(sys.executable).with_name("tune")), "run", "--nproc_per_node", "2"),
        *("recipes/rho1_wmtp_distributed.py", "--config", "configs/quickstart/base.yaml"),
        *(f"{key}={value}" for key, value in overrides.items()),
    ]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    with log.open("a") as file:
        return subprocess.Popen(
            arguments,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def family(pid: int) -> list[int]:
    """A process and all that it started, from /proc."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(status.parent.name)] = int(fields[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def kill_all(launcher: subprocess.Popen) -> None:
    """The launcher first, stopped so that it starts nothing and tells its workers nothing."""
    launcher.send_signal(signal.SIGSTOP)
    for pid in family(launcher.pid)[1:]:
        os.kill(pid, signal.SIGKILL)
    launcher.kill()
    launcher.wait()


def last_step(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if len(lines) > 1 else 0


def damaged_bytes(folder: Path) -> tuple[int, int]:
    """Bytes of the states that have their name, and how many of these are missing or changed."""
    total = damaged = 0
    for state in (folder / "training_state").glob("step_*"):
        if state.suffix:
            continue
        for name, entry in json.loads((state / MANIFEST).read_text())["files"].items():
            total += entry["size"]
            path = state / name
            sound = path.exists() and file_hash(path) == entry["sha256"]
            damaged += 0 if sound else entry["size"]
    return total, damaged


def let_it_live(launcher: subprocess.Popen, folder: Path, rng: random.Random) -> str:
    """Wait until a random moment; what is under way then."""
    if rng.random() < 0.1:
        time.sleep(rng.uniform(0, 20))
        return "starting"
    before = last_step(folder)
    while launcher.poll() is None and last_step(folder) <= before:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 1))
    is_saving = any((folder / "training_state").glob("*.partial"))
    return "saving" if is_saving else "training"


def figures(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in WITHOUT_TIME} for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/kill_resume"))
    args = parser.parse_args()
    print(hardware())
    rng = random.Random(args.seed)
    shutil.rmtree(args.output_dir, ignore_errors=True)
    assets, killed, whole = (args.output_dir / name for name in ("assets", "killed", "whole"))
    prepare_stdlib(str(assets), vocab_size=1024, corrupted_share=0.4, seed=0)
    log = args.output_dir / "log.txt"
    arguments = command(killed, assets, args.steps)

    moments: Counter[str] = Counter()
    states, lost, kills, ends = 0, 0, 0, 0
    while kills < args.kills:
        if (killed / "summary.json").exists():  # killed too late: this run is over, begin another
            shutil.rmtree(killed)
            ends += 1
        launcher = start(arguments, log)
        under_way = let_it_live(launcher, killed, rng)
        if launcher.poll():
            print(f"FAIL: a start ended by itself, see {log}")
            return 1
        if launcher.poll() is None:
            moments[under_way] += 1
            kill_all(launcher)
            kills += 1
            total, damaged = damaged_bytes(killed)
            states, lost = states + total, lost + damaged
    starts = log.read_text().count("Resumed ")
    for folder in (killed, whole):
        if start(command(folder, assets, args.steps), log).wait():
            print(f"FAIL: see {log}")
            return 1

    got, want = (
        torch.load(folder / "last" / "consolidated.pth", weights_only=True)
        for folder in (killed, whole)
    )
    same = got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    same_figures = figures(killed) == figures(whole)
    where = ", ".join(f"{n} while {what}" for what, n in sorted(moments.items()))
    print(f"{kills} kills -9 of two ranks ({where}), {starts} times resumed from a state")
    print(f"{args.steps} steps; {ends} runs that came to their end before the last kill")
    print(f"final parameters equal to the bit: {same}; all logged figures equal: {same_figures}")
    print(
        f"{lost} of {states} bytes of completed states lost or damaged, looked at after each kill"
    )
    passed = same and same_figures and not lost and kills == args.kills
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
