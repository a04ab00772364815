"""Holds docker/vessl.yaml to VESSL's own schema, offline and without an account.

    uv run --no-project --with vessl==0.1.199 python docker/check_vessl.py [FILE]

VESSL's package has its server's form of a run's file as classes: which keys there are, of which
types, and which values some of them may have. What the file writes short (``image: URL``, ``NAME:
value`` below env) is spelt out first, as VESSL's reference of the file has it. Whether cluster,
preset, image and secrets exist only VESSL can say. Exit codes: 0 it fits, 1 it does not, 77 the
package is not there.
"""

import re
import sys
from pathlib import Path
from typing import Any

FORM = "V1RunSpecFormBodyInput"
NATIVE = {"str": str, "int": int, "bool": bool, "float": float, "object": object}
# The prefixes by which a volume's source may be written as one string.
SOURCES = ("git://", "hf://", "vessl-dataset://", "vessl-model://", "s3://", "gs://", "volume://")


def spelt_out(value: Any, form: str) -> Any:
    """What a file may write short, as the form has it."""
    if form == "V1ImageForm" and isinstance(value, str):
        return {"url": value}
    if form == "V1EnvForm":
        if not isinstance(value, dict):
            return {"source": "text", "value": str(value)}
        return {"source": "secret" if "secret" in value else "text", **value}
    if form in ("V1ImportForm", "V1ExportForm") and isinstance(value, str):
        return {} if value.startswith(SOURCES) else value
    return value


def problems(value: Any, kind: str, where: str, models: Any) -> list[str]:
    """What does not fit the type ``kind`` of VESSL's classes, a line each."""
    if match := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            return [f"{where} must be a list, got {value!r}"]
        items = [(f"{where}[{i}]", one, match[1]) for i, one in enumerate(value)]
    elif match := re.fullmatch(r"dict\[[^,]+, (.+)\]", kind):
        if not isinstance(value, dict):
            return [f"{where} must be a mapping, got {value!r}"]
        items = [(f"{where}.{name}", one, match[1]) for name, one in value.items()]
    elif kind in NATIVE:
        fits = isinstance(value, NATIVE[kind]) and not (kind == "int" and value is True)
        return [] if fits else [f"{where} must be {kind}, got {value!r}"]
    else:
        model, value = getattr(models, kind), spelt_out(value, kind)
        if not isinstance(value, dict):
            return [f"{where} must be a mapping, got {value!r}"]
        names = {model.attribute_map[name]: name for name in model.attribute_map}
        found = [f"{where}.{name} is no key of VESSL's" for name in value if name not in names]
        items = [
            (f"{where}.{name}", one, model.openapi_types[names[name]])
            for name, one in value.items()
            if name in names
        ]
        if not found:
            try:  # the classes themselves know which values are allowed
                model(**{names[name]: one for name, one in value.items()})
            except ValueError as error:
                found.append(f"{where}: {error}")
        return found + [
            line for place, one, of in items for line in problems(one, of, place, models)
        ]
    return [line for place, one, of in items for line in problems(one, of, place, models)]


def check(text: str) -> list[str]:
    """Problems of a run's file, a line each; none if VESSL's package has nothing against it.

    Raises:
        ImportError: without VESSL's package.
    """
    import vessl.run
    import yaml
    from vessl.openapi_client import models

    cfg = yaml.safe_load(text)
    found = problems(cfg, FORM, "run", models)
    # What its command does before it sends the file, but for asking the server for clusters.
    told, resources = {**cfg}, {**cfg.get("resources", {})}
    resources.pop("cluster", None)
    if "resources" in told:
        told["resources"] = resources
    if vessl.run.verify_yaml(yaml.safe_dump(told))[2] is False:
        found.append("run: vessl.run.verify_yaml refuses it: it has no image or no resources")
    return found


def main() -> int:
    given = sys.argv[1:] or [str(Path(__file__).with_name("vessl.yaml"))]
    try:
        lines = check(Path(given[0]).read_text())
    except ImportError as error:
        print(f"Not checked ({error}): run it as the top of {Path(__file__).name} says.")
        return 77
    print("\n".join(lines) or f"{given[0]} fits the schema of VESSL's package")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
