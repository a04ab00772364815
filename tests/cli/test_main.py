"""The command ``wmtp``."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from wmtp_modules import catalog
from wmtp_modules.cli.main import PROGRAMS

WMTP = Path(sys.executable).with_name("wmtp")


def test_help_is_quick_and_shows_examples():
    code = (
        "import sys, wmtp_modules.cli.main; print(sorted({'torch', 'omegaconf'} & {*sys.modules}))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
    shown = subprocess.check_output([WMTP, "--help"], text=True)
    assert "wmtp new my_project\n" in shown
    for name in ("new", "check", *PROGRAMS):
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("name", ["new", "check"])
def test_help_of_a_command_shows_examples(wmtp, name):
    assert f"Examples:\n    wmtp {name} " in wmtp(name, "--help")


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_of_a_program_is_its_own_and_shows_examples(wmtp, name):
    shown = wmtp(name, "--help")
    assert f"Examples:\n  wmtp {name} " in shown
    assert f"usage: wmtp {name}" in shown


def test_programs_get_the_words_and_give_their_exit_code(wmtp, tmp_path):
    assert "none" in wmtp("convert", tmp_path / "none", tmp_path / "new", "--to", "hf", code=1)
    assert "keeps nothing for MLflow or a store" in wmtp("sync", tmp_path, code=1)
    assert "wmtp/rho1_7c" in wmtp("estimate-memory", "wmtp/rho1_7c", "--ranks", 8, code=1)
    wmtp("compare", tmp_path / "none", code=2)  # --output is missing
    assert "none" in wmtp("page", tmp_path / "none", code=1)
    wmtp("registry", "no-such-command", code=2)
    wmtp("convert", "--to", "hf", "one", code=2)


def test_a_new_project_is_valid_and_reads_in_five_lines(wmtp, tmp_path, monkeypatch):
    said = wmtp("new", "my, proj")
    assert "cd 'my, proj'\n  tune run recipe.py --config config.yaml" in said
    folder = tmp_path / "my, proj"
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    data = {f"data/{name}" for name in ("train.jsonl", "heldout.jsonl", "tokenizer.model")}
    assert names == {"recipe.py", "config.yaml", "README.md"} | data
    readme = (folder / "README.md").read_text()
    assert len(readme.splitlines()) == 5
    assert readme.startswith("# my, proj\n")
    rows = [json.loads(line) for line in (folder / "data/train.jsonl").read_text().splitlines()]
    assert {*map(tuple, rows)} == {("text",)}
    assert "is not an empty folder" in wmtp("new", "my, proj", code=1)
    monkeypatch.chdir(folder)  # as README says: the config's paths are relative to it
    assert wmtp("check", "config.yaml").endswith(": nothing that recipe.py would refuse\n")
    (folder / "data" / "tokenizer.model").unlink()
    assert "tokenizer.path: there is no data/tokenizer.model" in wmtp(
        "check", "config.yaml", code=1
    )
    assert "nothing" in wmtp("check", "config.yaml", "--no-files")


def test_a_new_project_in_the_folder_one_stands_in(wmtp, tmp_path):
    wmtp("new", ".")
    assert (tmp_path / "recipe.py").is_file()
    assert (tmp_path / "README.md").read_text().startswith(f"# {tmp_path.name}\n")


def test_check_says_all_at_once(wmtp, tmp_path):
    assert wmtp("check", "wmtp/quickstart_rho1").startswith("wmtp/quickstart_rho1: nothing")
    said = wmtp(
        *("check", "wmtp/quickstart_rho1", "sede=1", "optimizer.learning_rte=3", "max_steps=0"),
        *("~batch_size", "device=tpu"),
        code=1,
    )
    for line in (
        "wmtp/quickstart_rho1: 5 errors",
        "sede: unknown key (did you mean 'seed'?)",
        "optimizer.learning_rte: unknown key (did you mean 'lr'?)",
        "max_steps: ",
        "batch_size: ",
        "device: ",
    ):
        assert line in said
    said = wmtp("check", "wmtp/quickstart_rho1", "requires=[none.yaml,wmtp/quickstart_bas]", code=1)
    assert "none.yaml cannot be read" in said
    assert "did you mean 'wmtp/quickstart_base'?" in said
    said = wmtp("check", "wmtp/rho1_7b", code=1)
    assert "checkpointer.checkpoint_dir: there is no checkpoints/7B_1T_4 on this" in said
    assert "reference.checkpointer.checkpoint_dir: there is no runs/reference" in said
    stores = (
        "checkpointer.checkpoint_dir=s3://b/7b",
        "reference.checkpointer.checkpoint_dir=s3://b/r",
    )
    assert "nothing" in wmtp("check", "wmtp/rho1_7b", *stores)
    wmtp("check", "wmtp/rho1_7b", "--no-files")
    said = wmtp("check", "wmtp/eval_score", code=1)
    for key in ("samples", "source", "task"):
        assert f"{key}: must be given a value" in said
    assert "clutser" in wmtp("check", "wmtp/quickstart_rho1", "environment=clutser", code=1)
    assert "controls." in wmtp("check", "wmtp/rho1_7b_topk", "controls=[unifrom]", code=1)


FAULTS = (
    "sede: unknown key (did you mean 'seed'?)",
    "controls.longer.max_stepz: unknown key (did you mean 'max_steps'?)",
    "controls.harder.weighting.ratio: ",
    "controls.unifrom.weighting.name 'unifrom' is not one of",
    "controls.other.seed: no control may change it",
)


@pytest.mark.parametrize("recipe", ["rho1", "critic"])
def test_faults_of_a_config_and_of_its_controls_come_at_once(recipe, wmtp, tune, tmp_path, capsys):
    """In `wmtp check`, `tune validate` and `tune run`, each once."""
    controls = (
        "controls:\n  longer: {max_stepz: 3}\n  harder: {weighting.ratio: text}\n  unifrom:\n"
        "  other: {seed: 1}\n"
    )
    text = catalog.configs()[f"wmtp/quickstart_{recipe}"].read_text()
    text = re.sub(r"^controls:.*(\n .*)*\n", controls, text, flags=re.M)
    (tmp_path / "my.yaml").write_text(text + "sede: 1\n")
    told = [wmtp("check", "my.yaml", code=1)]
    for words in (
        ("validate", "my.yaml"),
        ("run", f"{recipe}_wmtp_distributed", "--config", "my.yaml"),
    ):
        with pytest.raises(SystemExit) as ended:
            tune(*words)
        told.append(capsys.readouterr().err + str(ended.value.code))
    for said in told:
        assert [said.count(fault) for fault in FAULTS] == [1] * len(FAULTS), said


def test_check_needs_to_know_the_recipe(wmtp, tmp_path):
    (tmp_path / "my.yaml").write_text("seed: 0\n")
    assert "does not say which recipe it is for" in wmtp("check", "my.yaml", code=1)
    assert "output_dir" in wmtp("check", "my.yaml", "--recipe", "eval_mtp", code=1)
    assert "neither a file nor one of" in wmtp("check", "my.yaml", "--recipe", "eval_mpt", code=1)
    (tmp_path / "none.py").write_text("x = 1\n")
    assert "no function check" in wmtp("check", "my.yaml", "--recipe", "none.py", code=1)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    assert "cannot be imported" in wmtp("check", "my.yaml", "--recipe", "broken.py", code=1)
