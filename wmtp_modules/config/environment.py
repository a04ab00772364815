"""Where a run's files and figures go: an environment, merged below a recipe's YAML.

``environment=NAME`` on the command line, else the variable WMTP_ENVIRONMENT, else ``local``. NAME
is a file of ``configs/environments`` without its ending, here or of those that came with the
library, or the path of a YAML, as in docs/environments.md.
"""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers.oc import env

from wmtp_modules.catalog import environments
from wmtp_modules.config.check import ConfigError

FOLDER = Path("configs") / "environments"
DEFAULT = "local"
BLOCKS = ("storage", "tracking", "registry")
# What a required run takes over from the one that requires it: the place, not the name.
INHERITED = ("uri", "required", "artifact_root")
# Variables whose values may stand in URLs, and anywhere in the blocks of an environment: they name
# places and jobs. WMTP_URL_VARIABLES=NAME,NAME in the environment adds others.
FOR_URLS = (
    *("WMTP_STORAGE_ROOT", "WMTP_STORAGE_CACHE", "WMTP_STORAGE_ENDPOINT", "WMTP_SCRATCH"),
    *("WMTP_TRACKING_URI", "WMTP_ARTIFACT_ROOT", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"),
    *("AWS_ENDPOINT_URL_S3", "USER", "LOGNAME", "HOME", "HOSTNAME", "TMPDIR", "XDG_CACHE_HOME"),
    "WMTP_MODEL_NAME",
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_TASK_ID"),
)
MARK = "WMTPvariable"


def take_choice(overrides: list[str]) -> str:
    """The environment that a command line chooses, whose override is taken out of the list."""
    chosen = os.environ.get("WMTP_ENVIRONMENT") or DEFAULT
    for one in [one for one in overrides if one.startswith("environment=")]:
        overrides.remove(one)
        chosen = one.partition("=")[2]
    return chosen


def file_of(chosen: str) -> Path:
    """The file of an environment; ConfigError if there is none."""
    if chosen.endswith((".yaml", ".yml")) or os.sep in chosen:
        return Path(chosen).expanduser()  # who reads it says whether it is there
    known = environments() | {file.stem: file for file in FOLDER.glob("*.yaml")}
    if chosen in known:
        return known[chosen]
    raise ConfigError(
        f"environment={chosen}: {FOLDER} has {', '.join(sorted(known))}: choose one of "
        "them, or give the path of a YAML"
    )


def check_blocks(cfg: DictConfig, file: Path) -> None:
    """ConfigError if an environment says more than where things are."""
    others = sorted(str(key) for key in cfg if key not in BLOCKS)
    if others:
        raise ConfigError(
            f"{file}: {', '.join(others)}: an environment has the blocks {', '.join(BLOCKS)}; "
            "what else a run is stands in its own YAML"
        )


def of_required(cfg: DictConfig) -> dict[str, Any]:
    """What stands below the YAML of a run that this one requires."""
    tracking = {key: cfg.tracking[key] for key in INHERITED if key in (cfg.get("tracking") or {})}
    blocks = {"storage": cfg.get("storage"), "tracking": tracking or None}
    return {key: block for key, block in blocks.items() if block}


def refuse_variables(cfg: DictConfig) -> None:
    """ConfigError where a config would send an environment variable's value somewhere.

    In a URL, and anywhere in the blocks of an environment and the logger's URIs, only variables of
    ``FOR_URLS`` and of WMTP_URL_VARIABLES may stand, by whatever way they come there.
    """
    more = os.environ.get("WMTP_URL_VARIABLES", "").split(",")
    allowed = {*FOR_URLS, *(name.strip() for name in more)}
    found: list[tuple[str, str]] = []

    def marked(name: str, *default: Any) -> Any:
        return env(name, *default) if name in allowed else f"{MARK}{name.encode().hex()}z"

    def look(node: DictConfig | ListConfig, above: str) -> None:
        for key in node if isinstance(node, DictConfig) else range(len(node)):
            try:
                value = node[key]
            except OmegaConfBaseException:  # the check of the config says so
                continue
            dotted = f"{above}{key}"
            if isinstance(value, DictConfig | ListConfig):
                look(value, f"{dotted}.")
            elif isinstance(value, str) and MARK in value:
                is_place = dotted.split(".")[0] in BLOCKS or "uri" in dotted.split(".")[-1]
                if is_place or "://" in value:
                    name = value.split(MARK)[1].partition("z")[0]
                    found.append((dotted, bytes.fromhex(name).decode()))

    OmegaConf.register_resolver("oc.env", marked, replace=True)
    try:
        look(cfg.copy(), "")
    finally:
        OmegaConf.register_resolver("oc.env", env, replace=True)
    if found:
        dotted, name = found[0]
        raise ConfigError(
            f"{dotted}: the value of the environment variable {name} would be sent there: no "
            "config may do that unless you allow it with WMTP_URL_VARIABLES="
            f"{name} (docs/environments.md)"
        )
