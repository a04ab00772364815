"""Makes of tests what a judge runs: their code, and the names in it that are the program's."""

import ast
import builtins
import functools
import marshal
import symtable
import sys
import types

from wmtp_modules.sandbox.wire import TESTS


@functools.lru_cache(maxsize=256)
def prepare(context: str, tests: str) -> bytes:
    """Compiles tests, here, once for all the programs that they judge.

    Args:
        context: trusted source that runs first; its functions without a body are the program's.
        tests: trusted source.

    Returns:
        What ``judge.judge`` takes.

    Raises:
        SyntaxError: if either is no Python.
    """
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
    """With its assertions, also where this process was started with ``python -O``."""
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
    """Takes out functions without a body, which are for the program to define; their names.

    A docstring is none, nor are imports (HumanEval/115).
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
    """What is the program's, and which modules of the standard library the tests use unimported.

    A module of the program could have been patched, so the judge imports its own; a name that is
    ever used without a dot behind it is a function called like a module. A built-in name
    is the program's only where the tests use nothing else of it (MBPP 126 asks for a ``sum``):
    else a ``set`` or ``abs`` of its own would decide about its answers.
    """
    used_context, defined_context = _names_of(context)
    used_tests, defined_tests = _names_of(tests)
    free = (used_context | used_tests) - (defined_context - stubs) - defined_tests
    modules = (free & sys.stdlib_module_names) - _bare_names(context) - _bare_names(tests)
    free -= modules
    own = {name for name in free if not hasattr(builtins, name)}
    return own or free, modules


def _bare_names(source: str) -> set[str]:
    """Names that stand somewhere without an attribute behind them."""
    nodes = list(ast.walk(ast.parse(source)))
    bases = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    return {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in bases}
