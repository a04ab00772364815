"""Programs a second of two checkouts' sandboxes, in turns on one machine.

    python benchmarks/sandbox_pair.py --other OTHER_CHECKOUT --humaneval HumanEval.jsonl

Starts a process per turn that opens a sandbox with two workers and runs all of HumanEval's own
solutions; the first round warms up. The ratio of each pair is this checkout's rate by the other's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import hardware

ROUNDS = 7
LEAST_RATIO = 0.9
TURN = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/benchmarks"]
import sandbox
from pathlib import Path
from wmtp_modules.sandbox.pool import Sandbox
jobs = sandbox.read_jobs(Path(sys.argv[3]))
with Sandbox(sys.argv[2], 2) as opened:
    sandbox.run_all(opened, jobs)
    print(len(jobs) * 2 / sum(sandbox.run_all(opened, jobs)[0] for _ in range(2)))
"""


def rate(checkout: Path, tier: str, humaneval: Path) -> float:
    command = [sys.executable, "-c", TURN, str(checkout), tier, str(humaneval)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, required=True, help="a checkout to compare with")
    parser.add_argument("--humaneval", type=Path, required=True, help="HumanEval.jsonl")
    parser.add_argument("--tier", nargs="+", default=["bubblewrap", "landlock"])
    arguments = parser.parse_args()
    here = Path(__file__).parents[1]
    print(hardware())
    print(json.dumps({"rounds": ROUNDS, "programs": arguments.humaneval.name}))
    for tier in arguments.tier:
        ratios, rates = [], []
        for turn in range(ROUNDS + 1):
            order = [here, arguments.other.resolve()]
            found = {
                path: rate(path, tier, arguments.humaneval) for path in order[:: 1 - 2 * (turn % 2)]
            }
            if turn:
                ratios.append(found[here] / found[order[1]])
                rates.append(found)
        middle = statistics.median(ratios)
        mine, other = (statistics.median(r[path] for r in rates) for path in order)
        print(
            f"{tier:<12}{mine:6.1f} and {other:6.1f} programs/s, ratio {middle:.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})  "
            f"{'PASS' if middle >= LEAST_RATIO else 'FAIL'}"
        )


if __name__ == "__main__":
    main()
