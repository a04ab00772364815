"""Writes docs/configuration.md and the JSON schemas in configs/schema from the recipes' classes.

    uv run python -m wmtp_modules.config.reference

A test holds them equal: run it when a key has changed.
"""

import inspect
import json
import re
import runpy
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel

from wmtp_modules.config.check import (
    COMPONENT,
    Arguments,
    Component,
    Keys,
    fields_of,
    keys_of,
    kinds_of,
)
from wmtp_modules.config.keys import Places, TrainingKeys

ROOT = Path(__file__).parents[2]
RECIPES = ("rho1_wmtp_distributed", "critic_wmtp_distributed", "eval_mtp")
TYPES = {"integer": "whole number", "number": "number", "string": "text", "array": "list"}
TYPES |= {"boolean": "true or false", "object": "block"}
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
BOUNDS |= {"exclusiveMaximum": "below"}
# What may stand for any value: another key's, an environment variable's, one still to be given.
INTERPOLATION = {"type": "string", "pattern": r"\$\{|^\?\?\?$"}
HEAD = """\
# Every key of a config

Made by `uv run python -m wmtp_modules.config.reference` from the recipes' classes `Config` and
[`keys.py`](../wmtp_modules/config/keys.py): change it there. A run with a key that is not here, or
with a value that is not of its kind, ends at once and names all of them. A key without an entry
under "if left out" has to be given. Any value may be `${other.key}` or `${oc.env:NAME}`.

A block with `_component_` takes what the function or class of that name takes; below it are the
keys that a recipe knows of. What may be named: [`components.py`](../wmtp_modules/config/components.py).

## In an editor
[configs/schema](../configs/schema) holds a JSON schema for each recipe. An editor with the YAML
language server completes keys, shows what they mean and marks typos, from a first line in a config
```
# yaml-language-server: $schema=PATH/configs/schema/rho1_wmtp_distributed.json
```
"""  # noqa: E501


def schema_of(keys: type[BaseModel], told: dict[str, str] | None = None) -> dict[str, Any]:
    """The JSON schema of a class of keys; ``told`` says what those are that do not themselves."""
    plain = keys.model_json_schema(ref_template="{model}")["properties"]
    properties = {}
    for key, field in fields_of(keys).items():
        kinds = list(kinds_of(field))
        blocks = [block for block in map(_block, kinds) if block]
        leaf = {k: v for k, v in plain[key].items() if k not in ("title", "default", "description")}
        others = leaf.get("anyOf") or [leaf]
        options = blocks[:1] + [{"type": "null"}] * (NoneType in kinds) if blocks else others
        options += [INTERPOLATION] * ({"type": "string"} not in options)
        properties[key] = options[0] if len(options) == 1 else {"anyOf": options}
        if description := field.description or (told or {}).get(key):
            properties[key] = {"description": description} | properties[key]
        if not field.is_required():
            properties[key] = properties[key] | {"default": field.default}
    required = [key for key, field in fields_of(keys).items() if field.is_required()]
    made = {"type": "object", "properties": properties, "required": required}
    return made | {"additionalProperties": False}


def _block(kind: Any) -> dict[str, Any] | None:
    if isinstance(kind, Arguments):
        return schema_of(keys_of(kind.function, required=kind.required), _told(kind.function))
    if isinstance(kind, Component):
        schema = schema_of(kind.keys or Keys)
        makes = f"what makes it, a {kind.makes}" if kind.makes else "what is called"
        named = {COMPONENT: {"description": f"dotted path of {makes}", "type": "string"}}
        schema["properties"] = named | schema["properties"]
        schema["required"] = [COMPONENT, *schema["required"]]
        return schema | {"additionalProperties": True}
    return schema_of(kind) if isinstance(kind, type) and issubclass(kind, Keys) else None


def _told(function: Callable) -> dict[str, str]:
    """What a docstring says of arguments, a class's with those of the classes below it."""
    told: dict[str, str] = {}
    for one in reversed(getattr(function, "__mro__", (function,))):
        _, _, arguments = f"{inspect.getdoc(one)}\n".partition("Args:\n")
        arguments = re.split(r"^\S", arguments, maxsplit=1, flags=re.M)[0]
        for name, text in re.findall(r"^ {4}(\w+)[^:\n]*: (.*\n(?: {5,}.*\n)*)", arguments, re.M):
            told[name] = " ".join(text.replace("``", "`").split())
    return told


def rows(schema: dict[str, Any], above: str = "") -> Iterator[str]:
    """Lines of a table: dotted key, what it may be, default, meaning."""
    for key, one in schema["properties"].items():
        options = [option for option in one.get("anyOf", [one]) if option != INTERPOLATION]
        kinds = " or ".join(filter(None, map(_words, options)))
        default = "" if key in schema["required"] else f"`{json.dumps(one['default'])}`"
        yield f"| `{above}{key}` | {kinds} | {default} | {one.get('description', '')} |"
        for option in options:
            if option.get("type") == "object" and "properties" in option:
                yield from rows(option, f"{above}{key}.")


def _words(option: dict[str, Any]) -> str:
    if choices := option.get("enum") or ([option["const"]] if "const" in option else []):
        return ", ".join(f"`{choice}`" for choice in choices)
    kind = TYPES.get(option.get("type", ""), option.get("type", "anything"))
    if option.get("items", {}).get("type"):
        kind += f" (each {_words(option['items'])})"
    bounds = [f"{words} {option[key]:g}" for key, words in BOUNDS.items() if key in option]
    return ", ".join([kind, *bounds])


def _table(title: str, keys: type[Keys], of_others: Container[str] = ()) -> str:
    schema = schema_of(keys)
    own = {key: one for key, one in schema["properties"].items() if key not in of_others}
    head = "| key | is | if left out | means |\n|---|---|---|---|"
    return "\n".join([f"\n## {title}", head, *rows(schema | {"properties": own})]) + "\n"


def written() -> dict[Path, str]:
    """Each file that is made, with its text."""
    files, text = {}, HEAD + _table("Keys of every recipe", Places)
    text += _table("Keys of both training recipes", TrainingKeys, Places.model_fields)
    for name in RECIPES:
        keys = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["Config"]
        head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": f"{name}.py"}
        made = json.dumps(head | schema_of(keys), indent=1)
        files[ROOT / "configs" / "schema" / f"{name}.json"] = f"{made}\n"
        text += _table(f"Further keys of {name}.py", keys, keys.__base__.model_fields)
    return files | {ROOT / "docs" / "configuration.md": text}


if __name__ == "__main__":
    for path, text in written().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(path.relative_to(ROOT))
