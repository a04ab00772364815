"""The judge: runs the tests of a program whose functions live in another process.

Expected values never leave this process, and only plain values come in (``kinds.py``). A value of
a subclass of a plain class is data of the plain class here, in a class that has the same name
(``Remote``): it compares by that data, and what the plain class lacks is asked of the program. Any
other object of the program's classes stays there (``Handle``) and equals only itself, but
dataclasses are compared by their fields. Runs inside the sandbox, so it uses only the standard
library.
"""

import importlib
import json
import marshal
import os
import sys
import traceback
from abc import ABCMeta
from collections import Counter
from types import FunctionType, GeneratorType
from typing import Any, NoReturn

import wire
from kinds import kind_of
from shared import Shared

LONGEST_TEXT = 2000
MOST_DIGITS = 4300  # of an int in a message, as Python's own default
# Special attributes of functions that tests may read; others are protocols of copy and pickle.
READABLE = ("__name__", "__qualname__", "__wrapped__", "__annotations__", "__defaults__")
BUILT_IN = {
    cls.__name__: cls
    for cls in (GeneratorType, FunctionType, map, filter, zip, enumerate, reversed)
}


class ProgramEnded(BaseException):
    """The program cannot answer any more; a test's ``except Exception`` must not hide that."""


class Program:
    """The judge's connection to the program; remembers what went wrong. One in a process."""

    def __init__(self, link: int) -> None:
        global _program
        _program = self
        self.failure: tuple[str, str] | None = None  # verdict and detail, final
        self.error: Exception | None = None  # the last one that the program raised
        self.error_verdict = self.error_detail = ""
        self.shared = Shared(-1, mirror, Handle)
        self._link = link

    def ask(self, operation: str, /, *arguments, **named):
        """Ask the program to do something; returns the value or raises its exception."""
        if self.failure is not None:
            raise ProgramEnded
        nonce = os.urandom(8).hex()
        try:
            state = self.shared.encode([*arguments, *named.values()])
        except TypeError as error:
            self._fail("wrong", str(error))
        unused = self.shared.unused()  # now: a test may have changed them before it let go
        try:
            wire.send(self._link, [nonce, operation, state, list(named), unused])
            sys.set_int_max_str_digits(MOST_DIGITS)  # millions of them would take minutes
            try:
                reply = wire.receive(self._link)
            finally:
                sys.set_int_max_str_digits(0)
            if type(reply) is not list or len(reply) < 3 or reply[0] != nonce:
                raise wire.WireError("an answer to another request")
            if reply[1] == "value":
                return wire.decode(reply[2], self.shared)
            form, text, verdict = reply[2:]
            error = None if form is None else wire.decode(form, self.shared)
        except (EOFError, OSError):
            self._fail("gone", "")
        except wire.TooLarge as error:
            self._fail("output_limit", str(error))
        except ValueError as error:  # WireError among them
            self._fail("policy", f"the program interfered with its answers: {error}")
        if type(text) is not str or verdict not in ("memory", "output_limit", "process_limit"):
            verdict = "policy" if verdict == "policy" else "crash"
        text = f"{text}"[:LONGEST_TEXT]
        if not isinstance(error, Exception):
            self._fail(verdict, text)  # such as SystemExit, or an answer that cannot be sent
        if isinstance(error, StopIteration | StopAsyncIteration) and operation != "next":
            error = RuntimeError(text)  # or it would quietly end a loop of the tests
        self.error, self.error_verdict, self.error_detail = error, verdict, text
        raise error

    def _fail(self, verdict: str, detail: str) -> NoReturn:
        self.failure = verdict, detail
        raise ProgramEnded


_program: Any = None


class Mirror(type):
    """The class of the judge's classes that stand for those of the program."""

    def __call__(cls, /, *arguments, **named):
        return _program.ask("call", cls, *arguments, **named)

    def __getattr__(cls, name: str):
        return _attribute(cls, name)

    def __setattr__(cls, name: str, value) -> None:
        _program.ask("setattr", cls, name, value)

    def __getitem__(cls, key):  # of an Enum
        return _program.ask("getitem", cls, key)

    def __iter__(cls):
        return _Iterator(_program.ask("iter", cls))

    def __len__(cls) -> int:
        return _program.ask("len", cls)

    def __bool__(cls) -> bool:
        return True


