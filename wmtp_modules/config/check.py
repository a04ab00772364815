"""Checks a recipe's config before any process group or model exists, all errors at once.

A recipe names its keys in a class, ``class Config(TrainingKeys)``: pydantic's fields with types,
ranges and a line that says what they are. A value is compared as JSON is, strictly: text is no
number, 1.0 no whole one and 1 not true, but a list may be a tuple and text a path. Beside types
that pydantic has, a block may be ``Arguments`` of a function or a ``Component``. What keys must be
together is said by rules, functions whose parameters are named after keys.
"""

import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, cast, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo

from wmtp_modules.config.components import NotAllowedError, closest, locate

# Of omegaconf's resolvers (``${oc.env:X}``) the one that imports whatever module a config names.
OmegaConf.clear_resolver("oc.coerce")

COMPONENT = "_component_"
KEY_ERROR = "KeyError raised while resolving interpolation: "  # by omegaconf, of a variable
GIVEN = object()  # marks an argument that the recipe passes
SHOWN = 100  # characters of a value in an error
LEAF_TYPES = (bool, int, float, str, list, dict, type(None))
STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, protected_namespaces=())
# Pydantic's errors in our words; "": what YAML holds cannot tell, or it is said elsewhere.
MUST_BE = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    **dict.fromkeys(("list_type", "tuple_type", "iterable_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type"), "a block of keys"),
    "literal_error": "one of {expected}",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "finite_number": "a finite number",
    "missing": "a longer list",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    **dict.fromkeys(("needs_python_object", "callable_type", "extra_forbidden"), ""),
}


class ConfigError(ValueError):
    """Everything that is wrong with a config, one line each."""


class Keys(BaseModel):
    """A block of keys, which has no others."""

    model_config = ConfigDict(**STRICT, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Arguments:
    """A block of the keyword arguments of a function: names, types and defaults as it has them."""

    function: Callable[..., Any]
    required: tuple[str, ...] = ()  # though the function has a default


@dataclass(frozen=True)
class Component:
    """A block whose ``_component_`` is called with the other keys."""

    given: tuple[str, ...] = ()  # positional arguments that the recipe passes, in their order
    keys: type[Keys] | None = Keys  # of which more is known than the signature says
    makes: str | None = None  # name of a class that the call must return, if it says what it does


def check_config(
    cfg: DictConfig, keys: type[Keys], rules: Sequence[Callable[..., str | list[str] | None]] = ()
) -> None:
    """Compare a config with a class of keys. Imports what components name, calls none of them.

    Args:
        cfg: the config, interpolations not yet resolved.
        keys: what each key must be.
        rules: each returns what is wrong, headed by the dotted key, a list of it, or None. Its
            parameters are named after top-level keys and get their values, None for an optional one
            that is left out; it is not called if one of them is already wrong or missing.

    Raises:
        ConfigError: with one line per error, each headed by the dotted key.
    """
    values, errors = _resolve(cfg, "")
    errors += _check_keys(values, keys, "") + _check_values(values, keys, "")
    wrong = {re.split(r"[.:[]", error, maxsplit=1)[0] for error in errors}
    wrong |= {key for key, field in fields_of(keys).items() if field.is_required()} - values.keys()
    for rule in rules:
        names = inspect.signature(rule).parameters
        if not wrong & set(names):
            said = rule(*map(values.get, names)) or []
            errors += [said] if isinstance(said, str) else said
    raise_errors(errors)


def raise_errors(errors: Sequence[str]) -> None:
    """One ConfigError with all of them, if there are any."""
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
        child_path = f"{path}[{key}]" if isinstance(node, ListConfig) else _join(path, key)
        if isinstance(node, DictConfig) and (not isinstance(key, str) or _unusable(key)):
            errors.append(f"{_join(path, repr(key))}: a key must be text")
            continue
        value, problem = _Unresolved(), None
        try:
            value = cast(Any, node)[key]
            problem = _unusable(value)
        except MissingMandatoryValue:
            problem = "must be given a value, got '???'"
        except OmegaConfBaseException as error:
            raw = cast(Any, OmegaConf.to_container(node, resolve=False))[key]
            reason = str(error).splitlines()[0].removeprefix(KEY_ERROR)
            problem = f"{raw!r} does not resolve ({reason})"
        if isinstance(value, DictConfig | ListConfig):
            value, child_errors = _resolve(value, child_path)
            errors += child_errors
        errors += [f"{child_path}: {problem}"] if problem else []
        values[key] = _Unresolved() if problem else value
    return (list(values.values()) if isinstance(node, ListConfig) else values), errors


def _unusable(value: Any) -> str | None:
    """What YAML can hold and no program can use, whatever the key."""
    if isinstance(value, str):
        if "\0" in value or (not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value)):
            return f"{_show(value)} holds a character no text may have (NUL, or half a surrogate)"
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            return f"a whole number of {value.bit_length()} bits is too large, 63 are used"
    elif isinstance(value, float) and math.isnan(value):
        return "must be a number, got nan"
    elif not isinstance(value, (*LEAF_TYPES, DictConfig, ListConfig)):
        return f"must be text, a number, a list or keys, got {type(value).__name__}"
    return None


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


