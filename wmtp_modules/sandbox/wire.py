"""Messages between judge and program, which can only ever build plain values.

A message is four bytes of length and JSON, in which everything except None, bool, str, float and
small int is a list ``[kind, ...]``. A value without a kind (an object of one of the program's
classes, a generator, a subclass of int) stays in the program's process and is represented by
``["object", number, type]``. Also runs inside the sandbox, so it uses only the standard library.
"""

import datetime
import json
import os
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction

LARGEST = 16 << 20  # bytes of a message
TESTS = "<tests>"  # the file name in the code of tests
DEEPEST = 100  # nested containers; deeper values are passed as objects
# Exit statuses that say why a program's process ended. It may lie, but none of them is a pass.
STATUSES = {"memory": 201, "output_limit": 202, "process_limit": 203, "policy": 204, "crash": 1}
PLAIN_INT = 1 << 53  # larger ones are hexadecimal: Python refuses decimals of 4,300 digits

SEQUENCES = {cls: cls.__name__ for cls in (list, tuple, set, frozenset, deque)}
# All kinds of dict compare equal by items, except that an OrderedDict compares order too.
MAPPINGS = {dict: "dict", defaultdict: "dict", OrderedDict: "OrderedDict", Counter: "Counter"}
TEXTS = {
    datetime.date: ("date", datetime.date.isoformat),
    datetime.time: ("time", datetime.time.isoformat),
    datetime.datetime: ("datetime", datetime.datetime.isoformat),
    Decimal: ("Decimal", str),
    bytes: ("bytes", lambda value: value.decode("latin-1")),
    bytearray: ("bytearray", lambda value: value.decode("latin-1")),
}
NUMBERS = {
    complex: ("complex", lambda value: (value.real, value.imag)),
    range: ("range", lambda value: (value.start, value.stop, value.step)),
    Fraction: ("Fraction", lambda value: (value.numerator, value.denominator)),
    datetime.timedelta: (
        "timedelta",
        lambda value: (value.days, value.seconds, value.microseconds),
    ),
}
# Classes that tests pass to programs (MBPP 533) are passed by name.
CLASSES = {
    cls.__name__: cls
    for cls in (bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict)
}
BUILDERS = {kind: cls for cls, kind in SEQUENCES.items()} | {
    "class": lambda items: CLASSES[items[0]],
    "date": lambda items: datetime.date.fromisoformat(*items),
    "time": lambda items: datetime.time.fromisoformat(*items),
    "datetime": lambda items: datetime.datetime.fromisoformat(*items),
    "Decimal": lambda items: Decimal(*items),
    "bytes": lambda items: items[0].encode("latin-1"),
    "bytearray": lambda items: bytearray(items[0].encode("latin-1")),
    "complex": lambda items: complex(*items),
    "range": lambda items: range(*items),
    "Fraction": lambda items: Fraction(*items),
    "timedelta": lambda items: datetime.timedelta(*items),
    "dict": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
    "OrderedDict": lambda items: OrderedDict(zip(items[::2], items[1::2], strict=True)),
    "Counter": lambda items: Counter(dict(zip(items[::2], items[1::2], strict=True))),
}


class WireError(ValueError):
    """Something received or sent is not a valid message."""


class TooLarge(ValueError):
    """A message exceeds the largest size."""


def encode(value, refer, depth: int = 0):
    """The JSON form of a value inside ``depth`` containers.

    ``refer`` is called with a value without a form and returns ``(number, type name)``.
    """
    cls = type(value)  # exact: a subclass may lie about its value, so it does not travel
    if value is None or cls in (bool, float, str):
        return value
    if cls is int:
        return value if -PLAIN_INT < value < PLAIN_INT else ["int", hex(value)]
    if cls is type and CLASSES.get(value.__name__) is value:
        return ["class", value.__name__]
    if depth < DEEPEST:
        if cls in SEQUENCES:
            return [SEQUENCES[cls], *[encode(item, refer, depth + 1) for item in value]]
        if cls in MAPPINGS:
            form = [MAPPINGS[cls]]
            for key, item in value.items():
                form += encode(key, refer, depth + 1), encode(item, refer, depth + 1)
            return form
        if cls in TEXTS:
            kind, text = TEXTS[cls]
            return [kind, text(value)]
        if cls in NUMBERS:
            kind, numbers = NUMBERS[cls]
            return [kind, *[encode(number, refer) for number in numbers(value)]]
    return ["object", *refer(value)]


def decode(form, resolve):
    """The value of a JSON form.

    Args:
        form: from ``encode``, or made up by a hostile program.
        resolve: called with the number and type name of an object; returns its representation.

    Raises:
        WireError: if it is not such a form.
    """
    try:
        return _decode(form, resolve)
    except WireError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise WireError(f"a malformed value ({type(error).__name__})") from None


def _decode(form, resolve):
    cls = type(form)
    if form is None or cls in (bool, int, float, str):
        return form
    if cls is not list or not form or type(form[0]) is not str:
        raise WireError("a value without its kind")
    kind = form[0]
    if kind == "int":
        return int(form[1], 16)
    if kind == "object":
        return resolve(form[1], form[2])
    if kind not in BUILDERS:
        raise WireError("a value of an unknown kind")
    return BUILDERS[kind]([_decode(item, resolve) for item in form[1:]])


def send(fd: int, message) -> None:
    """Write a message of JSON forms; TooLarge over 16 MB, with nothing written."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > LARGEST:
        raise TooLarge(f"{len(data) >> 20} MB are more than the {LARGEST >> 20} MB of one result")
    data = memoryview(len(data).to_bytes(4, "big") + data)
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int):
    """Read a message; EOFError if the other side is gone, WireError if it is not a message."""
    size = int.from_bytes(_read(fd, 4), "big")
    if size > LARGEST:
        raise WireError("a message over the largest size")
    try:
        return json.loads(_read(fd, size))
    except (ValueError, RecursionError):
        raise WireError("a message that is not JSON") from None


def _read(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
