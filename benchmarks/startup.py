"""What it costs to be told of a typo: `tune run` to its config error against a bare `tune --help`.

    uv run python benchmarks/startup.py

Processor seconds, user and system, of one process each, nearly all of them torchtune's and torch's.
Pairs alternate, and the median of their ratios has to be at most 1.05. Beside other work single
pairs differ by a fifth either way: run it on an idle machine. The clock's seconds stand beside.
Then what the second imports beyond the first, by package.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

from common import hardware

LIMIT = 1.05
TUNE = Path(sys.executable).with_name("tune")
HELP = [TUNE, "--help"]
RECIPES = {
    "rho1": ("recipes/rho1_wmtp_distributed.py", "configs/quickstart/rho1.yaml"),
    "critic": ("recipes/critic_wmtp_distributed.py", "configs/quickstart/critic.yaml"),
    "eval": ("recipes/eval_mtp.py", "configs/quickstart/eval.yaml"),
}


def seconds_of(command: list) -> tuple[float, float]:
    """Processor seconds of a process and its children, and those of the clock."""
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = os.times()
    is_help = command == HELP
    assert is_help or "ConfigError: learning_rte: unknown key" in done.stderr, done.stderr
    assert done.returncode == (0 if is_help else 1), done.stderr
    used = [t.children_user + t.children_system for t in (before, after)]
    return used[1] - used[0], after.elapsed - before.elapsed


def imported(command: list) -> dict[str, float]:
    """Seconds that each module took to import, without those that it imports."""
    log = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=False
    ).stderr
    lines = re.findall(r"import time:\s+(\d+) \|\s+\d+ \| +(\S+)", log)
    return {name: int(microseconds) / 1e6 for microseconds, name in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--recipe", choices=RECIPES, default="rho1")
    args = parser.parse_args()
    recipe, config = RECIPES[args.recipe]
    typo = [TUNE, "run", recipe, "--config", config, "learning_rte=3"]
    print(hardware(), flush=True)
    for command in (HELP, typo):
        seconds_of(command)  # compiles, and fills the disk's cache
    helps, typos, ratios = [], [], []
    for number in range(args.pairs):
        pair = [("help", HELP), ("typo", typo)]
        order = pair[::-1] if number % 2 else pair
        taken = {name: seconds_of(command) for name, command in order}
        (help_s, help_clock), (typo_s, typo_clock) = taken["help"], taken["typo"]
        helps.append(help_s)
        typos.append(typo_s)
        ratios.append(typo_s / help_s)
        print(
            f"pair {number}: {help_s:.2f} s, {typo_s:.2f} s, {ratios[-1]:.3f} "
            f"(by the clock {help_clock:.2f} s, {typo_clock:.2f} s)",
            flush=True,
        )
    for name, values in (("tune --help", helps), (f"{args.recipe}, typo", typos)):
        print(
            f"{name:14} min {min(values):6.2f} s  median {median(values):6.2f} s  "
            f"max {max(values):6.2f} s"
        )
    print(
        f"{'ratio of pairs':14} min {min(ratios):6.3f}    median {median(ratios):6.3f}    "
        f"max {max(ratios):6.3f}"
    )
    ratio = median(ratios)
    print(f"{'PASS' if ratio <= LIMIT else 'FAIL'}: median ratio {ratio:.3f}, at most {LIMIT}")
    of_help = imported(HELP)
    extra: dict[str, float] = {}
    for module, seconds in imported(typo).items():
        if module not in of_help:
            package = module.split(".")[0]
            extra[package] = extra.get(package, 0) + seconds
    told = ", ".join(f"{name} {s:.2f} s" for name, s in sorted(extra.items(), key=lambda x: -x[1]))
    print(f"imported beyond tune --help: {told}")


if __name__ == "__main__":
    main()
