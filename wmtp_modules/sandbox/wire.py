"""Messages between judge and program: four bytes of length, and JSON.

None, bool, str, float and small int stand for themselves. Everything else is an object that both
sides know by its number (``shared.py``) and that travels as the data of its plain base class
(``kinds.py``), so a message can only ever build plain values. Also runs inside the sandbox, so it
uses only the standard library.
"""

import json
import os

LARGEST = 16 << 20  # bytes of a message
TESTS = "<tests>"  # the file name in the code of tests
# Exit statuses that say why a program's process ended. It may lie, but none of them is a pass.
STATUSES = {"memory": 201, "output_limit": 202, "process_limit": 203, "policy": 204, "crash": 1}


class WireError(ValueError):
    """Something received or sent is not a valid message."""


class TooLarge(ValueError):
    """A message exceeds the largest size."""


def encode(value, shared) -> list:
    """The JSON form of a value, with what the other side must know for it."""
    return shared.encode([value])


def decode(message, shared):
    """The value of ``encode``; WireError if the other side made the message up."""
    values = shared.decode(message)
    if len(values) != 1:
        raise WireError("an answer of several values")
    return values[0]


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
