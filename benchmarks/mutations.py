"""Makes functions with one changed place, which the ablation keeps as a critic's hard setting.

A function of the standard library is a prompt (its ``def`` line) with a good response (its body).
The bad response is the same body with one place changed, so that it still parses but means
something else; the row records the place. A change from a to b is kept as often as one from b to
a, so that counts of tokens do not tell good from bad.
"""

import ast
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate, compress, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torchtune.utils import get_logger

from wmtp_modules.quickstarts.stdlib import assets_folder, deal_files, train_tokenizer, write_rows

log = get_logger("INFO")

VERSION = 3  # of the files made here; a new version makes them again
PARTS = {"base": 0.35, "train": 0.55, "heldout": 0.1}  # shares of the files
MIN_TOKENS = 30  # of a function with BOS and EOS: shorter ones leave little to judge
# A dropped return always shortens the body, which gives the label away, so few functions get one.
DROPPED_RETURN_SHARE = 0.05
SWAPS = {
    "+": ("-",),
    "-": ("+",),
    "*": ("/", "+"),
    "/": ("*",),
    "//": ("*",),
    "<": (">", "<="),
    "<=": (">=", "<"),
    ">": ("<", ">="),
    ">=": ("<=", ">"),
    "==": ("!=",),
    "!=": ("==",),
    "and": ("or",),
    "or": ("and",),
    "in": ("not in",),
    "not in": ("in",),
    "is": ("is not",),
    "is not": ("is",),
    "+=": ("-=",),
    "-=": ("+=",),
}
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
OWN_SCOPE = DEFINITIONS | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


class Function(NamedTuple):
    """A function without docstrings and decorators, as written by ``ast.unparse``."""

    name: str
    line: int  # of its ``def`` in the file, from 1
    prompt: str  # up to the body
    response: str  # the body, indented by four spaces, without a newline at its end


class Mutation(NamedTuple):
    """A body with one place changed."""

    kind: str  # operator, variable, off_by_one or dropped_return
    response: str
    span: tuple[int, int]  # [start, end) of the changed text, in characters of ``response``
    change: tuple[str, str]  # the text that was there, and what it became


class _Edit(NamedTuple):
    kind: str
    start: int  # characters [start, end) of the function are replaced by ``text``
    end: int
    text: str


def functions_of(source: str) -> list[Function]:
    """Functions and methods of a source file in its order, except those inside another function.

    Docstrings are dropped at any depth.
    """
    functions = []
    for node in _outermost_functions(ast.parse(source)):
        for inner in ast.walk(node):
            if isinstance(inner, DEFINITIONS):
                while inner.body and _is_string(inner.body[0]):
                    del inner.body[0]
                inner.body = inner.body or [ast.Pass()]
        node.decorator_list, body = [], node.body
        node.body = []
        prompt = ast.unparse(node) + "\n"
        node.body = body
        response = ast.unparse(node).removeprefix(prompt)
        functions.append(Function(node.name, node.lineno, prompt, response))
    return functions


def mutate(
    function: Function,
    rng: random.Random,
    n_tokens: Callable[[str], int] = len,
    made: Counter | None = None,
) -> Mutation | None:
    """Change one place of a body so that it parses and means something else; None if impossible.

    The possible changes are tried in random order, alternating between kinds: first those that keep
    the length by ``n_tokens``, then the others, because a change of length gives the label away. A
    dropped return comes first with probability ``DROPPED_RETURN_SHARE`` and is otherwise not tried.
    ``made`` counts changes of other functions: whose reverse it has more often comes before others.
    """
    text = function.prompt + function.response
    tree, length = _canonical_tree(text), n_tokens(text)
    if tree is None:
        return None
    original = ast.dump(tree)
    by_kind: dict[str, list[_Edit]] = {}
    for edit in _edits(text):
        by_kind.setdefault(edit.kind, []).append(edit)
    returns = by_kind.pop("dropped_return", [])
    turns = [
        (turn + rng.random(), edit)
        for edits in by_kind.values()
        for turn, edit in enumerate(rng.sample(edits, len(edits)))
    ]
    first = returns if rng.random() < DROPPED_RETURN_SHARE else []
    others, made = [], made or Counter()

    def turn_of(item: tuple[float, _Edit]) -> tuple:
        change = text[item[1].start : item[1].end], item[1].text
        return made[change] - made[change[::-1]], *item

    ordered = [edit for _, edit in sorted(turns, key=turn_of)]
    for edit in [*rng.sample(first, len(first)), *ordered]:
        changed = text[: edit.start] + edit.text + text[edit.end :]
        if edit.kind != "dropped_return" and n_tokens(changed) != length:
            others.append((edit, changed))
        elif _differs(changed, original):
            return _mutation(function, edit, changed)
    for edit, changed in others:
        if _differs(changed, original):
            return _mutation(function, edit, changed)
    return None


