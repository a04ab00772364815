"""Checks a recipe's config before any process group or model exists, all errors at once.

A recipe declares its keys as a plain dict, ``{"seed": int, "optimizer": Component(...)}``. What
may stand for a key:

- a type or annotation: ``int``, ``float | None``, ``list[str]``, ``Literal[...]``;
- a tuple of choices: ``("bf16", "fp32")``;
- a dict: a nested block;
- ``AtLeast(int, 1)``, ``Above(float, 0)``: a number in that range;
- a function or class: a block of its keyword arguments, names, types and defaults as it has them;
- ``Component(...)``: a block with ``_component_``, checked against what that names;
- ``Optional(x)``: x, or the key left out or null; ``Nullable(x)``: x or null, but written.

What keys must be together is said by rules, functions whose parameters are named after keys.
"""

import inspect
import math
import numbers
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, cast, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from wmtp_modules.config.components import NotAllowedError, closest, locate

# Of omegaconf's resolvers (``${oc.env:X}``) the one that imports whatever module a config names.
OmegaConf.clear_resolver("oc.coerce")

COMPONENT = "_component_"
KEY_ERROR = "KeyError raised while resolving interpolation: "  # by omegaconf, of a variable
SHOWN = 100  # characters of a value in an error
LEAF_TYPES = (bool, int, float, str, list, dict, type(None))


class ConfigError(ValueError):
    """Everything that is wrong with a config, one line each."""


@dataclass(frozen=True)
class Optional:
    """A key that may be left out or null."""

    schema: Any


@dataclass(frozen=True)
class Nullable:
    """A key that must be there and may be null."""

    schema: Any


@dataclass(frozen=True)
class AtLeast:
    """A number not below a bound."""

    kind: type
    bound: float


@dataclass(frozen=True)
class Above(AtLeast):
    """A number above a bound."""


@dataclass(frozen=True)
class Component:
    """A block whose ``_component_`` is called with the other keys."""

    given: tuple[str, ...] = ()  # positional arguments that the recipe passes, in their order
    keys: Mapping[str, Any] = field(default_factory=dict)  # schema beyond what the signature says
    makes: str | None = None  # name of a class that the call must return, if it says what it does


def check_config(
    cfg: DictConfig, schema: Mapping[str, Any], rules: Sequence[Callable[..., str | None]] = ()
) -> None:
    """Compare a config with a schema. Imports what components name, calls none of them.

    Args:
        cfg: the config, interpolations not yet resolved.
        schema: what each key must be, see the top of this file.
        rules: each returns what is wrong, headed by the dotted key, or None. Its parameters are
            named after top-level keys and get their values, None for an optional one that is left
            out; it is not called if one of them is already wrong or missing.

    Raises:
        ConfigError: with one line per error, each headed by the dotted key.
    """
    values, errors = _resolve(cfg, "")
    errors += _check_block(values, schema, "")
    wrong = {re.split(r"[.:[]", error, maxsplit=1)[0] for error in errors}
    wrong |= {key for key, kind in schema.items() if not isinstance(kind, Optional)} - values.keys()
    for rule in rules:
        keys = inspect.signature(rule).parameters
        if not wrong & set(keys):
            errors += filter(None, [rule(*map(values.get, keys))])
    if len(errors) == 1:
        raise ConfigError(errors[0])
    if errors:
        raise ConfigError(f"{len(errors)} errors\n" + "\n".join(f"  {error}" for error in errors))


class _Unresolved:
    """Stands for a value that has its error already."""


def _resolve(node: DictConfig | ListConfig, path: str) -> tuple[Any, list[str]]:
    """Plain containers with every interpolation resolved, and what did not resolve."""
    keys = node.keys() if isinstance(node, DictConfig) else range(len(node))
    values, errors = {}, []
    for key in keys:
        if isinstance(node, DictConfig) and not isinstance(key, str):
            errors.append(f"{_join(path, repr(key))}: a key must be text")
            continue
        child_path = f"{path}[{key}]" if isinstance(node, ListConfig) else _join(path, key)
        try:
            value = cast(Any, node)[key]
        except MissingMandatoryValue:
            errors.append(f"{child_path}: must be given a value, got '???'")
            value = _Unresolved()
        except OmegaConfBaseException as error:
            raw = cast(Any, OmegaConf.to_container(node, resolve=False))[key]
            reason = str(error).splitlines()[0].removeprefix(KEY_ERROR)
            errors.append(f"{child_path}: {raw!r} does not resolve ({reason})")
            value = _Unresolved()
        if isinstance(value, DictConfig | ListConfig):
            value, child_errors = _resolve(value, child_path)
            errors += child_errors
        problem = _unusable(value)
        if problem:
            errors.append(f"{child_path}: {problem}")
            value = _Unresolved()
        values[key] = value
    return (list(values.values()) if isinstance(node, ListConfig) else values), errors


