"""Ranks of ``stoppable.py`` that stop and hang: forked, or real ones under ``tune run``."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PATIENCE_S = 120  # of a machine that does other things meanwhile


class Job:
    """Two ranks in a folder of their own: ``started`` are forked ones, ``tune`` a launcher."""

    def __init__(self, folder: Path, forks) -> None:
        self.folder, self._forks = folder, forks
        self.started = None
        self.tune: subprocess.Popen | None = None
        (folder / "recipes").mkdir()
        (folder / "recipes" / "__init__.py").touch()
        shutil.copy(Path(__file__).with_name("stoppable.py"), folder / "recipes" / "loop.py")

    def start(self, *, ranks: int | None = 2, launched: bool = False, **options: object) -> None:
        """Forked ranks, each on its own or as a launcher has them."""
        (self.folder / "options.json").write_text(json.dumps(options))
        self.started = self._forks.start(
            ["recipes/loop.py", "--config", "options.json"],
            ranks=ranks,
            cwd=self.folder,
            launched=launched,
            killed_after=4,
            timeout=PATIENCE_S,
        )

    def start_tune(self, **options: object) -> None:
        """A real ``tune run`` of two ranks, in a session of its own."""
        (self.folder / "options.json").write_text(json.dumps(options))
        command = [Path(sys.executable).with_name("tune"), "run", "--nproc_per_node", "2"]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "RANK"))}
        with open(self.folder / "said", "a") as said:
            self.tune = subprocess.Popen(
                [*map(str, command), "recipes/loop.py", "--config", "options.json"],
                cwd=self.folder,
                env=inherited | {"OMP_NUM_THREADS": "1", "STOPPABLE_JOB": str(self.folder)},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

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
        """Exit codes, of the ranks or of the launcher; no process is left."""
        if self.started:
            return self.started.wait_for_end(PATIENCE_S)
        code = self.tune.wait(PATIENCE_S)
        self.wait_for(lambda: not self.alive(), "the end of all processes")
        return [code]

    def alive(self) -> list[int]:
        """All processes of ``tune run``, by their environment."""
        mark, pids = f"STOPPABLE_JOB={self.folder}\0".encode(), []
        for entry in Path("/proc").iterdir():
            try:
                is_ours = entry.name.isdigit() and mark in (entry / "environ").read_bytes()
            except OSError:  # ended meanwhile, or is a zombie
                continue
            pids += [int(entry.name)] if is_ours else []
        return pids

    @property
    def said(self) -> str:
        if self.started:
            return self.started.stdout + self.started.stderr
        return (self.folder / "said").read_text()

    @property
    def exit(self) -> dict:
        return json.loads((self.folder / "out" / "exit.json").read_text())

    @property
    def saved(self) -> list[int]:
        return [int((self.folder / f"saved{rank}").read_text()) for rank in range(2)]


@pytest.fixture
def job(tmp_path, forks):
    job = Job(tmp_path, forks)
    yield job
    for pid in job.alive():
        os.kill(pid, signal.SIGKILL)
    if job.tune:
        job.tune.wait()
