"""The rules of the house: where a line may stand, what may import what, how long a recipe is.

Read off the source, nothing is imported. An arrow (import) points down ``LEVELS``; imports inside
functions and for annotations count like any other.
"""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room is a folder of wmtp_modules or one of its files; upper levels may import lower ones, rooms
# of one level each other in one direction.
LEVELS = (
    # What a command line starts.
    ("recipes", "cli", "doctor", "convert", "estimate_memory", "sync"),
    ("reports", "registry", "critic", "quickstarts", "memory"),
    ("run",),
    ("scoring", "checkpoints", "storage"),
    ("evaluation", "parallel", "generation"),
    ("data", "weighting", "models", "tracking"),
    ("loss", "config", "sandbox", "files", "progress", "tune_plugin", "catalog"),
)
LEVEL_OF = {room: len(LEVELS) - i for i, rooms in enumerate(LEVELS) for room in rooms}

# What users name in a YAML is exported by the package; no other __init__ holds code.
EXPORTS = {
    "wmtp_modules.data": {"code_contests_dataset", "mbpp_dataset", "rows_dataset"},
    "wmtp_modules.models": {
        *("mtp_from_checkpoint", "mtp_llama2", "mtp_llama2_7b", "mtp_sheared_llama_1_3b"),
    },
}

# Rooms that may know a config object; every other function takes tensors, paths and numbers.
KNOWS_CONFIGS = {
    "recipes",
    "run",
    "config",
    "memory",
    "estimate_memory",
    "doctor",
    "registry",
    "cli",
}

MOST_LINES = {
    "recipes/rho1_wmtp_distributed.py": 480,
    "recipes/critic_wmtp_distributed.py": 640,
    "recipes/eval_mtp.py": 480,
}
# Of wmtp_modules and recipes. Values as plain Python compares them, accounts of what others do
# to a program, locks between runs and refusals that say the way out took it from 17,000 to this.
# Since then: controls as sets of overrides, a critic's heads, figures, weights and their scale; a
# page for each run and for several (reports/, 1,650 lines: charts, reading, tokens, both pages).
# Stores took 1,250: reading, writing and fetching that a kill at any moment leaves sound. What
# follows a run into MLflow, whatever fails there, took 850. Environments and secrets took 250, a
# registry and its model cards 430. What `tune` and `wmtp` know from any folder took 640, keys that
# say what they are, and their reference, 200; rows of many forms and formats, models by their
# folder, and tokenising by all cores 1,050. LoRA and its files took 430; several hosts 470: what
# they must share, who is lost, replicas and when their gradients cross. What blocks compute twice,
# and which of it fits a GPU, took 200; heads that train apart or from head 0 480, how fast a model
# would decode 360, folders for transformers and for EAGLE-3 600, slots that are refilled 240.
MOST_LINES_OF_ALL = 31_400
MOST_NAMES_OF_RHO1 = 40  # that its recipe imports from wmtp_modules
# Of it and all first-party files that it imports at its start. A reference's held-out losses beside
# the model's took 80, controls as sets of overrides 210, the data set's scale of weights 100, the
# page of a run 1,340, URLs of stores 220 (what reads and writes them is imported by who has one), a
# run that MLflow cannot stop 430, environments and more forms of secrets 250, its registry 350,
# names of recipes and configs 130, keys that say what they are 100, rows of many forms 1,000, LoRA
# 430, several hosts 470, what blocks compute twice 130, heads apart 400,
# how fast a model would decode 330.
MOST_LINES_BEHIND_RHO1 = 16_300

# They take up to seconds, which nobody who mistyped a key shall wait for: imported where used.
# (torchtune imports datasets, and datasets pandas, whatever we do.)
IMPORTED_WHEN_USED = {"mlflow", "matplotlib", "sklearn", "pandas", "scipy", "transformers"}
IMPORTED_WHEN_USED |= {"s3fs", "botocore", "aiohttp", "huggingface_hub"}

RHO1 = "recipes.rho1_wmtp_distributed"


@cache
def sources() -> dict[str, Path]:
    """First-party modules by dotted name."""
    found = {}
    for folder in ("wmtp_modules", "recipes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text())


@cache
def n_lines(module: str) -> int:
    return len(sources()[module].read_text().splitlines())


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "recipes" or len(parts) == 1 else parts[1]


def imports_of(module: str, tree: ast.AST, *, modules=None) -> list[tuple[str, str | None, int]]:
    """(module, name taken from it or None, line) of each first-party import in a tree."""
    modules = modules or sources()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules:
                    found.append((alias.name, None, node.lineno))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: from the package that the module lies in
                is_package = sources()[module].name == "__init__.py"
                package = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*package, *filter(None, [base])])
            for alias in node.names:
                if f"{base}.{alias.name}" in modules:
                    found.append((f"{base}.{alias.name}", None, node.lineno))
                elif base in modules:
                    found.append((base, alias.name, node.lineno))
    return found


@cache
def arrows() -> tuple[tuple[str, str, int], ...]:
    """(importing module, imported module, line), all of them."""
    return tuple(
        (module, target, line)
        for module in sources()
        for target, _, line in imports_of(module, tree_of(module))
    )


