"""Names of recipes, configs and environments: in a clone, in a wheel, in a config's header."""

import re
import shutil
from pathlib import Path

import pytest

from wmtp_modules import catalog
from wmtp_modules.config.environment import file_of
from wmtp_modules.config.file import load_config

ROOT = Path(__file__).parents[2]
RUNS = [p for p in sorted(ROOT.glob("configs/*/*.yaml")) if p.parent.name != "environments"]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """As an installed wheel has them: hatch_build.py puts them there by ``files_of_clone``."""
    for name, path in catalog.files_of_clone(ROOT).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / name)
    monkeypatch.setattr(catalog, "SHIPPED", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_file_has_the_name_that_the_docs_promise():
    assert {*catalog.recipes()} == {p.stem for p in ROOT.glob("recipes/[!_]*.py")}
    names = {f"wmtp/{path.parent.name}_{path.stem}": path for path in RUNS}
    assert catalog.configs() == names
    assert len(names) == len(RUNS)  # no two files of one name
    assert {"wmtp/rho1_7b", "wmtp/critic_7b", "wmtp/eval_7b_mbpp", "wmtp/quickstart_critic"} <= {
        *names
    }
    assert {*catalog.environments()} == {"local", "cluster"}


def test_a_wheel_has_the_same_names_and_files_called_so(wheel):
    clone = {name: path.read_text() for name, path in catalog.configs().items()}
    assert {Path(name).name: f"{wheel}/configs" for name in clone} == {
        path.stem: str(path.parent) for path in catalog.configs().values()
    }
    assert clone == {f"wmtp/{p.parent.name}_{p.stem}": p.read_text() for p in RUNS}
    assert {path.parent for path in catalog.recipes().values()} == {wheel / "recipes"}
    assert file_of("cluster") == wheel / "environments" / "cluster.yaml"
    assert load_config("wmtp/rho1_7b").max_steps == 2000


def test_a_library_beside_torchtunes_recipes_has_none(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "full_finetune_distributed.py").touch()
    monkeypatch.setattr(catalog, "CLONE", tmp_path)
    assert (catalog.recipes(), catalog.configs()) == ({}, {})


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}_{path.stem}")
def test_a_config_says_its_recipe_and_its_own_name(path):
    text = path.read_text()
    in_clone = rf"tune run (.*)recipes/(\w+)\.py --config {path.relative_to(ROOT)}( .*|)\n"
    ((options, recipe, given),) = re.findall(in_clone, text)
    name = f"wmtp/{path.parent.name}_{path.stem}"
    anywhere = f"# From any folder: tune run {options}{recipe} --config {name}{given}\n"
    assert f"{anywhere}# recipe: {recipe}\n" in text
    assert catalog.recipe_of(text) == recipe
    assert name in catalog.configs_of_recipes()[recipe]
    for required in load_config(path).get("requires") or []:
        assert required in catalog.configs()


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("# recipe: mine.py\nx: 1\n", "mine.py"),
        ("\ufeff# Of mine.\n\n#recipe: 'my recipes/mine.py' \nx: 1\n", "my recipes/mine.py"),
        ("# tune run --nproc_per_node 2 'recipes/my x.py'\nx: 1\n", "recipes/my x.py"),
        ("#   tune run --standalone eval_mtp --config x.yaml\n# recipe: a.py\n", "a.py"),
        ("#   uv run tune run --nnodes 2 eval_mtp --config x.yaml\n", "eval_mtp"),
        ("# don't tune run it\n# tune run x.py\n", "x.py"),
        ("x: 1\n# recipe: late.py\n", None),
        ("# Bake it by this recipe: well.\nx: 1\n", None),
        ("", None),
    ],
)
def test_what_a_header_says(text, recipe):
    assert catalog.recipe_of(text) == recipe


def test_a_recipes_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").touch()
    ours = catalog.recipes()["eval_mtp"]
    assert catalog.recipe_file("eval_mtp") == ours
    assert catalog.recipe_file("recipes/eval_mtp.py") == ours  # of a run that was made in a clone
    assert catalog.recipe_file("sub/mine") == tmp_path / "sub" / "mine.py"
    assert catalog.recipe_file("mine.py") is None
    assert catalog.recipe_file("mine.py", tmp_path / "sub") == tmp_path / "sub" / "mine.py"
    assert catalog.recipe_file("") is None


DOCS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_names_and_links_of_the_docs_are_there(path):
    text = path.read_text()
    for name in re.findall(r"(?<![\w/.-])wmtp/\w+", text):
        assert name in catalog.configs()
    for name in re.findall(
        r"(?:tune cp|tune run(?: --\w+ \d+)*) (\w+_(?:distributed|mtp))\b", text
    ):
        assert name in catalog.recipes()
    for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert (path.parent / link).exists(), link
