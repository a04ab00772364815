"""Makes small Python functions for the evaluation's quickstart, and trains a model on them.

A function of the family does two steps of integer arithmetic: its name and docstring say which, its
body does them. Functions are assigned to training, held-out text and tasks by what they compute.
No training function computes what a task asks for, so copying a training solution solves no task.
"""

import functools
import itertools
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torchtune.utils import get_logger

from wmtp_modules.files import only_writer
from wmtp_modules.parallel.process_group import die_with_parent
from wmtp_modules.quickstarts.stdlib import assets_folder, part_of, train_tokenizer, write_rows
from wmtp_modules.run.plan import finished_run

log = get_logger("INFO")

VERSION = 1  # of the files made here; a new version makes them again
RECIPE = "rho1_wmtp_distributed"
PROCESSES = 2  # that train the model
# A launcher sets these for its processes; a launcher started by one of them must not read them.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_WORLD_")
SHARES = {"base": 0.8, "heldout": 0.1, "tasks": 0.1}  # of the behaviours
ROWS = {"base": 8_000, "heldout": 200, "tasks": 50}
CONSTANTS = range(2, 21)
# Functions that agree on these count as one: small and large, both signs, no common factor.
PROBES = (-97, -23, -7, -2, -1, 0, 1, 2, 3, 5, 8, 13, 21, 40, 111)


class Step(NamedTuple):
    """One operation on x; ``{n}`` stands for its constant, if any."""

    name: str  # part of the function's name
    doc: str  # {x} stands for the operand
    code: str
    function: Callable[..., int]  # what the code makes of x and its constant


STEPS = (
    Step("add_{n}", "add {n} to {x}", "x += {n}", lambda x, n: x + n),
    Step("subtract_{n}", "subtract {n} from {x}", "x -= {n}", lambda x, n: x - n),
    Step("multiply_by_{n}", "multiply {x} by {n}", "x *= {n}", lambda x, n: x * n),
    Step("divide_by_{n}", "divide {x} by {n}, rounding down", "x //= {n}", lambda x, n: x // n),
    Step("take_modulo_{n}", "take {x} modulo {n}", "x %= {n}", lambda x, n: x % n),
    Step("double", "double {x}", "x *= 2", lambda x, n: x * 2),
    Step("negate", "negate {x}", "x = -x", lambda x, n: -x),
    Step("square", "square {x}", "x *= x", lambda x, n: x * x),
)


class Member(NamedTuple):
    """A function of the family."""

    name: str
    prompt: str  # up to its docstring
    solution: str  # the body after it
    results: tuple[int, ...]  # for each of PROBES


def family() -> list[Member]:
    """All members, except those with the same result for every x, which cannot be wrong."""
    steps = [
        Step(
            step.name.format(n=n),
            step.doc.format(n=n, x="{x}"),
            step.code.format(n=n),
            functools.partial(step.function, n=n),
        )
        for step in STEPS
        for n in (CONSTANTS if "{n}" in step.name else (0,))
    ]
    members = []
    for first, second in itertools.product(steps, repeat=2):
        name = f"{first.name}_then_{second.name}"
        doc = f"{first.doc.format(x='x')}, then {second.doc.format(x='it')}."
        prompt = f'def {name}(x):\n    """{doc[0].upper()}{doc[1:]}"""\n'
        solution = f"    {first.code}\n    {second.code}\n    return x\n"
        results = tuple(second.function(first.function(x)) for x in PROBES)
        if len(set(results)) > 1:
            members.append(Member(name, prompt, solution, results))
    return members


def deal_members(seed: int) -> dict[str, list[Member]]:
    """Assign behaviours to disjoint parts by a hash, and draw each part's members in random order.

    Of members with the same behaviour, such as adding 3 then 4 and adding 4 then 3, held-out text
    and tasks get one.
    """
    members = family()
    random.Random(seed).shuffle(members)
    parts: dict[str, list[Member]] = {name: [] for name in SHARES}
    seen = set()
    for member in members:
        name = part_of(f"{seed} {member.results}", SHARES)
        if name == "base" or (name is not None and member.results not in seen):
            parts[name].append(member)
        seen.add(member.results)
    return {name: part[: ROWS[name]] for name, part in parts.items()}


def prepare_functions(assets_dir: str, vocab_size: int, seed: int, model_config: str) -> None:
    """Make the data and then the model for the evaluation's quickstart, unless they exist.

    Files: ``tokenizer.model``; ``base.jsonl`` and ``heldout.jsonl``, whole functions as rows
    ``{"text"}``; ``tasks.jsonl``, functions to complete in HumanEval's columns. ``RECIPE`` trains
    the model in separate processes, again if the data or the config changed.

    Args:
        seed: assigns the functions.
        model_config: config of the training, with ``output_dir`` inside ``assets_dir``.

    Raises:
        ValueError: if ``assets_dir`` has other files, ``model_config`` cannot be read, or training
            fails.
    """
    made_from = {"quickstart": "eval", "version": VERSION, "vocab_size": vocab_size, "seed": seed}
    with assets_folder(Path(assets_dir), made_from) as folder:
        if folder is not None:
            _fill(folder, vocab_size, seed)
    with only_writer(Path(assets_dir, "model")):  # a second one waits, and finds it
        _train_model(model_config, assets_dir)


def _fill(folder: Path, vocab_size: int, seed: int) -> None:
    parts = deal_members(seed)
    train_tokenizer(
        folder, [member.prompt + member.solution for member in parts["base"]], vocab_size
    )
    rows = {
        name: [{"text": member.prompt + member.solution} for member in parts[name]]
        for name in ("base", "heldout")
    } | {"tasks": [_task(i, member) for i, member in enumerate(parts["tasks"])]}
    for name, part in rows.items():
        path = folder / f"{name}.jsonl"
        write_rows(path, part)
        log.info(f"  {name}: {len(part)} functions, {path.stat().st_size / 1e6:.1f} MB")


def _task(number: int, member: Member) -> dict:
    """A member as a row of HumanEval; its assertions tell any two members apart."""
    asserts = (
        f"    assert candidate({x}) == {result}\n"
        for x, result in zip(PROBES, member.results, strict=True)
    )
    return {
        "task_id": f"Quickstart/{number}",
        "prompt": member.prompt,
        "entry_point": member.name,
        "canonical_solution": member.solution,
        "test": "def check(candidate):\n" + "".join(asserts),
    }


def _train_model(model_config: str, assets_dir: str) -> None:
    """Train in separate processes, because no recipe imports another; their output is shown."""
    output_dir = finished_run(model_config, assets_dir=assets_dir)
    if output_dir is not None and (output_dir / "last").is_dir():
        return
    log.info(f"Training the model of {model_config} ...")
    command = [sys.executable, "-m", "torchtune._cli.tune", "run", "--nproc_per_node"]
    command += [str(PROCESSES), RECIPE, "--config", model_config]
    command += ["resume_from_checkpoint=true", f"assets_dir={assets_dir}"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    # However this process ends, the launcher ends with it and its workers save their state.
    done = subprocess.run(command, env=environment, check=False, preexec_fn=die_with_parent)
    if done.returncode:
        raise ValueError(
            f"training the quickstart's model failed with exit code {done.returncode}; its output "
            f"is above. To run it alone: {shlex.join(command)}"
        )
