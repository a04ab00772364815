"""What the tests of both training recipes share."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchtune.config import instantiate

from wmtp_modules.quickstarts import functions, spoiled, stdlib
from wmtp_modules.run.run import Run

REMEMBERED = ("step", "micro_step", "_epoch", "_logged_epoch", "_best_loss", "heldout", "kept")
REMEMBERED += ("acceptance",)


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
            "clipped": run._clipped.state_dict(),
            "packing": run._dataset.packing,
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
def watched(waits, monkeypatch):
    """watched(cls): what in the micro-steps of a recipe's runs would wait for a GPU."""

    def watch(cls):
        loss_step, found = cls._loss_step, []

        def watching(self, batch):
            with waits() as here:
                result = loss_step(self, batch)
                result[0].backward()
            found.extend(here)
            return result[0].detach().requires_grad_(), *result[1:]  # its gradients are there

        monkeypatch.setattr(cls, "_loss_step", watching)
        return found

    return watch


# ------------------------------------------------------------- quickstarts of a few steps

ROOT = Path(__file__).parents[2]
TINY_VOCABULARY = 400
TINY_STEPS = {  # of configs/quickstart/*.yaml
    "base": 8,
    "reference": 8,
    "rho1": 5,
    "critic_base": 8,
    "critic": 4,
    "eval_base": 8,
}


class TinyQuickstarts:
    """Assets from a few small files of the standard library, and the shipped configs cut short.

    Data are made here, by the first that asks for them; models by the first run that needs them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: set[str] = set()

    def _make_data(self, quickstart: str) -> None:
        if quickstart in self._made:
            return
        self._made.add(quickstart)
        files = [path for path in stdlib.stdlib_files() if path.stat().st_size < 12_000][::8]
        texts, origin = spoiled.test_texts()
        texts = {path: texts[path] for path in [*texts][::4]}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stdlib, "stdlib_files", lambda: files)
            patch.setattr(spoiled, "test_texts", lambda: (texts, origin))
            patch.setattr(functions, "_train_model", lambda *_: None)
            instantiate(OmegaConf.load(self.config(quickstart)).prepare)

    def config(self, name: str, **changes: object) -> Path:
        """A shipped config with few steps; others that it requires come along."""
        self._make_data({"base": "rho1", "reference": "rho1"}.get(name, name.split("_")[0]))
        cfg = OmegaConf.load(ROOT / "configs" / "quickstart" / f"{name}.yaml")
        cfg.assets_dir = str(self.folder / f"{name.split('_')[0]}_assets")
        if name in ("base", "reference", "rho1"):
            cfg.assets_dir = str(self.folder / "rho1_assets")
        if "output_dir" in cfg and "assets_dir" not in str(
            OmegaConf.to_container(cfg)["output_dir"]
        ):
            cfg.output_dir = str(self.folder / name)
        if "model" in cfg:
            cfg.model.update(vocab_size=TINY_VOCABULARY, embed_dim=32)
        if steps := TINY_STEPS.get(name):
            cfg.update(max_steps=steps, num_warmup_steps=2, save_every_n_steps=steps)
            cfg.update(run_val_every_n_steps=steps, log_every_n_steps=1)
        if name == "critic_base":  # of few files, where one in twenty may be none
            cfg.dataset.validation_fraction = 0.3
        if "prepare" in cfg:
            cfg.prepare.vocab_size = TINY_VOCABULARY
            if name == "critic":
                cfg.prepare.update(n_critic=120, n_policy=40, n_heldout=60)
                cfg.controls.uniform_good.max_steps = TINY_STEPS[name]
            if "model_config" in cfg.prepare:
                cfg.prepare.model_config = str(self.config("eval_base"))
        if "requires" in cfg:
            names = [name.removeprefix("wmtp/quickstart_") for name in cfg.requires]
            cfg.requires = [str(self.config(name)) for name in names]
        cfg.metric_logger = {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": str(self.folder / "logs"),
        }
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value, merge=False, force_add=True)
        path = self.folder / f"{name}.yaml"
        OmegaConf.save(cfg, path)
        return path


@pytest.fixture(scope="session")
def tiny_quickstarts(tmp_path_factory):
    return TinyQuickstarts(tmp_path_factory.mktemp("tiny"))
