"""What a rank of the golden test runs, in a fork of tests/fork_server.py.

In ``folder`` it leaves ``tokens<r>.json`` with the token ids of the packs of its training
micro-batches, as the model's embedding met them.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value

ROOT = Path(__file__).parents[2]

FEATURES = Features(
    {
        "tokens": List(Value("int32")),
        "keep": List(Value("bool")),
        "noise": List(Value("bool")),
        "reward": Value("float64"),
        "problem_id": Value("string"),
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


def import_recipe(name: str):
    """A recipe's module, by its path."""
    path = ROOT / "recipes" / f"{name}_wmtp_distributed.py"
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # recipe_main looks its own module up
    spec.loader.exec_module(module)
    return module


def run_rank(rank: int, recipe: str, config: str, folder: str) -> None:
    """What a worker of torchrun does, recording what trains the model."""
    # `token_rows` in a config means this module, under its own name.
    sys.modules["ranks"] = sys.modules[__name__]
    token_rows.__module__ = os.environ["WMTP_ALLOWED_COMPONENTS"] = "ranks"
    sys.argv = ["recipe", "--config", config]
    seen = []

    def record(module, args) -> None:
        # Validation and scoring run without gradient, a frozen trunk in evaluation mode.
        is_training = module.training and torch.is_grad_enabled()
        if is_training and isinstance(module, torch.nn.Embedding):
            seen.append(args[0].tolist())

    torch.nn.modules.module.register_module_forward_pre_hook(record)
    use_loss_chunks_of(7, vocab_size=512)
    import_recipe(recipe).recipe_main()
    (Path(folder) / f"tokens{rank}.json").write_text(json.dumps(seen))
