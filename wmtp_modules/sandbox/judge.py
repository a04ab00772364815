"""The judge: runs the tests of a program whose functions live in another process.

Expected values never leave this process, and only plain values come in (``wire.py``): an object of
the program's own class stays in the program, operations of the tests are forwarded to it, and it
equals only itself. Runs inside the sandbox, so it uses only the standard library.
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
    """The program cannot answer any more; a test's ``except Exception`` must not hide that."""


class Program:
    """The judge's connection to the program; remembers what went wrong."""

    def __init__(self, link: int) -> None:
        self.failure: tuple[str, str] | None = None  # verdict and detail, final
        self.error: Exception | None = None  # the last one that the program raised
        self.error_verdict = ""
        self._link = link
        self._objects: dict[int, Handle] = {}

    def ask(self, operation: str, *arguments):
        """Ask the program to do something; returns the value or raises its exception."""
        if self.failure is not None:
            raise ProgramEnded
        nonce = os.urandom(8).hex()
        forms = [wire.encode(argument, _refer) for argument in arguments]
        try:
            wire.send(self._link, [nonce, operation, *forms])
            reply = wire.receive(self._link)
            if type(reply) is not list or len(reply) < 3 or reply[0] != nonce:
                raise wire.WireError("an answer to another request")
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
            self._fail("crash", f"{text}"[:LONGEST_TEXT])  # such as SystemExit
        if issubclass(kind, StopIteration | StopAsyncIteration) and operation != "next":
            kind = RuntimeError  # or it would quietly end a loop of the tests
        try:
            error = kind(text)
        except TypeError:  # UnicodeDecodeError and others need more arguments
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
    """A proxy for an object that stays in the program's process. It equals only itself."""

    __slots__ = ("_name", "_number", "_program")

    def __init__(self, program: Program, number: int, name: str) -> None:
        for slot, value in zip(Handle.__slots__, (name, number, program), strict=True):
            object.__setattr__(self, slot, value)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)  # refuse the protocols of copy, pickle and others
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
    """Wraps the result of ``iter``, which may be plain and lack ``__next__``."""

    def __init__(self, inner) -> None:
        self._inner = inner if type(inner) is Handle else iter(inner)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._inner)


def _refer(value) -> tuple[int, str]:
    if type(value) is not Handle:
        raise TypeError(
            f"a test passes the program a {type(value).__name__}: only plain values can be passed"
        )
    return value._number, value._name


def examine(program: Program, tests: dict) -> tuple[str, str]:
    """Run tests as ``preparation.prepare`` made them.

    Returns:
        verdict: ``pass`` if they ran to the end and the program still answers; ``gone`` if its
            process ended, which the caller has to explain.
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
        return "crash", f"the program does not define {error.name}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == wire.TESTS and frame.lineno is not None
    ]
    line = source.splitlines()[lines[-1] - 1].strip() if lines else ""
    text = type(error).__name__
    try:
        text += f": {error}" if error.args else ""
    except ValueError:  # an integer with more digits than Python prints
        text += " (its message cannot be printed)"
    return "wrong", f"{text}\n{line}"[:LONGEST_TEXT]


def judge(tests: bytes, link: int, result: int) -> None:
    """Write the verdict of tests as JSON to the descriptor ``result``.

    The tests are marshalled by the trusted parent, which runs the same interpreter; ``link`` is the
    socket to the program.
    """
    verdict, detail = examine(Program(link), marshal.loads(tests))
    os.write(result, json.dumps({"verdict": verdict, "detail": detail}).encode())
    os._exit(0)