# ----------------------------------------------------------------- keys and values


def fields_of(keys: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a class by their names in a config."""
    return {field.alias or name: field for name, field in keys.model_fields.items()}


def kinds_of(field: FieldInfo) -> Iterator[Any]:
    """What a field may be, with what stands inside of that: classes, ``Arguments``, components."""
    waiting = [*field.metadata, field.annotation]
    for kind in waiting:
        waiting += get_args(kind)
        yield kind


def _check_keys(values: dict, keys: type[BaseModel], path: str) -> list[str]:
    """Unknown and missing keys; a required key that was only mistyped is not missing as well."""
    fields, errors, meant = fields_of(keys), [], set()
    known = [key for key, field in fields.items() if GIVEN not in field.metadata]
    for key in values:
        if key in fields and key not in known:
            errors.append(f"{_join(path, key)}: given by the recipe, leave it out")
        elif key not in known and keys.model_config.get("extra") == "forbid":
            match = closest(key, [k for k in known if k not in values]) or closest(key, known)
            meant.add(match)
            hint = f"did you mean '{match}'?" if match else f"known: {', '.join(sorted(known))}"
            errors.append(f"{_join(path, key)}: unknown key ({hint})")
    for key, field in fields.items():
        here, value = _join(path, key), cast(Any, values.get(key))
        if key not in values and field.is_required() and key not in meant:
            errors.append(f"{here}: missing")
        for kind in kinds_of(field) if isinstance(value, dict) else ():
            if isinstance(kind, Component):
                errors += _check_component(value, kind, here)
            elif isinstance(kind, Arguments):
                block = keys_of(kind.function, required=kind.required)
                errors += _check_keys(value, block, here) + _check_values(value, block, here)
            elif isinstance(kind, type) and issubclass(kind, Keys):
                errors += _check_keys(value, kind, here)
    return errors


def _check_values(values: dict, keys: type[BaseModel], path: str) -> list[str]:
    """What pydantic finds, a line for each value; keys have been looked at."""
    found: dict[str, tuple[Any, dict[str, None]]] = {}
    errors: list[str] = []
    try:
        keys.__pydantic_validator__.validate_json(json.dumps(values, default=lambda _: None))
    except ValidationError as error:
        for one in error.errors(include_url=False):
            here, value = _place(one["loc"], values, path)
            is_of_keys = one["type"] == "missing" and isinstance(value, dict)
            if one["type"] == "value_error":  # by a validator that a recipe's class has
                told = one["msg"].removeprefix("Value error, ")
                errors.append(f"{here}: {told}" if here else told)
            elif not is_of_keys and not isinstance(value, _Unresolved):
                words = one["msg"].removeprefix("Input should be ")
                if one["type"] in MUST_BE:
                    words = (
                        MUST_BE[one["type"]].format(**one.get("ctx", {})).replace(" or '", ", '")
                    )
                found.setdefault(here, (value, {}))[1][words] = None
    for here, (value, words) in found.items():
        # Text is no `float | Tensor`, whatever a Tensor is; of a list in a union its items are.
        told = " or ".join(filter(None, words))
        if told and not any(other.startswith((f"{here}.", f"{here}[")) for other in found):
            hint = _hint(value) if "number" in told else ""
            errors.append(f"{here}: must be {told}, got {_show(value)}{hint}")
    return errors


def _place(loc: tuple, values: Any, path: str) -> tuple[str, Any]:
    """The dotted key and the value of an error; its ``loc`` also names members of unions."""
    for part in loc:
        if isinstance(values, dict) and part in values:
            path, values = _join(path, part), values[part]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            path, values = f"{path}[{part}]", values[part]
    return path, values


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a block of keys"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _hint(value: Any) -> str:
    """What to write instead, where a number was meant."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return f" (write {int(value)})"
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\.?\d[\d_.]*(e[+-]?\d+)?\s*", value, re.I):
        return ", which is text (write it without quotes)"
    return ""


# ------------------------------------------------------------------ components


def _check_component(values: dict, wanted: Component, path: str) -> list[str]:
    if COMPONENT not in values:
        return [f"{path}: missing {COMPONENT}, the dotted path of what to build"]
    target, here = values[COMPONENT], _join(path, COMPONENT)
    if isinstance(target, _Unresolved):
        return []
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
    made = component if isinstance(component, type) else _signature(component).return_annotation
    is_said = isinstance(made, type) and made is not inspect.Signature.empty
    if wanted.makes and is_said and wanted.makes not in [base.__name__ for base in made.__mro__]:
        return [f"{here}: {target!r} makes a {made.__name__}, not a {wanted.makes}"]
    try:
        keys = keys_of(component, wanted.given, more=wanted.keys)
    except TypeError as error:
        return [f"{here}: {error}"]
    errors: list[str] = []
    values = {k: _nested(v, _join(path, k), errors) for k, v in values.items() if k != COMPONENT}
    return _check_keys(values, keys, path) + _check_values(values, keys, path) + errors


def _nested(value: Any, path: str, errors: list[str]) -> Any:
    """A value without the components inside, whose errors are added: another one builds them."""
    if isinstance(value, list):
        return [_nested(item, f"{path}[{i}]", errors) for i, item in enumerate(value)]
    if isinstance(value, dict) and COMPONENT in value:
        errors += _check_component(value, Component(keys=None), path)
        return _Unresolved()
    if isinstance(value, dict):
        return {key: _nested(item, _join(path, key), errors) for key, item in value.items()}
    return value


def keys_of(
    function: Callable,
    given: tuple[str, ...] = (),
    *,
    required: tuple[str, ...] = (),
    more: type[Keys] | None = Keys,
) -> type[BaseModel]:
    """The keyword arguments of a function as a class of keys.

    Args:
        given: positional arguments that the recipe passes.
        required: what a config has to give, whatever its default.
        more: keys of which more is known than the signature says. None: any may be passed as well.

    Raises:
        TypeError: if the function does not take what is given.
    """
    parameters = _signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD]
    kinds = {p.kind for p in parameters}
    if len(positional) < len(given) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        name = given[len(positional)]
        raise TypeError(f"{function.__qualname__} has no room for '{name}', given by the recipe")
    fields: dict[str, tuple[Any, Any]] = {}
    for p in parameters:
        if p.name in positional[: len(given)]:
            fields[p.name] = (Annotated[Any, GIVEN], None)
        elif p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            is_needed = p.name in required or (p.default is p.empty and more is not None)
            fields[p.name] = (_annotation(p), ... if is_needed else p.default)
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    for name, field in (more or Keys).model_fields.items():
        if name in fields or takes_any or field.is_required():
            default = ... if field.is_required() else field.default
            kind: Any = field.annotation
            fields[name] = (Annotated[kind, field], default)
    # Under names of their own, since a class of pydantic's may not have any: "copy", "_x".
    named: dict[str, Any] = {
        f"key_{i}": (kind, Field(default, alias=name))
        for i, (name, (kind, default)) in enumerate(fields.items())
    }
    config = ConfigDict(**STRICT, extra="allow" if takes_any else "forbid")
    return create_model(function.__qualname__, __config__=config, **named)


def _signature(function: Callable) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except (TypeError, ValueError):  # a builtin without a signature: nothing to compare with
        anything = inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)
        return inspect.Signature([anything])
    except Exception:  # an annotation in quotes that does not evaluate; names are enough then
        return inspect.signature(function)


def _annotation(parameter: inspect.Parameter) -> Any:
    """What a parameter must be; without an annotation a default number says so too."""
    kind = parameter.annotation
    if kind is parameter.empty:
        return float if type(parameter.default) in (int, float) else Any
    try:
        if isinstance(kind, str) or not TypeAdapter(kind, config=STRICT).pydantic_complete:
            return Any  # in quotes
    except Exception:  # none that pydantic can look at
        return Any
    return Union[kind, None] if parameter.default is None else kind  # noqa: UP007
