"""The judge: runs the tests of a program whose functions live in another process.

Expected values never leave this process, and nothing comes in but plain values (``wire.py``): an
object of the program's own class stays there, is forwarded what tests do with it, and equals only
itself. Runs inside the sandbox, hence the standard library only.
"""

import builtins
import importlib
import json
import marshal
import os
import traceback
from typing import Any, NoReturn

import wire

LONGEST_TEXT = 2000


class ProgramEnded(BaseException):
    """The program cannot answer any more; no ``except Exception`` of a test may hide that."""


class Program:
    """The other end: asks, and remembers what went wrong.

    Args:
        link: descriptor of the socket to the program's process.
    """

    def __init__(self, link: int) -> None:
        self.failure: tuple[str, str] | None = None  # verdict and detail, final
        self.error: Exception | None = None  # the last one that the program raised
        self.error_verdict = ""
        self._link = link
        self._objects: dict[int, Handle] = {}

    def ask(self, operation: str, *arguments):
        """Has the program do something; returns the value or raises its exception."""
        if self.failure is not None:
            raise ProgramEnded
        nonce = os.urandom(8).hex()
        forms = [wire.encode(argument, _refer) for argument in arguments]
        try:
            wire.send(self._link, [nonce, operation, *forms])
            reply = wire.receive(self._link)
            if type(reply) is not list or len(reply) < 3 or reply[0] != nonce:
                raise wire.WireError("an answer to what was not asked")
            if reply[1] == "value":
                return wire.decode(reply[2], self._resolve)
            name, text, verdict = reply[2:]
        except (EOFError, OSError):
            self._fail("gone", "")
        except wire.TooLarge as error:
            self._fail("output_limit", str(error))
        except ValueError as error:  # WireError among them
            self._fail("policy", f"the program interfered with its answers: {error}")
        if type(text) is not str or verdict not in ("memory", "output_limit", "process_limit"):
            verdict = "policy" if verdict == "policy" else "crash"
        kind = getattr(builtins, name, None) if type(name) is str else None
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            self._fail("crash", f"{text}"[:LONGEST_TEXT])  # SystemExit and the like
        if issubclass(kind, StopIteration | StopAsyncIteration) and operation != "next":
            kind = RuntimeError  # or it would quietly end a loop of the tests
        try:
            error = kind(text)
        except TypeError:  # UnicodeDecodeError and others want more
            error = Exception(text)
        self.error, self.error_verdict = error, verdict
        raise error

    def _fail(self, verdict: str, detail: str) -> NoReturn:
        self.failure = verdict, detail
        raise ProgramEnded

    def _resolve(self, number, name):
        if type(number) is not int or type(name) is not str:
            raise wire.WireError("an object without a number")
        return self._objects.setdefault(number, Handle(self, number, name[:100]))


class Handle:
    """An object that stays in the program's process. It equals, and hashes as, only itself."""

    __slots__ = ("_name", "_number", "_program")

    def __init__(self, program: Program, number: int, name: str) -> None:
        for slot, value in zip(Handle.__slots__, (name, number, program), strict=True):
            object.__setattr__(self, slot, value)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)  # the protocols of copy, pickle and others end here
        return self._program.ask("getattr", self, name)

    def __setattr__(self, name: str, value) -> None:
        self._program.ask("setattr", self, name, value)

    def __call__(self, *arguments, **named):
        return self._program.ask("call", self, arguments, named)

    def __getitem__(self, key):
        return self._program.ask("getitem", self, key)

    def __iter__(self):
        return _Iterator(self._program.ask("iter", self))

    def __next__(self):
        return self._program.ask("next", self)

    def __len__(self) -> int:
        return self._program.ask("len", self)

    def __bool__(self) -> bool:
        return self._program.ask("bool", self)

    def __repr__(self) -> str:
        return f"<{self._name} of the program>"


class _Iterator:
    """What ``iter`` gives; an object of its own, because it may be plain and lack ``__next__``."""

    def __init__(self, inner) -> None:
        self._inner = inner if type(inner) is Handle else iter(inner)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._inner)


def _refer(value) -> tuple[int, str]:
    if type(value) is not Handle:
        raise TypeError(f"a test hands the program a {type(value).__name__}: only values travel")
    return value._number, value._name


def examine(program: Program, tests: dict) -> tuple[str, str]:
    """Runs tests.

    Args:
        program: to be examined.
        tests: as ``preparation.prepare`` made them.

    Returns:
        verdict: ``pass`` if they ran to their end and the program still answers then; ``gone`` if
            its process ended, which is for others to explain.
        detail: what failed, and where.
    """
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        for name in tests["names"]:
            found, value = program.ask("global", name)
            if found:
                namespace[name] = value
        for name in tests["modules"]:
            namespace[name] = importlib.import_module(name)
        for part in tests["parts"]:
            exec(part, namespace)
        program.ask("ping")
    except BaseException as error:
        if program.failure is None:
            missing = set(tests["names"]) - set(namespace)
            return _explain(error, program, missing, tests["source"])
    return program.failure or ("pass", "")


def _explain(
    error: BaseException, program: Program, missing: set[str], source: str
) -> tuple[str, str]:
    if error is program.error:
        return program.error_verdict, str(error.args[0])
    if isinstance(error, MemoryError):
        return "memory", "the values that the program returned take too much memory"
    if isinstance(error, NameError) and error.name in missing:
        return "crash", f"the program defines no {error.name}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == wire.TESTS and frame.lineno is not None
    ]
    line = source.splitlines()[lines[-1] - 1].strip() if lines else ""
    text = type(error).__name__
    try:
        text += f": {error}" if error.args else ""
    except ValueError:  # an integer of more digits than Python writes
        text += " (its message cannot be written)"
    return "wrong", f"{text}\n{line}"[:LONGEST_TEXT]


def judge(tests: bytes, link: int, result: int) -> None:
    """Writes the verdict as JSON.

    Args:
        tests: marshalled, from the trusted parent, which runs the same interpreter.
        link: descriptor of the socket to the program.
        result: descriptor that takes the verdict.
    """
    verdict, detail = examine(Program(link), marshal.loads(tests))
    os.write(result, json.dumps({"verdict": verdict, "detail": detail}).encode())
    os._exit(0)
