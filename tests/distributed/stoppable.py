"""A training loop without a model, for two ranks: what stops and what hangs, as recipes have it.

Run by torchrun or ``tune run`` with one JSON object of options after ``--config``. It writes
process ids to ``setup0``, ``rank0`` (in the loop) and ``stuck0``, and the step to ``saved0``.
"""

import atexit
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from wmtp_modules.parallel.process_group import die_with_parent, init_process_group
from wmtp_modules.run import stopping
from wmtp_modules.run.stopping import Stopped, StopRequests, exit_code
from wmtp_modules.run.watchdog import Watchdog

OPTIONS = {
    "setup_s": [0, 0],  # Python that takes this long on each rank, before training
    "setup_barrier": False,  # then rank 0 waits in C for the other
    "step_s": 0.1,
    "save_s": [0, 0],
    "max_hours": None,
    "timeout_s": 100,
    "stuck": None,  # rank whose next batch does not come, in step 3
    "real_group": False,  # of wmtp_modules.parallel.process_group
}


def wait(seconds: float) -> None:
    time.sleep(seconds)


def join(options: dict) -> None:
    if options["real_group"]:
        init_process_group("cpu", options["timeout_s"])
    else:
        die_with_parent()
        dist.init_process_group("gloo")


def next_batch(options: dict, rank: int, step: int) -> None:
    if rank == options["stuck"] and step == 3:
        Path(f"stuck{rank}").write_text(str(os.getpid()))
        wait(1000)
    wait(options["step_s"])


def save(options: dict, rank: int, step: int) -> None:
    wait(options["save_s"][rank])
    Path(f"saved{rank}").write_text(str(step))


def train(options: dict, stops: StopRequests, rank: int) -> None:
    loss = torch.ones(1)
    with stops.step_by_step(), Watchdog(options["timeout_s"], "out") as watchdog:
        step = 0
        while True:
            watchdog.beat(f"step {step + 1}", step)
            if reason := stops.agreed():
                with watchdog.paused():
                    save(options, rank, step)
                raise Stopped(reason, step)
            next_batch(options, rank, step)
            dist.all_reduce(loss)
            step += 1
            if step == 2:
                Path(f"rank{rank}").write_text(str(os.getpid()))


def main() -> None:
    options = OPTIONS | json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    rank = int(os.environ.get("RANK", 0))
    stopping.PATIENCE_S = 3.0  # a test's
    atexit.register(Path(f"atexit{rank}").touch)
    join(options)
    with StopRequests(options["max_hours"], "out") as stops, exit_code(stops):
        Path(f"setup{rank}").write_text(str(os.getpid()))
        wait(options["setup_s"][rank])
        if options["setup_barrier"]:
            dist.barrier()
        train(options, stops, rank)


if __name__ == "__main__":
    sys.exit(main())
