"""``tune cp``, ``tune run`` and ``tune validate`` where they must differ from torchtune's.

Whatever concerns torchtune's own recipes and configs is left to torchtune.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

from torchtune import _recipe_registry as registry
from torchtune._cli.cp import Copy
from torchtune._cli.run import ROOT, Run
from torchtune._cli.validate import Validate

from wmtp_modules import catalog
from wmtp_modules.config.secrets import hidden


def know_ours() -> None:
    """Have our recipes and configs in torchtune's list, which its subcommands read."""
    known = _names()
    files = catalog.recipes(), catalog.configs()
    for name, configs in catalog.configs_of_recipes().items():
        if name not in known:
            listed = [registry.Config(one, str(files[1][one])) for one in configs]
            # An absolute path stands for itself behind torchtune's folder.
            registry._ALL_RECIPES.append(registry.Recipe(name, str(files[0][name]), listed, True))


class CopyOurs(Copy):
    """Into a folder under the name by which a file is called, also from a clone."""

    def _cp_cmd(self, args: argparse.Namespace) -> None:
        ours = dict.fromkeys(catalog.recipes(), ".py") | dict.fromkeys(catalog.configs(), ".yaml")
        if args.file in ours and args.destination.is_dir():
            name = args.file.removeprefix(catalog.PREFIX) + ours[args.file]
            args.destination /= name
        super()._cp_cmd(args)


class RunOurs(Run):
    """Recipes of any file as well: a path, a file here, a folder without ``__init__.py``."""

    def _get_recipe(self, recipe_str: str) -> registry.Recipe | None:
        found = super()._get_recipe(recipe_str)
        files = [path for path in (recipe_str, f"{recipe_str}.py") if os.path.isfile(path)]
        if found is None and files:
            file = os.path.abspath(files[0])
            # In a package torchtune's way, `python -m recipes.mine`, lets its files import another.
            if (
                not _is_in_a_package(files[0])
                or _origin(self._convert_to_dotpath(files[0])) != file
            ):
                return registry.Recipe(recipe_str, file, [], True)
        return found

    def _convert_to_dotpath(self, recipe_path: str) -> str:
        return super()._convert_to_dotpath(os.path.normpath(recipe_path))  # ./recipes/mine.py

    def _run_cmd(self, args: argparse.Namespace) -> None:
        if os.getcwd() not in sys.path:  # what a recipe or a config may name, and torchtune adds
            sys.path.append(os.getcwd())
        for words in (args.recipe_args, sys.argv):  # torchtune counts both, and wants two words
            for i, word in enumerate(words):
                if word.startswith("--config="):
                    words[i : i + 1] = word.split("=", 1)
                    break
        if args.recipe_args[-1:] == ["--config"]:
            self._parser.error("--config needs a file, or a name that `tune ls` shows")
        dotted = self._convert_to_dotpath(args.recipe)
        if self._get_recipe(args.recipe) is None and _origin(dotted) is None:
            self._parser.error(
                f"{args.recipe} is neither a file nor the name of a recipe"
                f"{catalog.close_to(args.recipe, _names())}: `tune ls` shows the names"
            )
        super()._run_cmd(args)

    def _run_distributed(self, args: argparse.Namespace, is_builtin: bool) -> None:
        if is_builtin and not _is_torchtunes(args.recipe):
            # `python FILE` looks beside the file only, `python -m` and one process look here too.
            paths = [os.environ.get("PYTHONPATH"), os.getcwd()]
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        super()._run_distributed(args, is_builtin)

    def _run_single_device(self, args: argparse.Namespace, is_builtin: bool) -> None:
        if not is_builtin:  # as several processes find it, before installed packages
            sys.path.insert(0, os.getcwd())
        elif not _is_torchtunes(args.recipe):
            sys.path.append(os.path.dirname(args.recipe))
        super()._run_single_device(args, is_builtin)


class ValidateOurs(Validate):
    """Strict, where a config says at its top which recipe it is for."""

    def _validate_cmd(self, args: argparse.Namespace) -> None:
        from wmtp_modules.cli.checks import problems_of, recipe_for  # imports a recipe's all

        file = catalog.config_file(args.config)
        try:
            text = file.read_text("utf-8")
            if "wmtp_modules." not in text and not catalog.is_said_or_ours(text):
                return super()._validate_cmd(args)
            problems, missing = problems_of(str(file), [], recipe_for(args.config), files=False)
        except (ValueError, OSError) as error:
            hint = catalog.close_to(str(args.config), catalog.configs())
            told = f"{args.config} cannot be read: {error}{hint}"
            self._fail(told if isinstance(error, OSError | UnicodeError) else str(error))
        if problems:
            self._fail("\n  ".join([f"{args.config} is not valid", *problems]))
        print("Config is well-formed!")
        if missing:
            print(f"To be given on the command line: {' '.join(f'{key}=...' for key in missing)}")

    def _fail(self, told: str) -> NoReturn:
        self._parser.error(hidden(told))
        raise AssertionError  # it has ended the process


COMMANDS = {Copy: CopyOurs, Run: RunOurs, Validate: ValidateOurs}


def _names() -> list[str]:
    return [recipe.name for recipe in registry.get_all_recipes()]


def _is_in_a_package(path: str) -> bool:
    """Whether a relative path is that of a module, in packages from here down."""
    folders = Path(path).parent.parts
    names = [*folders, Path(path).stem]
    return (
        bool(folders)
        and all(name.isidentifier() for name in names)
        and all(Path(*folders[: n + 1], "__init__.py").is_file() for n in range(len(folders)))
    )


def _origin(module: str) -> str | None:
    """The file of a module by its dotted name, None if there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return spec.origin if spec else None


def _is_torchtunes(file: str) -> bool:
    return Path(file).is_relative_to(ROOT / "recipes")
