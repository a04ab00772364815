"""What a logged step costs the training path, whatever MLflow's store does meanwhile.

    uv run python benchmarks/logged_step.py

A run's two loggers get 35 figures every 50 ms, as a recipe does it: into metrics.jsonl, which a
process beside this one follows. The stores: none, an SQLite file, a real MLflow server behind a
relay that holds every answer back by 500 ms, and a server that is not there. Milliseconds; the
median has to be at most 1, which is 0.5 % of a step of 0.3 s with some to spare.
"""

import argparse
import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median, quantiles

from common import hardware
from omegaconf import OmegaConf

LIMIT_MS = 1.0
ANSWER_S = 0.5
STEP_S = 0.05


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def slow_relay(to: int) -> int:
    """A port before ``to`` that passes on what clients say at once, and answers late."""
    port, loop = free_port(), asyncio.new_event_loop()

    async def passed_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter, late: float):
        while data := await source.read(2**16):
            await asyncio.sleep(late)
            sink.write(data)
            await sink.drain()
        sink.close()

    async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        its_reader, its_writer = await asyncio.open_connection("127.0.0.1", to)
        both = passed_on(reader, its_writer, 0.0), passed_on(its_reader, writer, ANSWER_S)
        await asyncio.gather(*both, return_exceptions=True)

    loop.run_until_complete(asyncio.start_server(met, "127.0.0.1", port))
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return port


def start_server(folder: Path) -> tuple[subprocess.Popen, int]:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, cwd=folder, stdout=quiet, stderr=quiet)
    end = time.monotonic() + 300
    while True:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return server, port
        assert server.poll() is None
        assert time.monotonic() < end
        time.sleep(0.2)


def milliseconds(folder: Path, uri: str | None, steps: int) -> tuple[list[float], bool]:
    """Of each step, and whether MLflow had all of it in the end."""
    from wmtp_modules.run.metric_logging import JSONLLogger, MLflowLogger
    from wmtp_modules.tracking.outbox import Outbox

    loggers: list = [JSONLLogger(folder / "metrics.jsonl")]
    if uri is not None:
        loggers.append(MLflowLogger("logged", uri, run_dir=folder, required=False))
        loggers[-1].log_config(OmegaConf.create({"lr": 0.1}))
    taken = []
    for step in range(1, steps + 1):
        time.sleep(STEP_S)
        started = time.perf_counter()
        for one in loggers:
            one.log_dict({f"figure_{i}": step / (i + 1) for i in range(35)}, step)
        taken.append(1000 * (time.perf_counter() - started))
    for one in reversed(loggers):
        one.close()
    return taken, Outbox(folder).position().step == steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    folder, too_slow = Path(tempfile.mkdtemp(prefix="wmtp_logged_")), []
    server, port = start_server(folder)
    stores = {
        "none": None,
        "SQLite": f"sqlite:///{folder}/mlflow.db",
        "500 ms": f"http://127.0.0.1:{slow_relay(port)}",
        "away": f"http://127.0.0.1:{free_port()}",
    }
    print(hardware(), flush=True)
    try:
        for name, uri in stores.items():
            (folder / name).mkdir()
            taken, has_all = milliseconds(folder / name, uri, args.steps)
            rank = quantiles(taken, n=100)
            told = {"store": name, "steps": args.steps, "median_ms": round(median(taken), 3)}
            told |= {"p99_ms": round(rank[98], 3), "max_ms": round(max(taken), 3)}
            print(json.dumps(told | {"mlflow_has_all": has_all}), flush=True)
            too_slow += [name] if median(taken) > LIMIT_MS else []
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder)
    sys.exit(f"above {LIMIT_MS} ms: {', '.join(too_slow)}" if too_slow else 0)


if __name__ == "__main__":
    main()
