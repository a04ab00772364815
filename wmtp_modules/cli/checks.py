"""Everything that ``tune run`` would refuse of a config, found by the recipe's own checks."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wmtp_modules import catalog
from wmtp_modules.config.check import ConfigError
from wmtp_modules.config.file import merged, read_config
from wmtp_modules.memory.step import import_recipe
from wmtp_modules.run.model import checked_model_args
from wmtp_modules.run.plan import required_runs
from wmtp_modules.run.storing import localized
from wmtp_modules.storage.places import is_url

READ_FIRST = (
    *("checkpointer.checkpoint_dir", "tokenizer.path"),
    *("reference.checkpointer.checkpoint_dir", "rewards.checkpointer.checkpoint_dir"),
)


def recipe_for(config: str | Path, recipe: str | None = None) -> Path:
    """The file of the recipe that a config says it is for, or of the one that is named here.

    Raises:
        ValueError: if it says none, or one that is not there.
    """
    file, known = catalog.config_file(config), catalog.recipes()
    try:
        said = recipe or catalog.recipe_of(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        hint = catalog.close_to(str(config), catalog.configs())
        raise ConfigError(f"{config} cannot be read as a config: {error}{hint}") from error
    if not said:
        raise ConfigError(
            f"{config} does not say which recipe it is for: write '# recipe: NAME' into the "
            f"comment at its top, NAME a recipe's file or one of {', '.join(known)}"
        )
    if (path := catalog.recipe_file(said, file.parent)) is None:
        raise ConfigError(
            f"{config}: its recipe {said} is neither a file nor one of {', '.join(known)}"
            f"{catalog.close_to(said, known)}"
        )
    return path


def problems_of(
    config: str, overrides: list[str], recipe: Path, *, files: bool
) -> tuple[list[str], list[str]]:
    """What is wrong with a config and those that it requires, one line each.

    ``files`` looks for checkpoints and tokenizers as well, unless the run makes them first.

    Returns:
        The lines, and the keys that are still to be given a value ("???"), which are none of them.

    Raises:
        ValueError: if config, overrides or recipe cannot be read at all.
    """
    cfg = read_config(["--config", config, *overrides])
    as_written = cfg.copy()
    missing = sorted(OmegaConf.missing_keys(cfg))
    for folder in (os.getcwd(), str(recipe.parent)):  # where a running recipe may import from
        if folder not in sys.path:
            sys.path.append(folder)
    module = import_recipe(recipe)
    if not callable(getattr(module, "check", None)):
        raise ConfigError(f"the recipe {recipe} has no function check(cfg): ours have one")
    lines = _lines_of(lambda: localized(cfg))
    lines += _lines_of(lambda: module.check(cfg))
    lines = [line for line in lines if line.partition(":")[0] not in missing]
    of_requires = {line for line in lines if line.startswith("requires")}
    for one in [] if missing or of_requires else cfg.get("requires") or []:
        alone = merged(cfg, {"requires": [one]})
        found = _lines_of(lambda alone=alone: required_runs(alone, module.check))
        # What it has from the config above is told already.
        found = [line for line in found if line not in lines]
        lines += [line if line.startswith("requires") else f"{one}: {line}" for line in found]
    if files and not lines and not missing:
        lines += _files_of(as_written)
    return lines, missing


def _lines_of(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except (ValueError, OSError, OmegaConfBaseException) as error:
        first, *others = str(error).splitlines() or [repr(error)]
        return [line.strip() for line in others or [first] if line.strip()]
    return []


def _files_of(cfg: DictConfig) -> list[str]:
    """What is not here of what the run reads first; what is in a store is not looked for."""
    if cfg.get("prepare") or cfg.get("requires"):
        return []  # they make it
    lines = []
    read = {key: OmegaConf.select(cfg, key) for key in READ_FIRST}
    for key, path in read.items():
        if path and not is_url(path) and not Path(path).exists():
            lines.append(f"{key}: there is no {path} on this machine")
    if not lines and cfg.get("model") and not any(is_url(path or "") for path in read.values()):
        lines += _lines_of(lambda: checked_model_args(cfg))
    return lines