class AbstractMirror(Mirror, ABCMeta):
    """For subclasses of ``UserDict`` and others that are of this kind themselves."""

    __instancecheck__ = type.__instancecheck__
    __subclasscheck__ = type.__subclasscheck__


def mirror(name: str, *bases: type) -> type:
    """The judge's class for one of the program's.

    Of its bases, those count that have a plain class: their methods work on the data here, and no
    other base may come before them. Without one, it is a class of handles.
    """
    plain = [base for base in bases if kind_of(base) is not None]
    kind = kind_of(plain[0]) if plain else None
    namespace = {}
    if kind is None:
        first = Handle
        plain = [base for base in bases if base is not object]
        if not plain and name in BUILT_IN:
            namespace["__class__"] = property(lambda self: BUILT_IN[name])  # for isinstance
    else:
        # What a Counter lacks is 0 by its own data; it also asks so of what it is compared with.
        first = RemoteDict if issubclass(kind.cls, dict) and kind.cls is not Counter else Remote
    if not any(isinstance(base, Mirror) for base in plain):
        plain.insert(0, first)
    metaclass = AbstractMirror if any(isinstance(base, ABCMeta) for base in plain) else Mirror
    try:
        return type.__new__(metaclass, name, tuple(plain), namespace)
    except TypeError:  # bases that do not go together without those left out
        bases = (first,) if kind is None else (first, kind.cls)
        return type.__new__(metaclass, name, bases, {})


def _attribute(owner, name: str):
    known = not name.startswith("__") or name in READABLE
    if not known or _program.shared.number(owner) is None:  # a copy that a test made
        raise AttributeError(name)
    return _program.ask("getattr", owner, name)


class Remote:
    """What all objects of the program's classes have: what is not here is asked of the program."""

    __slots__ = ()

    def __getattr__(self, name: str):
        return _attribute(self, name)

    def __setattr__(self, name: str, value) -> None:
        _program.ask("setattr", self, name, value)

    def __str__(self) -> str:
        return _program.ask("str", self)

    def __repr__(self) -> str:
        return _program.ask("repr", self)

    def __format__(self, form: str) -> str:
        return _program.ask("format", self, form)


class RemoteDict(Remote):
    __slots__ = ()

    def __missing__(self, key):  # a subclass may make up a value
        return _program.ask("missing", self, key)


class Handle(Remote):
    """An object that stays in the program's process."""

    def __eq__(self, other):
        if self is other or type(self) is not type(other):
            return NotImplemented  # then Python compares by identity
        fields = _program.ask("fields", self)
        return NotImplemented if fields is None else fields == _program.ask("fields", other)

    __hash__ = object.__hash__

    def __call__(self, /, *arguments, **named):
        return _program.ask("call", self, *arguments, **named)

    def __getitem__(self, key):
        return _program.ask("getitem", self, key)

    def __setitem__(self, key, value) -> None:
        _program.ask("setitem", self, key, value)

    def __delitem__(self, key) -> None:
        _program.ask("delitem", self, key)

    def __iter__(self):
        return _Iterator(_program.ask("iter", self))

    def __next__(self):
        return _program.ask("next", self)

    def __len__(self) -> int:
        return _program.ask("len", self)

    def __bool__(self) -> bool:
        return _program.ask("bool", self)

    def __int__(self) -> int:
        return _program.ask("int", self)

    def __float__(self) -> float:
        return _program.ask("float", self)


class _Iterator:
    """Wraps the result of ``iter``, which may be plain and lack ``__next__``."""

    def __init__(self, inner) -> None:
        self._inner = inner if isinstance(inner, Handle) else iter(inner)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._inner)


def examine(program: Program, tests: dict) -> tuple[str, str]:
    """Run tests as ``preparation.prepare`` made them.

    Returns:
        verdict: ``pass`` if they ran to the end and the program still answers; ``gone`` if its
            process ended, which the caller has to explain.
        detail: what failed, and where.
    """
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        found = program.ask("globals", *tests["names"])
        namespace |= {name: found[name] for name in tests["names"] if name in found}
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
        return program.error_verdict, program.error_detail
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
    sys.set_int_max_str_digits(MOST_DIGITS)
    try:
        text += f": {error}" if error.args else ""
    except (Exception, ProgramEnded):  # an integer that takes too long, or a failing __repr__
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
