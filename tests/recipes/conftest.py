"""What the tests of both training recipes share."""

import copy
import json
import os
import random
import subprocess

import numpy as np
import pytest
import torch

from wmtp_modules.run.run import Run

REMEMBERED = ("step", "micro_step", "_epoch", "_best_loss", "heldout", "kept")


@pytest.fixture
def check_resumed(monkeypatch):
    """check_resumed(cls, run, folder): a run that goes on has all that it had when it saved.

    Bit-equal parameters do not show it all: nothing in these models draws a random number, and the
    best loss or the counts of bad steps change no parameter.
    """

    def everything(run):
        state = {name: copy.deepcopy(vars(run)[name]) for name in REMEMBERED}
        return state | {
            "bad steps": copy.deepcopy(run._bad_steps.state_dict()),
            "rate": run._lr_scheduler.get_last_lr(),
            "draws": (random.random(), float(np.random.rand()), float(torch.rand(()))),
        }

    def check(cls, run, folder):
        """``run(overrides, folder)`` trains 6 steps and saves after steps 2, 4 and 6."""
        loss_step, save, train = cls._loss_step, Run.save_checkpoint, cls.train
        seen = {}

        def drawing(self, batch):
            loss, sums, stats = loss_step(self, batch)
            torch.rand(3), np.random.rand(3), random.random()
            if self._run.step == 1:  # a step that is skipped
                sums = sums | {"objective": sums["objective"] * torch.nan}
            return loss, sums, stats

        def noting(self, states):
            save(self, states)
            seen[self.step] = everything(self)

        def comparing(self):
            seen["resumed"] = everything(self._run)
            train(self)

        monkeypatch.setattr(cls, "_loss_step", drawing)
        monkeypatch.setattr(Run, "save_checkpoint", noting)
        run({"max_skipped_steps": 2, "keep_last": 9}, folder)
        for path in (folder / "training_state").iterdir():
            if path.name > "step_000004":
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
        (folder / "summary.json").unlink()
        seen_before = dict(seen)
        monkeypatch.setattr(cls, "train", comparing)
        run({"max_skipped_steps": 2, "keep_last": 9, "resume_from_checkpoint": True}, folder)
        assert seen["resumed"].keys() == seen_before[4].keys()
        for name, value in seen_before[4].items():
            assert str(seen["resumed"][name]) == str(value), name
        assert str(seen[6]) == str(seen_before[6])
        (skipped,) = map(json.loads, (folder / "skipped_steps.jsonl").read_text().splitlines())
        assert skipped["step"] == 2

    return check


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kib): a file system of that size; grown by a second call."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def make(kib):
        again = ["-o", f"remount,size={kib}k"] if os.path.ismount(disk) else ["-o", f"size={kib}k"]
        command = ["mount", "-t", "tmpfs", *again, "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a small disk is a mounted tmpfs, which takes root")
        return disk

    yield make
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a log may be open
