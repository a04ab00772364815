"""Real processes that stop and hang: ranks of ``stoppable.py``, alone or under a launcher."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PATIENCE_S = 200  # of a machine that does other things meanwhile
LAUNCHERS = {
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--nproc_per_node", "2"),  # a free port of its own
    ],
    "tune": [str(Path(sys.executable).with_name("tune")), "run", "--nproc_per_node", "2"],
    "tune alone": [str(Path(sys.executable).with_name("tune")), "run"],
}


class Job:
    """Two ranks in a folder of their own, and every process that comes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark = f"STOPPABLE_JOB={folder}"
        self.processes: list[subprocess.Popen] = []
        (folder / "recipes").mkdir()
        (folder / "recipes" / "__init__.py").touch()
        shutil.copy(Path(__file__).with_name("stoppable.py"), folder / "recipes" / "loop.py")

    def start_ranks(self, **options: object) -> None:
        """Without a launcher: exit codes can be looked at."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for rank in range(2):
            place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2}
            self._start([sys.executable], options, {k: str(v) for k, v in place.items()})

    def start(self, launcher: str, **options: object) -> None:
        self._start(LAUNCHERS[launcher], options, {})

    def run_code(self, code: str) -> None:
        """A Python program instead of the ranks."""
        self._start([sys.executable, "-c", code], {}, {})

    def _start(self, command: list[str], options: dict, environment: dict[str, str]) -> None:
        (self.folder / "options.json").write_text(json.dumps(options))
        name, _, value = self._mark.partition("=")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "RANK"))}
        with open(self.folder / "said", "a") as said:
            process = subprocess.Popen(
                [*command, "recipes/loop.py", "--config", "options.json"],
                cwd=self.folder,
                env=inherited | {"OMP_NUM_THREADS": "1", name: value} | environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self.processes.append(process)

    @staticmethod
    def wait_for(condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}"
            time.sleep(0.05)

    def wait_until(self, name: str, ranks: tuple[int, ...] = (0, 1)) -> list[int]:
        """Process ids of the ranks once all have written ``<name><rank>``."""
        files = [self.folder / f"{name}{rank}" for rank in ranks]
        self.wait_for(lambda: all(file.exists() and file.read_text() for file in files), name)
        return [int(file.read_text()) for file in files]

    def wait_for_end(self) -> list[int]:
        """Exit codes; no process is left."""
        codes = [process.wait(PATIENCE_S) for process in self.processes]
        self.wait_for(lambda: not self.alive(), "the end of all processes")
        return codes

    def alive(self) -> list[int]:
        """All processes of this job, by their environment."""
        mark, pids = self._mark.encode(), []
        for entry in Path("/proc").iterdir():
            try:
                is_ours = entry.name.isdigit() and mark in (entry / "environ").read_bytes()
            except OSError:  # ended meanwhile, or is a zombie
                continue
            pids += [int(entry.name)] if is_ours else []
        return pids

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    @property
    def exit(self) -> dict:
        return json.loads((self.folder / "out" / "exit.json").read_text())

    @property
    def saved(self) -> list[int]:
        return [int((self.folder / f"saved{rank}").read_text()) for rank in range(2)]


@pytest.fixture
def job(tmp_path):
    job = Job(tmp_path)
    yield job
    for pid in job.alive():
        os.kill(pid, signal.SIGKILL)
    for process in job.processes:
        process.wait()