def _unusable(value: Any) -> str | None:
    """What YAML can hold and no program can use, whatever the key."""
    if isinstance(value, str):
        if "\0" in value or (not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value)):
            return f"{_show(value)} holds a character no text may have (NUL, or half a surrogate)"
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            return f"a whole number of {value.bit_length()} bits is too large, 63 are used"
    elif isinstance(value, float):
        if math.isnan(value):
            return "must be a number, got nan"
    elif not isinstance(value, (*LEAF_TYPES, _Unresolved)):
        return f"must be text, a number, a list or keys, got {type(value).__name__}"
    return None


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _check(value: Any, schema: Any, path: str) -> list[str]:
    if isinstance(value, _Unresolved):
        return []
    if isinstance(schema, Optional | Nullable):
        return [] if value is None else _check(value, schema.schema, path)
    if isinstance(schema, AtLeast):
        return _check_range(value, schema, path)
    if isinstance(schema, tuple):
        choices = Literal[schema]  # pyrefly: ignore[not-a-type]  # known when this runs, not before
        return _check(value, choices, path)
    is_annotation = schema in (*LEAF_TYPES, Any) or get_origin(schema) is not None
    is_block = isinstance(schema, Mapping | Component) or (callable(schema) and not is_annotation)
    if is_block and not isinstance(value, dict):
        return [f"{path}: must be a block of keys, got {_show(value)}"]
    if isinstance(schema, Component):
        return _check_component(value, schema, path)
    if isinstance(schema, Mapping):
        return _check_block(value, schema, path)
    if is_block:
        return _check_call(value, cast(Callable, schema), (), path)
    return _check_leaf(value, schema, path)


def _check_block(
    values: dict, schema: Mapping[str, Any], path: str, others: bool = False
) -> list[str]:
    """``others``: further keys may stand there, which are not looked at."""
    required = [key for key, kind in schema.items() if not isinstance(kind, Optional)]
    errors = _check_keys(values, {*schema, *(values if others else ())}, required, path)
    for key in schema:
        if key in values:
            errors += _check(values[key], schema[key], _join(path, key))
    return errors


def _check_keys(values: dict, known: Any, required: Sequence[str], path: str) -> list[str]:
    """Unknown and missing keys; a required key that was only mistyped is not missing as well."""
    errors, meant = [], set()
    missing = [key for key in required if key not in values]
    for key in values:
        if key not in known:
            missed = [k for k in known if k not in values]
            match = closest(str(key), missed) or closest(str(key), known)
            meant.add(match)
            hint = f"did you mean '{match}'?" if match else f"known: {', '.join(sorted(known))}"
            errors.append(f"{_join(path, key)}: unknown key ({hint})")
    return errors + [f"{_join(path, key)}: missing" for key in missing if key not in meant]


# ------------------------------------------------------------------ components


def _check_component(values: dict, schema: Component | None, path: str) -> list[str]:
    """``schema`` None: another component passes arguments of which nothing is known here."""
    if COMPONENT not in values:
        return [f"{path}: missing {COMPONENT}, the dotted path of what to build"]
    target = values[COMPONENT]
    if isinstance(target, _Unresolved):
        return []
    here = _join(path, COMPONENT)
    if not isinstance(target, str):
        return [f"{here}: must be a dotted path, got {_show(target)}"]
    try:
        component = locate(target)
    except NotAllowedError as error:
        return [f"{here}: {target!r} is not allowed: {error}"]
    except ImportError as error:
        return [f"{here}: {target!r} does not import: {error}"]
    if not callable(component):
        return [f"{here}: {target!r} is a {type(component).__name__}, not callable"]
    arguments = {key: value for key, value in values.items() if key != COMPONENT}
    if schema is None:
        return _check_call(arguments, component, None, path)
    made, makes = _made_by(component), schema.makes
    if makes and made is not None and makes not in [base.__name__ for base in made.__mro__]:
        return [f"{here}: {target!r} makes a {made.__name__}, not a {makes}"]
    errors = _check_call(arguments, component, schema.given, path)
    said = {error.partition(":")[0] for error in errors}
    further = {k: kind for k, kind in schema.keys.items() if _join(path, k) not in said}
    return errors + _check_block(arguments, further, path, others=True)


def _made_by(component: Callable) -> type | None:
    """The class that a call returns, None if it is not said."""
    if isinstance(component, type):
        return component
    try:
        made = inspect.signature(component, eval_str=True).return_annotation
    except Exception:  # no signature, or an annotation that does not evaluate
        return None
    return made if isinstance(made, type) and made is not inspect.Signature.empty else None


