"""Damaged configs: each runs, or is refused in a sentence that names the key or the file."""

import importlib.util
import random
import re
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from wmtp_modules.checkpoints.read import Checkpoint
from wmtp_modules.config.file import read_config
from wmtp_modules.parallel.process_group import init_process_group
from wmtp_modules.run.stopping import StopRequests

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(p for p in ROOT.glob("configs/*/*.yaml") if p.parent.name != "environments")
SHIPPED = [path for path in SHIPPED if path.parent.name != "environments"]  # of no recipe
SHARE_OF_SHIPPED = 0.6
MOST_RUNS = 5


def import_recipe(name: str):
    spec = importlib.util.spec_from_file_location(
        f"mutated_{name}", ROOT / "recipes" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipes():
    return {path.stem: import_recipe(path.stem) for path in ROOT.glob("recipes/*_*.py")}


def keys_and_file(text: str, path: Path) -> set[str]:
    """What an error may name: the file, or a key as it was or is now."""
    keys = re.findall(r"[\w.]+(?=\s*:)", text)
    return {path.name, *keys, *(key.removesuffix("s") for key in keys)}


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")  # pictures are not
@pytest.mark.parametrize("total", [150, pytest.param(300, marks=pytest.mark.nightly)])
def test_mutated_configs(total, recipes, small_config, tmp_path, monkeypatch, mutate, judge):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(5)
    runs = 0
    device, mesh = init_process_group("cpu", 300)
    for number in range(total):
        small = number >= SHARE_OF_SHIPPED * total
        original = small_config if small else rng.choice(SHIPPED).read_text()
        if not small:  # what its command line would give
            original = re.sub(r"\?\?\?", "given", original.replace("task: ???", "task: mbpp"))
        name = "rho1_wmtp_distributed"
        if not small:
            (name,) = set(re.findall(r"recipes/(\w+)\.py", original))
        recipe = recipes[name]
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(mutate.change_config(original, rng))
        out = tmp_path / f"out{number}"
        names = keys_and_file(original, path) | keys_and_file(path.read_text("latin-1"), path)
        found = []

        def check(path=path, out=out, small=small, recipe=recipe, found=found):
            overrides = [f"output_dir={out}"] if small else []
            found.append(read_config(["--config", str(path), *overrides]))
            recipe.check(found[0])

        kind = "small config" if small else f"{name.split('_')[0]} config"
        ran = judge.judge(kind, str(number), names, check)
        if small and ran and runs < MOST_RUNS:
            runs += 1
            cfg = found[0]
            cfg.collective_timeout_s = 300  # a shorter one may end this very process
            run = partial(recipe.train_one, cfg, device, mesh, StopRequests(), {})
            ran = judge.judge("small config, run", str(number), names, run)
            assert ran == (out / "summary.json").exists()
            for folder in filter(Path.exists, (out / "best", out / "last")):
                Checkpoint(folder)  # complete, whatever came of the run
    dist.destroy_process_group()
    assert not judge.problems, "\n".join(judge.problems)
