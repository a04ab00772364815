"""Programs a second and overhead per program of the sandbox, on HumanEval's own solutions.

    python benchmarks/sandbox.py --humaneval HumanEval.jsonl [--tier bubblewrap landlock]

Runs every reference solution against its tests, at each tier, five times: with two workers for the
rate, and with one for the overhead, which is the time from handing a program over until its verdict
is there, less what program and tests take when a plain Python process executes them.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from common import hardware

from wmtp_modules.sandbox import proof
from wmtp_modules.sandbox.jobs import FunctionJob, SandboxError
from wmtp_modules.sandbox.pool import Sandbox

REPEATS = 5
LEAST_RATE = 100  # programs a second with two workers
MOST_OVERHEAD = 0.015  # seconds a program


def read_jobs(path: Path) -> list[FunctionJob]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        FunctionJob(
            program=row["prompt"] + row["canonical_solution"],
            tests=f"{row['test']}\ncheck({row['entry_point']})\n",
            context=row["prompt"] + "    pass\n",
        )
        for row in rows
    ]


def own_seconds(job: FunctionJob) -> float:
    """What a program and its tests take in this process; only for the benchmark's own solutions."""
    began = time.perf_counter()
    names = {"__name__": "solution"}
    exec(compile(job.program, "<program>", "exec"), names)
    exec(compile(job.tests, "<tests>", "exec"), names)
    return time.perf_counter() - began


def run_all(sandbox: Sandbox, jobs: list[FunctionJob]) -> tuple[float, list]:
    began = time.perf_counter()
    outcomes = dict(sandbox.run(enumerate(jobs)))
    seconds = time.perf_counter() - began
    failed = [(n, outcome) for n, outcome in outcomes.items() if outcome.verdict != "pass"]
    assert not failed, failed
    return seconds, outcomes


def quartiles(values: list[float], scale: float = 1.0) -> str:
    low, middle, high = (q * scale for q in statistics.quantiles(values, n=4))
    return f"{middle:7.1f} {low:7.1f} {high:7.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--humaneval", type=Path, required=True, help="HumanEval.jsonl")
    parser.add_argument("--tier", nargs="+", default=["bubblewrap", "landlock"])
    arguments = parser.parse_args()
    jobs = read_jobs(arguments.humaneval)
    own = sum(min(own_seconds(job) for _ in range(REPEATS)) for job in jobs) / len(jobs)
    print(hardware())
    print(f"$ python benchmarks/sandbox.py --humaneval {arguments.humaneval.name}\n")
    print(f"{len(jobs)} programs, {own * 1e3:.2f} ms each without a sandbox; {REPEATS} repeats\n")
    print("                                          median     25%     75%")
    for tier in arguments.tier:
        try:
            with Sandbox(tier, workers=2) as sandbox:
                times = [run_all(sandbox, jobs)[0] for _ in range(REPEATS + 1)][1:]
            rates = [len(jobs) / seconds for seconds in times]
            began = time.perf_counter()
            with Sandbox(tier, workers=1) as sandbox:
                start = time.perf_counter() - began
                workload = sandbox.machine_factor
                times = [run_all(sandbox, jobs)[0] for _ in range(REPEATS + 1)][1:]
        except SandboxError as error:
            print(f"{tier:<12}{error}")
            continue
        overheads = [seconds / len(jobs) - own for seconds in times]
        passed = "PASS" if statistics.median(rates) >= LEAST_RATE else "FAIL"
        print(f"{tier:<12}programs/s, two workers    {quartiles(rates)}  {passed}")
        passed = "PASS" if statistics.median(overheads) <= MOST_OVERHEAD else "FAIL"
        print(f"{tier:<12}overhead per program, ms   {quartiles(overheads, 1e3)}  {passed}")
        print(
            f"{tier:<12}started and proven in {start:.1f} s, machine factor {workload:.2f} "
            f"(nominal {proof.NOMINAL_SECONDS} s)"
        )


if __name__ == "__main__":
    main()