def _check_call(
    values: dict, function: Callable, given: tuple[str, ...] | None, path: str
) -> list[str]:
    """Keyword arguments against a signature whose first ones are ``given`` (None: unknown)."""
    nested = [e for key, v in values.items() for e in _check_nested(v, _join(path, key))]
    parameters = _parameters(function)
    if parameters is None:  # a builtin without a signature: nothing to compare with
        return nested
    kinds = inspect.Parameter
    positional = [
        p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    taken = positional[: len(given or ())]
    takes_any_number = any(p.kind == kinds.VAR_POSITIONAL for p in parameters)
    if given and len(taken) < len(given) and not takes_any_number:
        name, where = given[len(taken)], _join(path, COMPONENT)
        return [f"{where}: {function.__qualname__} has no room for '{name}', given by the recipe"]

    errors = [
        f"{_join(path, key)}: given by the recipe, leave it out" for key in values if key in taken
    ]
    named = (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    known = {p.name: p for p in parameters if p.kind in named}
    required = [name for name, p in known.items() if p.default is p.empty and name not in taken]
    if given is None:
        required = []
    free = {key: value for key, value in values.items() if key not in taken}
    if any(p.kind == kinds.VAR_KEYWORD for p in parameters):
        errors += [f"{_join(path, key)}: missing" for key in required if key not in free]
    else:
        errors += _check_keys(free, known.keys() - set(taken), required, path)
    for key, value in free.items():
        if key not in known or (value is None and known[key].default is None):
            continue
        if isinstance(value, dict) and COMPONENT in value:
            continue  # built by the function: what it becomes is not known here
        errors += _check_leaf(value, _annotation(known[key]), _join(path, key))
    return errors + nested


def _parameters(function: Callable) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function, eval_str=True).parameters.values())
    except (TypeError, ValueError):
        return None
    except Exception:  # an annotation in quotes that does not evaluate; names are enough then
        return list(inspect.signature(function).parameters.values())


def _annotation(parameter: inspect.Parameter) -> Any:
    """What a parameter must be; without an annotation a default number says so too."""
    if parameter.annotation is not parameter.empty:
        return parameter.annotation
    return float if type(parameter.default) in (int, float) else Any


def _check_nested(value: Any, path: str) -> Iterator[str]:
    """Components inside the arguments of another, which builds them itself."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _check_nested(item, f"{path}[{index}]")
    elif isinstance(value, dict) and COMPONENT in value:
        yield from _check_component(value, None, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _check_nested(item, _join(path, key))


# ----------------------------------------------------------------- leaf values


def _check_leaf(value: Any, kind: Any, path: str) -> list[str]:
    if isinstance(value, _Unresolved) or _fits(value, kind) is not False:
        return []
    return [f"{path}: must be {_describe(kind)}, got {_show(value)}{_hint(value, kind)}"]


def _check_range(value: Any, schema: AtLeast, path: str) -> list[str]:
    errors = _check_leaf(value, schema.kind, path)
    if errors:
        return errors
    is_above = isinstance(schema, Above)
    is_inside = value > schema.bound if is_above else value >= schema.bound
    if is_inside and math.isfinite(value):
        return []
    words = "above" if is_above else "at least"
    return [f"{path}: must be {words} {schema.bound}, got {_show(value)}"]


def _fits(value: Any, kind: Any) -> bool | None:
    """Whether a value is what an annotation asks for; None if that cannot be told."""
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        # What can be told decides: text is no `float | Tensor`, whatever a Tensor is made from.
        verdicts = [_fits(value, arg) for arg in args]
        return True if True in verdicts else False if False in verdicts else None
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin in (None, types.NoneType):
        return value is None
    if origin in (int, float):
        number = numbers.Integral if origin is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if origin in (bool, str):
        return isinstance(value, origin)
    if not isinstance(origin, type) or origin is object:
        return None
    if _is_path(origin):
        return isinstance(value, str)
    if issubclass(origin, Mapping):
        items = value.values() if isinstance(value, dict) else ()
        return isinstance(value, dict) and _all_fit(items, args[1:])
    if origin is Iterable or issubclass(origin, Sequence | set):
        if not isinstance(value, list):
            return False
        if origin is tuple and args and args[-1] is not Ellipsis:
            pairs = zip(value, args, strict=False)
            return len(value) == len(args) and all(_fits(i, a) is not False for i, a in pairs)
        return _all_fit(value, args[:1])
    return None


def _is_path(kind: type) -> bool:
    # An abstract class when this runs; for the type checker a protocol, which has no subclasses.
    return issubclass(kind, os.PathLike)  # pyrefly: ignore[invalid-argument]


def _all_fit(items: Iterable, args: tuple) -> bool:
    return all(isinstance(i, _Unresolved) or _fits(i, a) is not False for i in items for a in args)


def _describe(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    names |= {None: "null", types.NoneType: "null", list: "a list", dict: "a block of keys"}
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        told = [arg for arg in args if _fits(object(), arg) is not None]
        return " or ".join(_describe(arg) for arg in told)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(_show(arg) for arg in args)
    if origin is list and args:
        return f"a list (each {_describe(args[0])})"
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: {', '.join(_describe(arg) for arg in args)}"
    if origin in (tuple, Sequence, Iterable):
        return "a list"
    if isinstance(origin, type) and _is_path(origin):
        return "a path"
    return names.get(origin) or getattr(kind, "__name__", str(kind))


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a block of keys"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _hint(value: Any, kind: Any) -> str:
    """What to write instead, where a number was meant."""
    wanted = {kind, *get_args(kind)} & {int, float}
    if wanted and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return f" (write {int(value)})"
    if wanted and isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ""
        return ", which is text (write it without quotes)"
    return ""
