"""Controls: the other runs of a config, each this very config under a few overrides, with a name.

In a config ``controls`` is a list of weightings, or names with what each changes:

    controls: [uniform, random_topk]

    controls:
      uniform: # nothing more: the weighting of that name
      uniform_good: {weighting.name: uniform, policy_rewards_above: 0}
      longer: {max_steps: 160} # no weighting's name: the run's own weighting

Overrides are dotted or nested keys. A list may hold both kinds, ``[uniform, {longer: {...}}]``.
"""

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wmtp_modules.config.check import COMPONENT, ConfigError, raise_errors
from wmtp_modules.config.file import merged
from wmtp_modules.config.secrets import without_secrets
from wmtp_modules.run.resume import resolved

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # a folder, a legend, a key of summary.json

START = "all runs of a config begin from the same start, else it is not the override that is seen"
HELD_OUT = "held-out losses compare only on the same text, in the same tokens and precision"
TOGETHER = "it holds for all runs of a config together"
START_KEYS, HELD_OUT_KEYS = ("seed", "model", "checkpointer"), ("dataset_val", "tokenizer", "dtype")
SAME = dict.fromkeys(START_KEYS, START) | dict.fromkeys(HELD_OUT_KEYS, HELD_OUT)
# What no control may change, and why.
FIXED = {
    **SAME,
    **dict.fromkeys(
        ("output_dir", "controls", "control"), "its folder is controls/NAME of the run"
    ),
    **dict.fromkeys(("device", "max_hours", "collective_timeout_s"), TOGETHER),
    **dict.fromkeys(("assets_dir", "prepare", "requires"), TOGETHER),
    **dict.fromkeys(("replay", "resume_from_checkpoint"), TOGETHER),
}
# In the critic's recipe, which makes these before the first policy.
FIXED_OF_CRITIC = dict.fromkeys(
    ("stages", "dataset", "rewards", "critic", "value_table", "allow_uninformative_critic"),
    "the stages before the policy are made once, for all runs of a config",
)


def name_of(cfg: DictConfig) -> str:
    """What a run is called beside others, in tables, pictures and summaries.

    A control has a name of its own; any other run is called by its weighting.
    """
    return cfg.control.name if cfg.get("control") else cfg.weighting.name


def overrides_of(control: DictConfig) -> dict[str, Any]:
    """What a control changes, by dotted key, to be written and shown."""
    if control.get("control"):
        return without_secrets(resolved(control)["control"]["overrides"])
    return {"weighting.name": control.weighting.name}


def runs_of(cfg: DictConfig, weightings: Collection[str]) -> list[DictConfig]:
    """Controls first, then the run itself; see ``control_runs``."""
    return [*control_runs(cfg, weightings), cfg]


def control_runs(cfg: DictConfig, weightings: Collection[str]) -> Iterator[DictConfig]:
    """The config of each control of a config that is checked but for them: same start, same text.

    ``weightings`` are the names that ``weighting.name`` may have.

    Raises:
        ConfigError: if a name is no name or is taken, or an override may not be one.
    """
    for name, overrides in _override_sets(cfg, weightings):
        if isinstance(overrides, ConfigError):
            raise overrides
        yield _control(cfg, name, overrides)


def check_all(
    cfg: DictConfig,
    weightings: Collection[str],
    check: Callable[[DictConfig], None],
    check_together: Callable[[list[DictConfig]], list[str]] = lambda _: [],
) -> None:
    """Check the config of a run and, as if each were one by itself, those of its controls.

    ``check`` raises what is wrong with one of them. What a control has from the run is told once.
    ``check_together`` gets those that are sound, the run first, and returns what is wrong between
    them.

    Raises:
        ConfigError: with all that is wrong, that of a control headed by ``controls.NAME``.
    """
    own = _errors_of(check, cfg)
    errors, sound = [*own], [] if own else [cfg]
    try:
        for name, overrides in _override_sets(cfg, weightings):
            try:
                if isinstance(overrides, ConfigError):
                    raise overrides
                one = _control(cfg, name, overrides)
            except ConfigError as error:
                errors.append(str(error))
                continue
            found = _errors_of(check, one)
            sound += [] if found else [one]
            for line in found:
                is_key = re.split(r"\W", line, maxsplit=1)[0] in one
                errors += [] if line in own else [f"controls.{name}{'.' if is_key else ': '}{line}"]
    except ConfigError as error:
        errors.append(str(error))
    except (AttributeError, TypeError, ValueError, OmegaConfBaseException):
        if not own:
            raise
        # What controls are made from is wrong itself, which is among the errors.
    raise_errors(errors + check_together(sound))


def _errors_of(check: Callable[[DictConfig], None], cfg: DictConfig) -> list[str]:
    try:
        check(cfg)
    except ValueError as error:
        first, *others = str(error).splitlines()
        return [line.strip() for line in others or [first]]
    return []


