"""Runs a program in its own process: as a script, or as functions that a judge calls.

Hostile code can reach and change everything here. Nothing that happens here can therefore make a
verdict ``pass``: a script is judged by its output, and functions by the judge, which holds the
tests in another process. Runs inside the sandbox, so it uses only the standard library.
"""

import builtins
import dataclasses
import errno
import importlib.machinery
import linecache
import operator
import os
import sys
import traceback
import types

import wire
from shared import Shared

FILE = "<program>"
LONGEST_TEXT = 2000  # of an error
BY_ERRNO = {
    **dict.fromkeys((errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EROFS), "policy"),
    **dict.fromkeys((errno.ENOSPC, errno.EFBIG, errno.EDQUOT), "output_limit"),
    errno.EAGAIN: "process_limit",
    errno.ENOMEM: "memory",
}


def classify(error: BaseException) -> str:
    """The verdict on a program that ends with an error."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, wire.TooLarge):
        return "output_limit"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "process_limit"
    if isinstance(error, OSError):
        return BY_ERRNO.get(error.errno or 0, "crash")
    return "crash"


def execute(source: bytes, name: str) -> types.ModuleType:
    """Run source as a module that pickle and dataclasses can find by name."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    lines = source.decode("utf-8", "replace").splitlines(True)
    linecache.cache[FILE] = (len(source), None, lines, FILE)  # for tracebacks
    exec(compile(source, FILE, "exec", dont_inherit=True), module.__dict__)
    return module


class Script:
    """A program that runs as ``python program.py`` would; making one prepares this process for it.

    Attributes:
        source: bytes, because a byte order mark and a coding cookie count.
        path: of the file with the source, in the current folder.
        namespace: of its module.
    """

    def __init__(self, source: bytes) -> None:
        self.source, self.path = source, os.path.abspath("program.py")
        with open(self.path, "wb") as file:
            file.write(source)
        sys.path.insert(0, os.path.dirname(self.path))
        sys.orig_argv = [sys.executable, *sys.argv]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        self.namespace = main.__dict__
        self.namespace |= {
            "__loader__": importlib.machinery.SourceFileLoader("__main__", self.path),
            "__annotations__": {},
            "__builtins__": builtins,
            "__file__": self.path,
            "__cached__": None,
        }


def fail(error: BaseException) -> None:
    """End the process of a script that has raised an error; called where it was run."""
    frames = error.__traceback__
    sys.excepthook(type(error), error, frames and frames.tb_next)  # without ours
    sys.exit(wire.STATUSES[classify(error)])


def serve_functions(source: bytes, link: int) -> None:
    """Run source, then do what the judge asks through ``link``, until killed."""
    shared = Shared(1)
    failure = module = None
    try:
        module = execute(source, "solution")
    except BaseException as error:
        failure = error

    operations = {
        "globals": lambda *names: {
            name: module.__dict__[name] for name in names if name in module.__dict__
        },
        "call": lambda function, /, *arguments, **named: function(*arguments, **named),
        "getattr": getattr,
        "setattr": setattr,
        "getitem": operator.getitem,
        "setitem": operator.setitem,
        "delitem": operator.delitem,
        "missing": missing,
        "fields": fields,
        "iter": iter,
        "next": next,
        "len": len,
        "bool": bool,
        "int": int,
        "float": float,
        "str": str,
        "repr": repr,
        "format": format,
        "ping": lambda: None,
    }
    while True:
        try:
            nonce, operation, state, names, unused = wire.receive(link)
        except EOFError:
            os._exit(0)  # the judge has ended
        arguments = shared.decode(state)
        shared.forget(unused)
        cut = len(arguments) - len(names)
        answer = None
        try:
            try:
                if failure is not None:
                    raise failure
                named = dict(zip(names, arguments[cut:], strict=True))
                answer = operations[operation](*arguments[:cut], **named)
            except BaseException as error:
                failed, answer = describe(error), error
            else:
                failed = ()
            kind = "error" if failed else "value"
            wire.send(link, [nonce, kind, wire.encode(answer, shared), *failed])
        except BaseException as error:  # an answer that cannot be sent, so there is none
            wire.send(link, [nonce, "error", None, *describe(error)])


def missing(mapping: dict, key):
    """What a dict that lacks a key has for it."""
    found = getattr(type(mapping), "__missing__", None)
    if found is None:
        raise KeyError(key)
    return found(mapping, key)


def fields(value) -> tuple | None:
    """What a dataclass compares; None for other objects, which are not compared."""
    parameters = getattr(type(value), "__dataclass_params__", None)
    if parameters is None or not parameters.eq:
        return None
    return tuple(getattr(value, each.name) for each in dataclasses.fields(value) if each.compare)


def describe(error: BaseException) -> tuple[str, str]:
    """The message of an error with its line, and the verdict."""
    try:
        text = f"{type(error).__name__}: {error}"[:LONGEST_TEXT]
    except Exception:  # of its own __str__
        text = type(error).__name__
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == FILE]
    return f"{text} (line {lines[-1]} of the program)" if lines else text, classify(error)