def prepare_critic_stdlib(assets_dir: str, vocab_size: int, max_tokens: int, seed: int) -> None:
    """Make ``tokenizer.model`` and ``{base,train,heldout}.jsonl`` if missing.

    ``base`` holds functions as plain text, for the starting model. ``train`` and ``heldout`` hold
    functions of other files, each twice under one ``problem_id``: unchanged with reward 1, and
    mutated with reward 0 and the changed place as ``noise``. No body occurs twice.

    Args:
        max_tokens: longest function, in tokens with BOS and EOS; ValueError below ``MIN_TOKENS``.
        seed: assigns the files and draws the mutations.
    """
    if max_tokens < MIN_TOKENS:
        raise ValueError(f"max_tokens must be at least {MIN_TOKENS}, got {max_tokens}")
    made_from = {
        "quickstart": "critic",
        "version": VERSION,
        "python": sys.version.split()[0],
        "vocab_size": vocab_size,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    with assets_folder(Path(assets_dir), made_from) as folder:
        if folder is not None:
            _fill(folder, vocab_size, max_tokens, seed)


def _fill(folder: Path, vocab_size: int, max_tokens: int, seed: int) -> None:
    parts = deal_files(PARTS, seed)
    base = [function for source in parts["base"].values() for function in functions_of(source)]
    base_texts = [function.prompt + function.response for function in base]
    tokenizer = train_tokenizer(folder, base_texts, vocab_size)

    def n_tokens(text: str) -> int:
        return len(tokenizer.encode(text)) + 2

    write_rows(folder / "base.jsonl", [{"text": text} for text in base_texts])
    log.info(f"  base: {len(base)} functions, {sum(map(len, base_texts)) / 1e6:.1f} MB")
    seen = {function.response for function in base}
    chosen: dict[str, list[tuple[str, Function]]] = {"train": [], "heldout": []}
    for name, functions in chosen.items():
        for path, source in parts[name].items():
            for function in functions_of(source):
                length = n_tokens(function.prompt + function.response)
                if MIN_TOKENS <= length <= max_tokens and function.response not in seen:
                    seen.add(function.response)
                    functions.append((f"{path}:{function.line}:{function.name}", function))
    for name, functions in chosen.items():
        made: Counter = Counter()
        pairs: list[tuple[str, Function, Mutation]] = []
        for problem, function in functions:
            mutation = mutate(function, random.Random(f"{seed} {problem}"), n_tokens, made)
            if mutation is None or mutation.response in seen:
                continue  # code that somebody wrote is not a bad response
            if n_tokens(function.prompt + mutation.response) <= max_tokens:
                made[mutation.change] += 1
                pairs.append((problem, function, mutation))
        rows, kinds, shorter = [], Counter(), 0.0
        keep = balanced([mutation for *_, mutation in pairs])
        for problem, function, mutation in compress(pairs, keep):
            bodies = (function.response, mutation.response)
            good, bad = (n_tokens(function.prompt + body) for body in bodies)
            kinds[mutation.kind] += 1
            shorter += (bad < good) + (bad == good) / 2
            shared = {"prompt": function.prompt, "problem_id": problem}
            rows += [
                shared | {"response": function.response, "reward": 1.0},
                shared | {"response": mutation.response, "reward": 0.0, "noise": [mutation.span]},
            ]
        write_rows(folder / f"{name}.jsonl", rows)
        n_pairs = kinds.total()
        log.info(
            f"  {name}: {n_pairs} pairs of {len(pairs)} from {len(parts[name])} files "
            f"({', '.join(f'{kind} {n}' for kind, n in kinds.most_common())}); "
            f"the shorter one is the bad one in {shorter / n_pairs:.3f} of them, ties as half"
        )


def _outermost_functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        else:
            yield from _outermost_functions(node)


def _is_string(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str)


def _canonical_tree(text: str) -> ast.Module | None:
    """Tree of a text that compiles and that ``ast.unparse`` reproduces exactly, otherwise None.

    A different layout would reveal a changed body whatever it contains.
    """
    try:
        tree = ast.parse(text)
        compile(tree, "<function>", "exec", dont_inherit=True)
    except SyntaxError:
        return None
    return tree if ast.unparse(tree) == text else None


def _differs(text: str, original: str) -> bool:
    tree = _canonical_tree(text)
    return tree is not None and ast.dump(tree) != original


def _mutation(function: Function, edit: _Edit, changed: str) -> Mutation:
    start = edit.start - len(function.prompt)
    was = function.response[start : edit.end - len(function.prompt)]
    span = start, start + len(edit.text)
    return Mutation(edit.kind, changed.removeprefix(function.prompt), span, (was, edit.text))


def balanced(mutations: list[Mutation]) -> list[bool]:
    """Which to keep, from the first on, so that each change is there as often as its reverse."""
    total, kept, keep = Counter(one.change for one in mutations), Counter(), []
    for one in mutations:
        keep.append(kept[one.change] < total[one.change[::-1]])
        kept[one.change] += keep[-1]
    return keep


def _edits(text: str) -> list[_Edit]:
    """Candidate changes of one place in the body of a function."""
    function, span = ast.parse(text).body[0], _locator(text)
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    bound = _bound_names(function, span)
    edits = []
    for statement in function.body:
        # Before Python 3.12, nodes inside an f-string have no position.
        for node in _walk(statement, skip=ast.JoinedStr):
            start, end = span(node) if hasattr(node, "lineno") else (0, 0)
            for left, right in pairwise(_operands(node)):
                gap_start, gap_end = span(left)[1], span(right)[0]
                operator = text[gap_start:gap_end].strip(" ()")
                at = text.index(operator, gap_start)
                edits += [
                    _Edit("operator", at, at + len(operator), other)
                    for other in SWAPS.get(operator, ())
                ]
            match node:
                case ast.Name(id=name, ctx=ast.Load()) if name in bound:
                    edits += [
                        _Edit("variable", start, end, other)
                        for other, since in bound.items()
                        if other != name and since < start
                    ]
                case ast.Constant(value=int(n)) if not isinstance(n, bool):
                    least = 1 if text[start - 1] == "-" else 0  # nobody writes -0
                    edits += [
                        _Edit("off_by_one", start, end, str(other))
                        for other in (n - 1, n + 1)
                        if other >= least
                    ]
                case ast.Subscript(slice=index):
                    bounds = [index.lower, index.upper] if isinstance(index, ast.Slice) else [index]
                    ends = [span(bound)[1] for bound in bounds if isinstance(bound, ast.Name)]
                    edits += [
                        _Edit("off_by_one", at, at, step)
                        for at in ends
                        for step in (" - 1", " + 1")
                    ]
                case ast.Return(value=ast.expr() as value):
                    edits.append(_Edit("dropped_return", start, end, text[slice(*span(value))]))
    return edits


def _locator(text: str) -> Callable[[ast.AST], tuple[int, int]]:
    """A function for [start, end) of a node in characters; ``ast`` counts lines and bytes."""
    lines = text.split("\n")
    starts = list(accumulate((len(line) + 1 for line in lines), initial=0))

    def position(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def span(node: Any) -> tuple[int, int]:
        start = position(node.lineno, node.col_offset)
        return start, position(node.end_lineno, node.end_col_offset)

    return span


def _bound_names(
    function: ast.FunctionDef | ast.AsyncFunctionDef,
    span: Callable[[ast.AST], tuple[int, int]],
) -> dict[str, int]:
    """Parameters and local variables of a function, with the place of their first binding."""
    names = {node.arg: 0 for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    for statement in function.body:
        for node in _walk(statement, skip=OWN_SCOPE):
            match node:
                # These bind after the value, although the name comes before it.
                case ast.Assign(targets=targets):
                    since = span(node)[1]
                case ast.For(target=target, iter=values):
                    targets, since = [target], span(values)[1]
                case ast.Name(ctx=ast.Store()):
                    targets, since = [node], span(node)[0]
                case _:
                    continue
            for target in targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                        names.setdefault(name.id, since)
    return names


def _operands(node: ast.AST) -> list[ast.expr]:
    """The operands of each operator of a node, in the order of the text."""
    match node:
        case ast.BinOp(left=left, right=right):
            return [left, right]
        case ast.AugAssign(target=target, value=value):
            return [target, value]
        case ast.BoolOp(values=values):
            return values
        case ast.Compare(left=left, comparators=comparators):
            return [left, *comparators]
    return []


def _walk(node: ast.AST, skip: type) -> Iterator[ast.AST]:
    """A node and its descendants, without those inside nodes of type ``skip``."""
    yield node
    if not isinstance(node, skip):
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, skip)
