"""What each weighting is worth against its controls, over paired seeds: docs/results.md.

    uv run python benchmarks/ablation.py                  # the core set, within 90 minutes
    uv run python benchmarks/ablation.py --all            # the full grid
    uv run python benchmarks/ablation.py --only corrupted/dft
    uv run python benchmarks/ablation.py --report         # only writes the page, from kept rows

What is run stands in ablation_grid.py, how in ablation_worker.py, and the page is made by
ablation_report.py. Every finished run is a row of benchmarks/results/ablation.jsonl; a restart
repeats none whose definition (its config, data and the models it uses) is still the same. Files,
among them what the workers print, go to runs/ablation.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a worker for each core, workers inherit it

from ablation_grid import SETTINGS, WORK, Job, arm_jobs, python_version
from ablation_report import write_page

from wmtp_modules.files import InUseError, alone_in, new_file

ROWS = Path("benchmarks/results/ablation.jsonl")
PAGE = Path("docs/results.md")


# ------------------------------------------------------------------------- the kept rows


class Rows:
    """The rows of a file, the last one of each (setting, arm, seed)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._rows = {key_of(row): row for row in map(json.loads, lines)}

    def __iter__(self):
        return iter(self._rows.values())

    def add(self, row: dict) -> None:
        """Keep a row, instead of an older one of its run; the file is replaced whole."""
        self._rows[key_of(row)] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(self._path) as unfinished:
            unfinished.write_text("".join(json.dumps(one) + "\n" for one in self))

    def has(self, job: Job) -> bool:
        """Whether this very run is finished, with this Python, whose library is the data."""
        row = self._rows.get(job.key)
        return (
            row is not None
            and row["definition"] == job.definition()
            and row["versions"]["python"] == python_version()
        )


def key_of(row: dict) -> tuple[str, str, int]:
    return row["setting"], row["arm"], row["seed"]


# --------------------------------------------------------------------- the order of runs


def unfinished(arms: Iterable[Job], rows: Rows) -> list[Job]:
    """Arms without a row, each after the models that it needs and that are not there."""
    jobs: dict[tuple, Job] = {}

    def add(job: Job) -> None:
        if job.key in jobs or is_finished(job, rows):
            return
        for model in job.needs:
            add(model)
        jobs[job.key] = job

    for arm in arms:
        add(arm)
    return list(jobs.values())


def is_finished(job: Job, rows: Rows) -> bool:
    """Of a model its files must be here as well: the rows may be another machine's."""
    return rows.has(job) and (not job.is_model or _made(job) == job.definition())


def _made(job: Job) -> str | None:
    file = job.output_dir / "definition"
    return file.read_text() if file.exists() else None


def run_jobs(
    jobs: list[Job], rows: Rows, pool: Executor, workers: int, run: Callable[[Job], dict]
) -> list[str]:
    """Run jobs, models before what needs them, and keep a row of each; returns what failed."""
    by_key = {job.key: job for job in jobs}
    waiting, running, failed = dict(by_key), {}, {}
    started, n_done = time.perf_counter(), 0
    while waiting or running:
        for key, job in list(waiting.items()):
            needs = {model.key for model in job.needs}
            if needs & failed.keys():
                failed[key] = f"{name_of(job)}: not run, what it needs failed"
                del waiting[key]
            elif len(running) < workers and not needs & (waiting.keys() | {*running.values()}):
                running[pool.submit(run, job)] = key
                del waiting[key]
        ended: set[Future] = wait(running, return_when=FIRST_COMPLETED).done if running else set()
        for future in ended:
            job = by_key[running.pop(future)]
            try:
                row = future.result()
            except BrokenProcessPool:
                raise
            except Exception as error:  # of any run: the others go on
                failed[job.key] = f"{name_of(job)}: {error}"
                print(f"FAILED {failed[job.key]}", flush=True)
                continue
            rows.add(row)
            n_done += 1
            left = (time.perf_counter() - started) / n_done * (len(jobs) - n_done) / 60
            print(f"[{n_done}/{len(jobs)}, {left:.0f} min left] {told(row)}", flush=True)
    return list(failed.values())


def name_of(job: Job) -> str:
    return f"{job.setting}/{job.arm}, seed {job.seed}"


def told(row: dict) -> str:
    heldout = row["measures"].get("heldout")
    loss = f"held-out {sum(heldout) / len(heldout):.4f}, " if heldout else ""
    return (
        f"{row['setting']}/{row['arm']}, seed {row['seed']}: {loss}{row['seconds']:.0f} s, "
        f"{row['processor_seconds']:.0f} s of processor time"
    )


# ------------------------------------------------------------------------- command line


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="the full grid, not only the core set")
    parser.add_argument("--seeds", type=int, default=5, help="0 to this number - 1 (5)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one core each (2)")
    parser.add_argument("--only", metavar="SETTING[/ARM]", help="one setting, or one arm of it")
    parser.add_argument("--report", action="store_true", help="train nothing, write the page")
    args = parser.parse_args()
    if args.seeds < 1 or args.workers < 1:
        parser.error("--seeds and --workers must be at least 1")
    try:
        arms = arm_jobs(args.seeds, full=args.all, only=args.only)
    except ValueError as error:
        parser.error(str(error))
    rows, failed = Rows(ROWS), []
    if not args.report:
        try:
            with alone_in(WORK, wait=False):
                failed = run_all(arms, args.workers)
        except InUseError as error:
            sys.exit(str(error))
        rows = Rows(ROWS)
    if not list(rows):
        sys.exit("\n".join([f"{ROWS} has no rows: there is nothing to report", *failed]))
    write_page(list(rows), PAGE, SETTINGS)
    print(f"{PAGE} is written from {ROWS}")
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


def run_all(arms: list[Job], workers: int, path: Path = ROWS) -> list[str]:
    from ablation_worker import run_job, start_worker  # seconds, which --report can do without

    rows = Rows(path)
    jobs = unfinished(arms, rows)
    n_finished = sum(rows.has(job) for job in arms)
    print(f"{n_finished} of {len(arms)} arms are finished, {len(jobs)} runs to do", flush=True)
    spawn = multiprocessing.get_context("spawn")
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, spawn, start_worker, (WORK,)) as pool:
        try:
            failed = run_jobs(jobs, rows, pool, workers, run_job)
        except BrokenProcessPool:
            sys.exit("A worker was killed, perhaps for memory: the same command goes on from here")
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():  # a run may have long to go
                worker.terminate()
            sys.exit("Interrupted: the same command goes on from here")
    print(f"{len(jobs) - len(failed)} runs in {(time.perf_counter() - started) / 60:.0f} minutes")
    return failed


if __name__ == "__main__":
    sys.exit(main())
