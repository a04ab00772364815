"""Reads the config that a command line names; whatever is wrong with the file is one sentence.

torchtune's ``config.parse`` reads the file before a recipe can catch anything: a slip in the YAML
ends in a traceback.
"""

import argparse
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune.config._utils import _merge_yaml_and_cli_args
from yaml import MarkedYAMLError, YAMLError

from wmtp_modules import catalog
from wmtp_modules.config import environment
from wmtp_modules.config.check import COMPONENT, ConfigError
from wmtp_modules.config.components import todays_name


def read_config(argv: Sequence[str] | None = None, description: str | None = None) -> DictConfig:
    """The config of ``--config FILE key=value ... ~key``, overrides merged as torchtune does.

    Below the file is the environment, see ``config/environment.py``; ``environment=`` is no key.
    ``argv`` None takes this process's arguments; ``description`` is shown by ``--help``.

    Raises:
        ConfigError: if the file cannot be read as a config, or an argument is not an override.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", metavar="FILE", required=True, help="YAML file of the run, or wmtp/NAME"
    )
    parser.epilog = (
        "Any key of the file can be set by key=value, and taken out by ~key. environment=NAME says "
        "where files and figures go: docs/environments.md."
    )
    known, overrides = parser.parse_known_args(argv)
    below = read_environment(overrides)
    flags = [argument for argument in overrides if argument.startswith("-")]
    if flags:
        raise ConfigError(
            f"{flags[0]} is not an option of a recipe: give --config FILE, overrides as key=value"
        )
    own = load_config(known.config)
    try:
        values = cast(dict[str, Any], OmegaConf.to_container(merged(below, own)))
        cfg = _merge_yaml_and_cli_args(Namespace(**values), overrides)
    except (ValueError, TypeError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(
            f"the overrides {' '.join(overrides)} cannot be merged into {known.config} "
            f"({_in_one_line(error)})"
        ) from error
    _rename_moved_(cfg)
    _follow_checkpoint_(cfg)
    return cfg


def read_environment(overrides: list[str]) -> DictConfig:
    """The environment that overrides choose, which are taken out of the list, or WMTP_ENVIRONMENT.

    Raises:
        ConfigError: if there is none of that name, or it is not one.
    """
    place = environment.file_of(environment.take_choice(overrides))
    cfg = load_config(place)
    environment.check_blocks(cfg, place)
    return cfg


def merged(cfg: DictConfig, *changes: DictConfig | dict) -> DictConfig:
    """A copy of a config with changes, later ones over earlier ones."""
    return cast(DictConfig, OmegaConf.merge(cfg, *changes))


def load_config(path: str | Path) -> DictConfig:
    """A config, interpolations unresolved; ConfigError if it is not YAML of keys.

    ``path`` may be the name of one that came with the library, such as ``wmtp/rho1_7b``.
    """
    try:
        config = OmegaConf.load(catalog.config_file(path))
    except OSError as error:
        is_name = str(path).startswith(catalog.PREFIX)
        hint = catalog.close_to(str(path), catalog.configs()) if is_name else ""
        raise ConfigError(f"{path} cannot be read as a config: {error.strerror}{hint}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply for a config") from error
    except (ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{path} is not valid YAML, correct it there ({_in_one_line(error)})"
        ) from error
    except Exception as error:  # PyYAML trips over a tag without its value: "!!int" is IndexError
        raise ConfigError(
            f"{path} is not valid YAML: a value is not what its !!tag says"
        ) from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path} is a list, not the config of a run: write keys and values")
    for key in config:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: the key {key!r} is not text: write it in quotes")
    _rename_moved_(config)
    _follow_checkpoint_(config)
    return config


def _follow_checkpoint_(cfg: DictConfig) -> None:
    """The tokenizer, and the folder of ``mtp_from_checkpoint``, are the checkpoint's if not said.

    As interpolations, so that whatever else names another checkpoint moves them along.
    """
    try:
        blocks = [cfg.get(key) for key in ("checkpointer", "tokenizer", "model")]
    except OmegaConfBaseException:  # the check of the config says so
        return
    checkpointer, tokenizer, model = blocks
    if not isinstance(checkpointer, DictConfig) or "checkpoint_dir" not in checkpointer:
        return
    folder = "${checkpointer.checkpoint_dir}"
    raw = OmegaConf.to_container
    if isinstance(tokenizer, DictConfig) and cast(dict, raw(tokenizer)).get("path") is None:
        tokenizer.path = f"{folder}/tokenizer.model"
    if isinstance(model, DictConfig):
        own = cast(dict, raw(model))
        is_read = str(own.get(COMPONENT)).endswith(".mtp_from_checkpoint")
        if is_read and own.get("checkpoint_dir") is None:
            model.checkpoint_dir = folder


def _rename_moved_(node: Any) -> None:
    """torchtune imports a ``_component_`` by its path, so the path must be today's."""
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        if isinstance(node[key], DictConfig | ListConfig):
            _rename_moved_(node[key])
        elif key == COMPONENT and isinstance(node[key], str):
            node[key] = todays_name(node[key])


def _in_one_line(error: Exception) -> str:
    """A parser's report without its line breaks and omegaconf's list of attributes."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    text = str(error).partition("full_key:")[0]
    return " ".join(text.split()) or type(error).__name__
