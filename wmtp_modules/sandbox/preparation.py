"""Compiles tests for a judge, and finds the names in them that are the program's."""

import ast
import builtins
import functools
import marshal
import symtable
import sys
import threading
import types

from wmtp_modules.sandbox.wire import TESTS

_limit_of_digits = threading.Lock()


@functools.lru_cache(maxsize=256)
def prepare(context: str, tests: str) -> bytes:
    """Compile tests outside the sandbox, once for all programs that they judge.

    Args:
        context: trusted source that runs first; its functions without a body are the program's.
        tests: trusted source.

    Returns the input of ``judge.judge``; SyntaxError if either is not Python.
    """
    with _limit_of_digits:  # a setting of the whole process, which workers share
        before = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(0)  # for literals in tests, which are trusted
        try:
            return _prepare(context, tests)
        finally:
            sys.set_int_max_str_digits(before)


def _prepare(context: str, tests: str) -> bytes:
    tree = ast.parse(context)
    stubs = _without_stubs(tree)
    names, modules = _names_of_program(context, tests, stubs)
    return marshal.dumps(
        {
            "parts": [_compile(tree, "<context>"), _compile(tests, TESTS)],
            "names": sorted(names),
            "modules": sorted(modules),
            "source": tests,
        }
    )


def _compile(source: ast.Module | str, name: str) -> types.CodeType:
    """Compile with assertions, even if this process was started with ``python -O``."""
    return compile(source, name, "exec", dont_inherit=True, optimize=0)


def _names_of(source: str) -> tuple[set[str], set[str]]:
    """The global names that source uses, and those that it defines."""
    top = symtable.symtable(source, TESTS, "exec")
    used, defined = set(), set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table is not top and not symbol.is_global():
                continue
            if symbol.is_referenced():
                used.add(symbol.get_name())
            if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
                defined.add(symbol.get_name())
    return used, defined


def _without_stubs(context: ast.Module) -> set[str]:
    """Remove functions without a body, which the program has to define; returns their names.

    Docstrings and imports (HumanEval/115) do not count as a body.
    """
    stubs = [
        node
        for node in context.body
        if isinstance(node, ast.FunctionDef)
        and all(
            isinstance(inner, ast.Pass | ast.Import | ast.ImportFrom)
            or (isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant))
            for inner in node.body
        )
    ]
    context.body = [node for node in context.body if node not in stubs]
    return {node.name for node in stubs}


def _names_of_program(context: str, tests: str, stubs: set[str]) -> tuple[set[str], set[str]]:
    """The program's names, and the standard library modules that the tests use without importing.

    The program may have patched its modules, so the judge imports its own; a name that is ever
    used without a dot after it is a function named like a module. A built-in name is the
    program's only if the tests use nothing else of it (MBPP 126 asks for a ``sum``): otherwise the
    program's own ``set`` or ``abs`` would help to judge its answers.
    """
    used_context, defined_context = _names_of(context)
    used_tests, defined_tests = _names_of(tests)
    free = (used_context | used_tests) - (defined_context - stubs) - defined_tests
    modules = (free & sys.stdlib_module_names) - _bare_names(context) - _bare_names(tests)
    free -= modules
    own = {name for name in free if not hasattr(builtins, name)}
    return own or free, modules


def _bare_names(source: str) -> set[str]:
    """Names that occur somewhere without an attribute after them."""
    nodes = list(ast.walk(ast.parse(source)))
    bases = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    return {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in bases}