def _override_sets(
    cfg: DictConfig, weightings: Collection[str]
) -> Iterator[tuple[str, dict[str, Any] | ConfigError]]:
    """Of each control its name and its overrides by dotted key, or why it is none."""
    own, taken = name_of(cfg), {}
    for name, given in _named_sets(cfg.get("controls")):
        try:
            overrides = _overrides(name, given, own, taken, weightings)
        except ConfigError as error:
            yield name, error
        else:
            if overrides is not None:
                taken[name] = overrides
                yield name, overrides


def _overrides(
    name: str, given: Any, own: str, taken: dict[str, dict], weightings: Collection[str]
) -> dict[str, Any] | None:
    """By dotted key; None for the run itself, or a control that is named twice."""
    where = f"controls.{name}"
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"controls: the name {name!r} cannot be a folder's: take letters, digits, '_', '-' "
            "and '.'"
        )
    if not isinstance(given, dict | None):
        raise ConfigError(
            f"{where}: must be a block of overrides such as {{weighting.name: uniform}}, got "
            f"{given!r}"
        )
    overrides = _by_dotted_key(given or {}, where)
    if "weighting.name" not in overrides and (not overrides or name in weightings):
        overrides = {"weighting.name": name, **overrides}
    weighting = overrides.get("weighting.name", name)
    is_plain = overrides == {"weighting.name": name}
    if is_plain and (name == own or taken.get(name) == overrides):
        return None
    if name in (own, "base", *taken):
        whose = {own: "the run itself", "base": "the model before training"}
        raise ConfigError(
            f"{where}: {name!r} is already {whose.get(name, 'another control')}: give this "
            "control another name"
        )
    if name in weightings and weighting != name:
        raise ConfigError(
            f"{where}.weighting.name: {weighting!r} under the name of another weighting: give "
            "this control another name"
        )
    return overrides


def _named_sets(controls: Any) -> Iterator[tuple[str, Any]]:
    """(name, overrides or None), interpolations unresolved: the run's config resolves them."""
    if controls is None:
        return
    plain: Any = OmegaConf.to_container(controls)
    for i, item in enumerate([plain] if isinstance(plain, dict) else plain):
        if isinstance(item, str):
            yield item, None
        elif isinstance(item, dict) and (plain is item or len(item) == 1):
            yield from item.items()
        else:
            raise ConfigError(
                f"controls[{i}]: must be a name, or one name with its overrides indented below it, "
                f"got {item!r}"
            )


def _by_dotted_key(block: dict, where: str, above: str = "") -> dict[str, Any]:
    """Leaves of nested blocks by dotted key; ConfigError if one is given twice."""
    flat: dict[str, Any] = {}
    for key, value in block.items():
        dotted = above + key
        if not all(dotted.split(".")) or {*"[]"} & {*key}:
            raise ConfigError(f"{where}: {dotted!r} is not a key, dotted or not")
        is_block = isinstance(value, dict) and value
        new = _by_dotted_key(value, where, f"{dotted}.") if is_block else {dotted: value}
        for one in new:
            if any(f"{one}.".startswith(f"{k}.") or k.startswith(f"{one}.") for k in flat):
                raise ConfigError(f"{where}.{one}: is there twice, dotted and nested: keep one")
        flat |= new
    return flat


def _control(cfg: DictConfig, name: str, overrides: dict[str, Any]) -> DictConfig:
    is_plain = overrides == {"weighting.name": name}
    fixed = FIXED | (FIXED_OF_CRITIC if "stages" in cfg else {})
    for key in overrides:
        if reason := fixed.get(key.split(".")[0]):
            raise ConfigError(f"controls.{name}.{key}: no control may change it: {reason}")
    changes = OmegaConf.create({})
    for key, value in overrides.items():
        OmegaConf.update(changes, key, value, force_add=True)
    folder = Path(str(cfg.get("output_dir"))) / "controls" / name
    place = {"output_dir": str(folder), "controls": None}
    without_overrides = merged(cfg, place)
    # A block that builds something else takes over nothing of the one before.
    others = [
        key
        for key, block in changes.items()
        if OmegaConf.select(changes, f"{key}.{COMPONENT}")
        not in (None, OmegaConf.select(cfg, f"{key}.{COMPONENT}"))
    ]
    control = merged(without_overrides, dict.fromkeys(others))
    control.pop("control", None)
    if not is_plain:  # of a plain one the weighting says it all
        for block in filter(None, map(control.get, ("metric_logger", "tracking"))):
            plain: Any = OmegaConf.to_container(block)
            for key, value in plain.items():
                if isinstance(value, str):  # such as run_name: it is called by its name there too
                    block[key] = value.replace("${weighting.name}", name)
        control = merged(control, {"control": {"name": name, "overrides": overrides}})
    try:
        control = merged(control, changes)
    except TypeError as error:  # keys where the config has a list
        raise ConfigError(f"controls.{name}: {overrides} do not fit the config: {error}") from error
    for key, reason in SAME.items():
        if _value(control, key) != _value(without_overrides, key):
            raise ConfigError(
                f"controls.{name}: changes {key} too, which names one of the overrides: write its "
                f"value out, {reason}"
            )
    return control


def _value(cfg: DictConfig, key: str) -> Any:
    value = cfg.get(key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
