"""Runs recipes in forked ranks: importing torch and a recipe takes longer than these runs do.

Started as a program, with OMP_NUM_THREADS=1 so that no thread is lost in a fork. It reads one
request a line, ``{"recipe", "config", "world", "folder"}``, and answers each with a line that holds
the ranks' exit codes. A rank is what torchrun would have started: environment variables, sys.argv
and ``recipe_main``. In ``folder`` it leaves ``rank<r>.log``, and ``tokens<r>.json`` with the token
ids of the packs of its training micro-batches, as the model's embedding met them.
"""

import importlib.util
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value

ROOT = Path(__file__).parents[2]
PATIENCE_S = 600  # of a machine that does other things meanwhile
RECIPES = ("rho1", "critic")

FEATURES = Features(
    {
        "tokens": List(Value("int32")),
        "keep": List(Value("bool")),
        "noise": List(Value("bool")),
        "reward": Value("float64"),
    }
)


def token_rows(tokenizer, *, path: str) -> Dataset:
    """Rows of token ids, for ``dataset._component_``: documents of one token come from no text."""
    return Dataset.from_list(json.loads(Path(path).read_text()), features=FEATURES)


def use_loss_chunks_of(n_tokens: int, vocab_size: int) -> None:
    """Cut the loss into chunks of so few tokens that even these runs have many."""
    from wmtp_modules.loss import linear_cross_entropy as module

    assert module.CHUNK_LOGITS_CPU > 0
    module.CHUNK_LOGITS_CPU = n_tokens * vocab_size


def draw_nothing() -> None:
    """Pictures would take most of these runs' time."""
    from matplotlib.figure import Figure

    Figure.savefig = lambda figure, path, **options: Path(path).touch()


def import_recipe(name: str):
    """A recipe's module, by its path."""
    path = ROOT / "recipes" / f"{name}_wmtp_distributed.py"
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # recipe_main looks its own module up
    spec.loader.exec_module(module)
    return module


def run_rank(recipe, request: dict, rank: int, port: int) -> None:
    """What a worker of torchrun does, recording what trains the model."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["world"]}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    sys.argv = ["recipe", "--config", request["config"]]
    seen = []

    def record(module, args) -> None:
        # Validation and scoring run without gradient, a frozen trunk in evaluation mode.
        is_training = module.training and torch.is_grad_enabled()
        if is_training and isinstance(module, torch.nn.Embedding):
            seen.append(args[0].tolist())

    torch.nn.modules.module.register_module_forward_pre_hook(record)
    use_loss_chunks_of(7, vocab_size=512)
    recipe.recipe_main()
    (Path(request["folder"]) / f"tokens{rank}.json").write_text(json.dumps(seen))


def fork_rank(recipe, request: dict, rank: int, port: int) -> int:
    """Process id of a new rank."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(Path(request["folder"]) / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        run_rank(recipe, request, rank, port)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(recipe, request: dict) -> list[int]:
    """Exit codes of all ranks; where one fails, or takes too long, the others are killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = {fork_rank(recipe, request, rank, port): rank for rank in range(request["world"])}
    codes, end = {}, time.monotonic() + PATIENCE_S
    while len(codes) < len(pids):
        for pid in pids.keys() - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > end:
            for pid in pids.keys() - codes.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no answer
    draw_nothing()
    recipes = {name: import_recipe(name) for name in RECIPES}
    # `token_rows` in a config means this module, under its own name.
    sys.modules["fork_server"] = sys.modules["__main__"]
    token_rows.__module__ = "fork_server"
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run(recipes[request["recipe"]], request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
