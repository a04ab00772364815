"""Our recipes, configs and environments by name, and where they lie on this machine.

In a clone they are ``recipes/*.py`` and ``configs/FOLDER/FILE.yaml``. A wheel holds copies below
``wmtp_modules/shipped``, each named as it is called (``rho1_7b.yaml``), since ``tune cp NAME .``
keeps a file's name. Standard library only: the build of a wheel (``hatch_build.py``) reads this
file by itself, and so does a process that has not imported torch yet.
"""

import difflib
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

PREFIX = "wmtp/"
SHIPPED = Path(__file__).parent / "shipped"
CLONE = Path(__file__).parents[1]
RECIPES = (SHIPPED if SHIPPED.is_dir() else CLONE) / "recipes"
ENVIRONMENTS = "environments"  # a folder of configs/ whose files belong to no recipe
# Of a config's first comment: "# recipe: NAME", or the path of a recipe's file.
SAYS_RECIPE = re.compile(r"#\s*recipe:\s*(\S.*?)\s*")


def files_of_clone(root: Path) -> dict[str, Path]:
    """What a wheel holds below ``SHIPPED``, by the path that it has there."""
    found = {f"recipes/{path.name}": path for path in root.glob("recipes/[!_]*.py")}
    for path in root.glob("configs/*/*.yaml"):
        folder, name = path.parent.name, path.name
        called = f"{folder}/{name}" if folder == ENVIRONMENTS else f"configs/{folder}_{name}"
        found[called] = path
    return dict(sorted(found.items()))


def _files(kind: str) -> dict[str, Path]:
    if SHIPPED.is_dir():
        return {path.stem: path for path in sorted(SHIPPED.glob(f"{kind}/*"))}
    # Beside an installed library a folder `recipes` is torchtune's.
    files = files_of_clone(CLONE) if (CLONE / "configs").is_dir() else {}
    return {Path(name).stem: path for name, path in files.items() if name.startswith(f"{kind}/")}


def recipes() -> dict[str, Path]:
    """Files of our recipes by name, such as ``rho1_wmtp_distributed``."""
    return _files("recipes")


def configs() -> dict[str, Path]:
    """Files of our configs by name, such as ``wmtp/rho1_7b``."""
    return {f"{PREFIX}{name}": path for name, path in _files("configs").items()}


def environments() -> dict[str, Path]:
    """Files of ``environment=NAME`` by name."""
    return _files(ENVIRONMENTS)


def config_file(name_or_path: str | Path) -> Path:
    """The file of a config that is named as ``wmtp/rho1_7b``, or the path that was given."""
    return configs().get(str(name_or_path)) or Path(name_or_path)


def close_to(name: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)", or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def recipe_of(text: str) -> str | None:
    """The recipe, a name or a path, that the comment at the top of a config's text says it is for.

    ``# recipe: NAME`` says it, else the first ``tune run`` command: a run's ``config.yaml`` begins
    with the one that started it.
    """
    head = _head_of(text)
    for line in head:
        if said := SAYS_RECIPE.fullmatch(line):
            return said[1].strip("'\"")
    for line in head:
        _, command, after = line.partition("tune run ")
        try:
            words = shlex.split(after)
        except ValueError:  # prose with an apostrophe
            words = after.split()
        if command and (named := [w for w in words if w.endswith(".py") or w in recipes()]):
            return named[0]
    return None


def is_said_or_ours(text: str) -> bool:
    """Whether a config says in so many words which recipe it is for, or its command is of ours.

    The comments of other programs' configs have commands too.
    """
    named = recipe_file(recipe_of(text) or "")
    return named in recipes().values() or any(map(SAYS_RECIPE.fullmatch, _head_of(text)))


def _head_of(text: str) -> list[str]:
    head = []
    for line in text.lstrip("\ufeff").splitlines():
        if line.strip() and not line.startswith("#"):
            break
        head.append(line.strip())
    return head


def recipe_file(name_or_path: str, beside: Path | None = None) -> Path | None:
    """The file of a recipe; a path may be relative to this folder, or to the one ``beside``."""
    if name_or_path in recipes():
        return recipes()[name_or_path]
    for folder in (Path(), *([beside] if beside else [])):
        for path in (folder / name_or_path, folder / f"{name_or_path}.py"):
            if path.suffix == ".py" and path.is_file():
                return path.absolute()
    stem = Path(name_or_path).stem  # a clone's path outside the clone
    is_clones = Path(name_or_path).parent.name == "recipes"
    return recipes().get(stem) if is_clones else None


def configs_of_recipes() -> dict[str, list[str]]:
    """Names of our configs by the name of the recipe that each says it is for."""
    found: dict[str, list[str]] = {name: [] for name in recipes()}
    for name, path in configs().items():
        file = recipe_file(recipe_of(path.read_text("utf-8")) or "", path.parent)
        if file is not None and file.stem in found:
            found[file.stem].append(name)
    return found
