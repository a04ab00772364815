"""docs/configuration.md and the JSON schemas say what the check of a config holds to."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from wmtp_modules.config.reference import RECIPES, ROOT, written

# Comes with moto, of the development group; an installation that only runs has none.
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema comes with the dev group")
CONFIGS = [
    path for path in sorted(ROOT.glob("configs/*/*.yaml")) if path.parent.name != "environments"
]


@pytest.fixture(scope="module")
def files() -> dict[Path, str]:
    return written()


def schema(name: str) -> dict:
    return json.loads((ROOT / "configs" / "schema" / f"{name}.json").read_text())


def errors(path: Path, **changes) -> list[str]:
    """Dotted keys that the schema of a config's recipe complains of."""
    (name,) = set(re.findall(r"recipes/(\w+)\.py", path.read_text()))
    cfg = OmegaConf.merge(OmegaConf.load(path), changes)
    found = jsonschema.Draft7Validator(schema(name)).iter_errors(OmegaConf.to_container(cfg))
    return [".".join(map(str, one.absolute_path)) for one in found]


def test_what_is_written_is_what_the_classes_say(files):
    """If this fails: uv run python -m wmtp_modules.config.reference"""
    assert {path for path in ROOT.glob("configs/schema/*")} == {*files} - {
        ROOT / "docs" / "configuration.md"
    }
    for path, text in files.items():
        assert path.read_text() == text, path


def test_every_recipe_has_its_schema():
    assert {path.stem for path in ROOT.glob("recipes/*_*.py")} - {"__init__"} == {*RECIPES}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_shipped_config_is_right_in_an_editor(path):
    assert errors(path) == []


def test_an_editor_marks_typos_and_what_is_out_of_range():
    path = ROOT / "configs" / "rho1" / "7b.yaml"
    assert errors(path, max_stps=3) == [""]  # of the whole config
    assert errors(path, max_steps=0) == ["max_steps"]
    assert errors(path, device="tpu") == ["device"]
    assert errors(path, reference={"batch_tokens": 0}) == ["reference"]
    assert errors(path, weighting={"rato": 0.5}) == ["weighting"]
    assert errors(path, max_steps="${oc.env:STEPS}", reference="${other}") == []


def test_every_key_says_what_it_is():
    def silent(one: dict, above: str = "") -> Iterator[str]:
        for option in one.get("anyOf", [one]):
            for key, inner in option.get("properties", {}).items():
                yield from silent(inner, f"{above}{key}.")
                if not inner.get("description"):
                    yield f"{above}{key}"

    assert {key for name in RECIPES for key in silent(schema(name))} == set()
