"""torchtune's own entry point with our names: ls, cp, cat, run, validate, in this process."""

import os
import re
import sys

import pytest
import yaml
from torchtune._cli.subcommand import Subcommand

from wmtp_modules import catalog, tune_plugin
from wmtp_modules.cli.tune import activate

RECIPE = """
import os, sys
import BESIDE, here
from torchtune import config

@config.parse
def main(cfg):
    with open("ran", "w") as file:
        file.write(f"{cfg.x} {sys.argv[0]}")

if __name__ == "__main__":
    sys.exit(main())
"""


def test_ls_shows_ours_behind_torchtunes(tune):
    lines = tune("ls").splitlines()
    pairs, recipe = [], ""
    for line in lines[1:]:
        recipe = line[:40].strip() or recipe
        pairs.append((recipe, line[40:].strip()))
    ours = catalog.configs_of_recipes()
    assert [p for p in pairs if p[0] in ours] == [(r, c) for r in ours for c in ours[r]]
    assert sum(map(len, ours.values())) == len(catalog.configs())
    assert pairs[0] == ("full_finetune_single_device", "llama2/7B_full_low_memory")
    assert tune("ls").splitlines() == lines  # told twice, listed once


def test_cp_keeps_names_in_a_folder_and_takes_others(tune, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("rho1_wmtp_distributed", "wmtp/rho1_7b", "wmtp/critic_7b", "eval_mtp"):
        tune("cp", name, ".")
        tune("cp", name, "in")
    expected = {"rho1_wmtp_distributed.py", "rho1_7b.yaml", "critic_7b.yaml", "eval_mtp.py"}
    assert {p.name for p in tmp_path.iterdir()} == expected | {"in"}
    assert {p.name for p in (tmp_path / "in").iterdir()} == expected
    assert (tmp_path / "rho1_7b.yaml").read_bytes() == catalog.configs()[
        "wmtp/rho1_7b"
    ].read_bytes()
    tune("cp", "wmtp/quickstart_rho1", "a/b/my.yaml", "--make-parents")
    tune("cp", "rho1_wmtp_distributed", "mine")
    assert (tmp_path / "a" / "b" / "my.yaml").is_file()
    assert (tmp_path / "mine.py").is_file()
    (tmp_path / "rho1_7b.yaml").write_text("mine")
    assert "not overwriting" in tune("cp", "wmtp/rho1_7b", ".", "--no-clobber")
    assert (tmp_path / "rho1_7b.yaml").read_text() == "mine"
    tune("cp", "llama2/7B_full", "theirs.yaml")
    assert "llama2" in (tmp_path / "theirs.yaml").read_text()


def test_cat_shows_a_config_of_ours(tune):
    shown = yaml.safe_load(tune("cat", "wmtp/rho1_7b"))
    assert shown["checkpointer"]["checkpoint_dir"] == "checkpoints/7B_1T_4"


# ------------------------------------------------------------------------------- run


@pytest.fixture
def project(tmp_path):
    """Recipes here, below, and elsewhere; each imports from its own folder and from this one."""
    (tmp_path / "x.yaml").write_text("x: 1\n")
    (tmp_path / "here.py").touch()
    for n, folder in enumerate((tmp_path, tmp_path / "recipes", tmp_path / "else where")):
        folder.mkdir(exist_ok=True)
        (folder / f"beside_{n}.py").touch()
        for name in ("mine.py", "test.py", "my-recipe.v2.py"):  # `test` is a module of Python's
            (folder / name).write_text(RECIPE.replace("BESIDE", f"beside_{n}"))
    return tmp_path


PATHS = {
    "mine.py": "mine.py",
    "./mine.py": "mine.py",
    "mine": "mine.py",
    "test.py": "test.py",
    "my-recipe.v2.py": "my-recipe.v2.py",
    "recipes/mine.py": "recipes/mine.py",
    "{here}/recipes/mine.py": "recipes/mine.py",
    "else where/mine.py": "else where/mine.py",
    "{here}/else where/mine.py": "else where/mine.py",
}


@pytest.mark.parametrize("given", PATHS)
def test_run_takes_any_file_with_one_process(tune, project, given):
    tune("run", given.format(here=project), "--config", "x.yaml", "x=7")
    assert (project / "ran").read_text() == f"7 {project / PATHS[given]}"


@pytest.mark.parametrize("given", PATHS)
def test_run_takes_any_file_with_several(tune, project, launched, given):
    recipe = given.format(here=project)
    tune("run", "--nproc_per_node", 2, recipe, "--config=x.yaml", "x=7")
    (args,) = launched
    assert args.training_script == str(project / PATHS[given])
    assert args.training_script_args == ["--config", "x.yaml", "x=7"]
    assert (args.module, args.nproc_per_node) == (False, "2")
    assert str(project) in os.environ["PYTHONPATH"].split(os.pathsep)
    assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "300"
    assert "SIGUSR1" in args.signals_to_handle


def test_run_knows_names(tune, project, launched):
    for options, config in (
        (["--nproc_per_node=2"], ["--config=wmtp/quickstart_rho1"]),
        (["--standalone"], ["--config", "wmtp/quickstart_rho1"]),
    ):
        tune("run", *options, "rho1_wmtp_distributed", *config, "max_steps=1")
    for args in launched:
        assert args.training_script == str(catalog.recipes()["rho1_wmtp_distributed"])
        file = str(catalog.configs()["wmtp/quickstart_rho1"])
        assert args.training_script_args == ["--config", file, "max_steps=1"]
        assert args.module is False
    assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "300"
    tune("run", "--nproc_per_node", 2, "mine.py", "--config", "wmtp/rho1_7b")
    assert launched[-1].training_script_args[1] == str(catalog.configs()["wmtp/rho1_7b"])


def test_a_package_is_run_as_one(tune, project, launched):
    """Its files may import each other, as they could before."""
    (project / "recipes" / "__init__.py").touch()
    for path in ("recipes/mine.py", "./recipes/mine.py", "recipes/mine"):
        tune("run", "--nproc_per_node", 2, path, "--config", "x.yaml")
        assert (launched[-1].module, launched[-1].training_script) == (True, "recipes.mine")
    (project / "datasets").mkdir()  # called as an installed package is
    for name in ("__init__.py", "mine.py"):
        (project / "datasets" / name).touch()
    tune("run", "--nproc_per_node", 2, "datasets/mine.py", "--config", "x.yaml")
    assert launched[-1].training_script == str(project / "datasets" / "mine.py")


def test_torchtunes_own_recipes_are_left_alone(tune, tmp_path, launched):
    tune("run", "--nproc_per_node", 2, "full_finetune_distributed", "--config", "llama2/7B_full")
    (args,) = launched
    assert args.training_script.endswith("recipes/full_finetune_distributed.py")
    assert not {*tune_plugin.LAUNCHER_DEFAULTS, "PYTHONPATH"} & os.environ.keys()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rho1_wmtp_distribute", "--config", "x.yaml"], "did you mean 'rho1_wmtp_distributed'?"),
        (["recipes/none.py", "--config", "x.yaml"], "recipes/none.py is neither a file nor"),
        (["mine.py", "--config"], "--config needs a file, or a name"),
        (["mine.py"], "'--config' argument is required"),
    ],
)
def test_run_says_what_is_missing(tune, project, capsys, words, told):
    with pytest.raises(SystemExit) as ended:
        tune("run", *words)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