def at_start(tree: ast.Module) -> ast.Module:
    """A tree without what runs later or never: functions, and imports for annotations."""

    class Drop(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
            return None if "TYPE_CHECKING" in names else self.generic_visit(node)

    return Drop().visit(ast.parse(ast.unparse(tree)))


def closure(module: str) -> set[str]:
    """The first-party modules that importing one of them brings, packages' own files among them."""
    seen, waiting = set(), [module]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        parts = one.split(".")
        waiting += [".".join(parts[:n]) for n in range(1, len(parts))]
        waiting += [target for target, _, _ in imports_of(one, at_start(tree_of(one)))]
    return {one for one in seen if one in sources()}


def circles(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


# --------------------------------------------------------------------------- directions


def test_every_room_has_its_level():
    assert {room_of(module) for module in sources()} - {"wmtp_modules"} <= LEVEL_OF.keys()


def test_no_import_points_up():
    up = [
        f"{sources()[module].relative_to(ROOT)}:{line} imports {target}"
        for module, target, line in arrows()
        if LEVEL_OF.get(room_of(target), 0) > LEVEL_OF[room_of(module)]
    ]
    assert up == []


def test_rooms_of_one_level_import_each_other_in_one_direction():
    for rooms in LEVELS:
        graph = {
            room: {
                room_of(target)
                for module, target, _ in arrows()
                if room_of(module) == room and room_of(target) in rooms
            }
            - {room}
            for room in rooms
        }
        assert circles(graph) == []


def test_no_module_imports_in_a_circle():
    """Packages stand aside: theirs are the names that they export."""
    graph = {module: set() for module in sources()}
    for module, target, _ in arrows():
        if sources()[target].name != "__init__.py":
            graph[module].add(target)
    assert circles(graph) == []


def test_nothing_imports_a_recipe():
    assert [arrow for arrow in arrows() if room_of(arrow[1]) == "recipes"] == []


# ------------------------------------------------------------------------------ contents


@pytest.mark.parametrize("package", [n for n, p in sources().items() if p.name == "__init__.py"])
def test_a_package_exports_what_a_yaml_names_and_nothing_else(package):
    tree = tree_of(package)
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert names == EXPORTS.get(package, set())
    others = [
        node
        for node in tree.body
        if not isinstance(node, ast.ImportFrom)
        and not (isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    assert others == []


def test_heavy_libraries_are_imported_when_they_are_used():
    """Of whatever a command imports at its start; what it imports later may be made of them."""
    found = []
    commands = {m for m in sources() if m.startswith("recipes.") or LEVEL_OF.get(m[13:]) == 7}
    for module in set().union(*map(closure, commands)):
        for node in ast.walk(at_start(tree_of(module))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if IMPORTED_WHEN_USED & {name.split(".")[0] for name in names}:
                found.append(module)
    assert found == []


def test_config_objects_stay_in_their_rooms():
    seen = []
    for module in sources():
        if room_of(module) in KNOWS_CONFIGS:
            continue
        for node in ast.walk(tree_of(module)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0], *(alias.name for alias in node.names)]
            elif isinstance(node, ast.arg):
                names = [node.arg]
            elif isinstance(node, ast.Name):
                names = [node.id]
            elif isinstance(node, ast.Attribute):
                names = [node.attr.strip("_")]
            if {"omegaconf", "cfg", "DictConfig", "OmegaConf", "ListConfig"} & set(names):
                seen.append(f"{sources()[module].relative_to(ROOT)}:{node.lineno}")
    assert seen == []


# -------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("recipe", MOST_LINES)
def test_a_recipe_is_read_in_one_sitting(recipe):
    lines = n_lines(recipe.removesuffix(".py").replace("/", "."))
    assert lines <= MOST_LINES[recipe]


def test_every_recipe_has_its_bound():
    recipes = {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("[!_]*.py")}
    assert recipes == set(MOST_LINES)


def test_all_lines_together():
    lines = sum(n_lines(module) for module in sources())
    assert lines <= MOST_LINES_OF_ALL


def test_names_that_the_rho1_recipe_imports():
    names = len({(module, name) for module, name, _ in imports_of(RHO1, tree_of(RHO1))})
    assert names <= MOST_NAMES_OF_RHO1


def test_lines_behind_the_rho1_recipe():
    """Counted: every line of the recipe, of all first-party files that importing it brings."""
    lines = sum(n_lines(module) for module in closure(RHO1))
    assert lines <= MOST_LINES_BEHIND_RHO1


# ------------------------------------------------------------------- that the reading works


@pytest.mark.parametrize(
    ("module", "text", "found"),
    [
        ("wmtp_modules.data.rows", "import wmtp_modules.run.plan", "wmtp_modules.run.plan"),
        ("wmtp_modules.data.rows", "from wmtp_modules.run import plan", "wmtp_modules.run.plan"),
        ("wmtp_modules.data.rows", "from ..run.plan import parse", "wmtp_modules.run.plan"),
        ("wmtp_modules.data.rows", "from . import mbpp", "wmtp_modules.data.mbpp"),
        ("wmtp_modules.data", "from .mbpp import mbpp_dataset", "wmtp_modules.data.mbpp"),
        ("recipes.eval_mtp", "from recipes import rho1_wmtp_distributed", RHO1),
        (
            "wmtp_modules.files",
            "def f():\n    if x:\n        from wmtp_modules.run.plan import parse",
            "wmtp_modules.run.plan",
        ),
        (
            "wmtp_modules.files",
            "if TYPE_CHECKING:\n    from wmtp_modules.run.plan import parse",
            "wmtp_modules.run.plan",
        ),
    ],
)
def test_the_reading_sees_every_kind_of_import(module, text, found):
    assert [target for target, _, _ in imports_of(module, ast.parse(text))] == [found]


def test_what_runs_later_is_no_part_of_the_start():
    text = """
import a
def f():
    import b
if typing.TYPE_CHECKING:
    import c
class D:
    import d
"""
    known = dict.fromkeys("abcd")
    found = imports_of("x", at_start(ast.parse(text)), modules=known)
    assert [target for target, _, _ in found] == ["a", "d"]


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})
