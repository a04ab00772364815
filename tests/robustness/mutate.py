"""Damages bytes, JSON values and configs, reproducibly: the same seed gives the same damage."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import yaml

# What stands where something else should: other types, sizes and signs, and what text can hide.
VALUES = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**400, 0.5, -0.5, 1e300, float("inf"),
    float("-inf"), float("nan"), "", " ", "x", "1e-5", "../../x", "/nowhere/x", "a\0b", "\ud800",
    "x" * 300, "ä\u2028\U0001f40d", [], [1], ["a", None], {}, {"a": 1}, [[[]]], "${nope}", "???",
    "${oc.env:NOPE}", "${", "os.system", "torch.optim.SGD",
)  # fmt: skip
TYPOS = ("q", "_", ".", " ", "0", "é")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a value."""
    if not isinstance(value, dict | list):
        return
    for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        yield from places(child)


def change_value(value: Any, rng: random.Random) -> Any:
    """A copy with one change inside: a value replaced, removed, renamed, repeated or moved."""
    value = copy.deepcopy(value)
    found = list(places(value))
    if not found:
        return rng.choice(VALUES)
    container, key = rng.choice(found)
    kinds = ("nudge", "nudge", "nudge", "replace", "replace", "remove", "rename", "wrap", "swap")
    kind = rng.choice((*kinds, "add"))
    if kind == "nudge":
        container[key] = _nudge(container[key], rng)
    elif kind == "replace":
        container[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == "remove":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        at = rng.randrange(len(key) + 1)
        container[key[:at] + rng.choice(TYPOS) + key[at:]] = container.pop(key)
    elif kind == "wrap":
        container[key] = rng.choice(([container[key]], {"x": container[key]}))
    elif kind == "swap":
        other, other_key = rng.choice(found)
        a, b = copy.deepcopy(container[key]), copy.deepcopy(other[other_key])
        container[key] = b
        if other_key in other if isinstance(other, dict) else other_key < len(other):
            other[other_key] = a
    elif isinstance(container, dict):
        container[rng.choice(("extra", "_component_", "", "a.b"))] = rng.choice(VALUES)
    else:
        container.append(rng.choice(VALUES))
    return value


def _nudge(value: Any, rng: random.Random) -> Any:
    """A value of the same type, which may well be a good one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, 2 * value, value // 2, -value, 0))
    if isinstance(value, float):
        return rng.choice((2 * value, value / 2, -value, 0.0, 1e30 * value, int(value)))
    if isinstance(value, str) and value:
        return rng.choice((value[:-1], value + "x", value.upper(), value[0], f" {value}"))
    return value


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Damage as disks, editors and broken downloads leave it."""
    size = max(len(data), 1)
    at, length = rng.randrange(size), rng.choice((1, 16, 512))
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: data[:at],
        lambda: data[:at],
        lambda: b"",
        lambda: data[:at] + bytes([(data[at] if data else 0) ^ 1 << rng.randrange(8)])
        + data[at + 1 :],
        lambda: data[: at // 8] + bytes([rng.randrange(256)]) + data[at // 8 + 1 :],  # a header
        lambda: data[:at] + bytes(length) + data[at + length :],
        lambda: data[:at] + data[at + length :],
        lambda: data + rng.randbytes(length),
        lambda: data + data,
        lambda: data[at:] + data[:at],
        lambda: rng.randbytes(256),
        lambda: b"\x80\x04\x95" + data,
        lambda: b"PK\x03\x04" + rng.randbytes(64),
        lambda: b"[" * 100_000,
        lambda: b'{"a": 1}\n',
        lambda: b"\xef\xbb\xbf" + data,
        lambda: "ä".encode("latin-1") + data,
    )  # fmt: skip
    return rng.choice(kinds)()


def change_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file, or lines of JSON, with one value changed, or its bytes damaged."""
    if rng.random() < 0.3:
        return change_bytes(data, rng)
    try:
        return json.dumps(change_value(json.loads(data), rng)).encode()
    except ValueError:  # lines
        lines = data.decode().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(change_value(json.loads(lines[at]), rng))
        return "\n".join(lines).encode()


def change_config(text: str, rng: random.Random) -> bytes:
    """A YAML config with one value changed, or with a slip of the hand in its text."""
    if rng.random() < 0.7:
        changed = change_value(yaml.safe_load(text), rng)
        return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True).encode(
            "utf-8", "surrogatepass"
        )
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    kinds: tuple[Callable[[], list[str]], ...] = (
        lambda: lines[:at],
        lambda: lines[:at] + lines[at + 1 :],
        lambda: [*lines[:at], lines[at], *lines[at:]],
        lambda: [*lines[:at], "\t" + lines[at], *lines[at + 1 :]],
        lambda: [*lines[:at], " " + lines[at], *lines[at + 1 :]],
        lambda: [*lines[:at], lines[at].replace(":", "", 1), *lines[at + 1 :]],
        lambda: [*lines[:at], lines[at].replace(": ", ":", 1), *lines[at + 1 :]],
        lambda: [*lines[:at], lines[at] + rng.choice("\0\x07}]'\"${#&*!%@`"), *lines[at + 1 :]],
        lambda: [*lines[:at], lines[at].upper(), *lines[at + 1 :]],
        lambda: [*lines[at:], *lines[:at]],
    )
    return "\n".join(rng.choice(kinds)()).encode()