# -------------------------------------------------------------------------- validate


def refused(tune, capsys, *words):
    with pytest.raises(SystemExit) as ended:
        tune("validate", *words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_validate_is_strict_for_ours(tune, tmp_path, capsys):
    for name in ("wmtp/quickstart_rho1", "wmtp/eval_7b_mbpp", "wmtp/critic_7b"):
        tune("cp", name, "my.yaml")
        assert tune("validate", "my.yaml") == "Config is well-formed!\n"
    assert tune("validate", "wmtp/eval_score").endswith("samples=... source=... task=...\n")
    text = (tmp_path / "my.yaml").read_text()
    bad = text.replace("\nseed:", "\nsede:").replace("    lr: 0.0001", "    learning_rte: 0.0001")
    (tmp_path / "bad.yaml").write_text(bad)
    told = refused(tune, capsys, "bad.yaml")
    assert "sede: unknown key (did you mean 'seed'?)" in told
    assert "critic.optimizer.learning_rte: unknown key" in told
    (tmp_path / "bad.yaml").write_text(text.replace("recipe: critic_wmtp", "recipe: critc_wmtp"))
    assert "did you mean 'critic_wmtp_distributed'?" in refused(tune, capsys, "bad.yaml")
    (tmp_path / "bad.yaml").write_text(re.sub(r"^#.*\n", "", text, flags=re.M))
    assert "does not say which recipe it is for" in refused(tune, capsys, "bad.yaml")
    assert "cannot be read" in refused(tune, capsys, "none.yaml")


def test_validate_of_what_a_config_requires(tune, tmp_path, capsys):
    tune("cp", "wmtp/quickstart_rho1", "my.yaml")
    text = (tmp_path / "my.yaml").read_text()
    tune("cp", "wmtp/quickstart_base", "base.yaml")
    base = (tmp_path / "base.yaml").read_text()
    (tmp_path / "base.yaml").write_text(base.replace("batch_size", "batch_sise"))
    changed = text.replace("- wmtp/quickstart_base", "- base.yaml")
    changed = changed.replace("max_steps: ", "max_steps: -")
    (tmp_path / "my.yaml").write_text(changed.replace("start_reference", "start_referense"))
    told = refused(tune, capsys, "my.yaml")
    assert "max_steps: must be at least 1" in told  # of the config itself, and all the others
    assert "base.yaml: batch_sise: unknown key" in told
    assert "did you mean 'wmtp/quickstart_reference'?" in told


def test_validate_asks_the_recipe_of_a_user(tune, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    recipe = "def check(cfg):\n    if cfg.x != 1:\n        raise ValueError('x: must be 1')\n"
    (tmp_path / "sub" / "mine.py").write_text(recipe)
    for x, says in ((1, ""), (2, "x: must be 1")):
        (tmp_path / "sub" / "c.yaml").write_text(f"# recipe: mine.py\nx: {x}\n")
        if says:
            assert says in refused(tune, capsys, "sub/c.yaml")
        else:
            assert "well-formed" in tune("validate", "sub/c.yaml")


def test_validate_leaves_torchtunes_to_torchtune(tune, tmp_path):
    tune("cp", "llama2/7B_full", "theirs.yaml")
    text = f"# tune run custom.py --config x\n{(tmp_path / 'theirs.yaml').read_text()}typo: 1\n"
    (tmp_path / "theirs.yaml").write_text(text)
    assert "well-formed" in tune("validate", "theirs.yaml")


# ----------------------------------------------------------------- other processes


@pytest.mark.parametrize("argv", [["/some/bin/pytest", "ls"], ["tune.py"], ["-c"], []])
def test_elsewhere_nothing_is_put_in_place(tune, monkeypatch, argv):
    before = Subcommand.__dict__["create"]
    monkeypatch.setattr(sys, "argv", argv)
    activate()
    assert Subcommand.__dict__["create"] is before


def test_another_program_called_tune_is_left_alone(tune, monkeypatch):
    before = Subcommand.__dict__["create"]
    monkeypatch.setattr(sys, "argv", ["/opt/piano/tune", "ls"])
    monkeypatch.delitem(sys.modules, "torchtune")
    activate()
    assert Subcommand.__dict__["create"] is before
    assert "torchtune" not in sys.modules
