"""Small checkpoints, rows of token ids, and ranks that run recipes on them."""

import importlib.util
import json
import random
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
T, VOCAB = 24, 512  # positions of a pack; pieces of the tokenizer


def load_beside(name: str):
    """A module of this folder, by path: tests are no package."""
    spec = importlib.util.spec_from_file_location(f"golden_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def replay():
    """The module replay.py."""
    return load_beside("replay")


@pytest.fixture(autouse=True)
def one_thread():
    """More of them only wait for each other over matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Ranks:
    """Recipes in forked ranks."""

    def __init__(self, fork_server) -> None:
        self._forks = fork_server
        self._run_rank = load_beside("ranks").run_rank

    def run(self, recipe: str, cfg: dict, world: int, folder: Path) -> list[list]:
        """Run a recipe on ``world`` ranks, all of which have to end well.

        Args:
            recipe: "rho1" or "critic".
            cfg: the whole config.
            world: number of ranks.
            folder: for what they leave.

        Returns:
            Token ids [world * batch_size, T] of every joint micro-batch, in order.
        """
        config = folder / "config.yaml"
        config.write_text(json.dumps(cfg))  # JSON is YAML
        self._forks.call(self._run_rank, recipe, str(config), str(folder), ranks=world, timeout=380)
        of_ranks = [json.loads((folder / f"tokens{r}.json").read_text()) for r in range(world)]
        # Pack b of rank r is pack b * world + r of the joint micro-batch.
        return [
            [pack for packs in zip(*own, strict=True) for pack in packs]
            for own in zip(*of_ranks, strict=True)
        ]


@pytest.fixture(scope="session")
def ranks(fork_server):
    return Ranks(fork_server)


def make_rows(replay, seed: int, n: int) -> list:
    """Documents of every kind: tiny, full, unsupervised, prompts with a response of one token."""
    rng = random.Random(seed)
    lengths = [1, 1, 2, 2, 2, 3, 3, 3, T, T, T, T, 12, 9]
    lengths += [rng.randrange(4, 17) for _ in range(n - len(lengths))]
    rows = []
    for i, length in enumerate(lengths):
        tokens = [replay.FIRST_TOKEN + i, *(rng.randrange(1, 250) for _ in range(length - 1))]
        prompt = 0 if i % 3 == 0 else rng.randrange(length)
        if i % 5 == 2:
            prompt = length - 1  # a response of one token
        if 10 <= i < 14:
            prompt = length  # nothing supervised, twice in a full row
        keep = [u >= prompt for u in range(length)]
        noise = [rng.random() < 0.3 for _ in range(length)]
        problem = None if i % 7 == 6 else f"problem {i % 2}"
        rows.append(replay.Row(tokens, keep, noise, rng.gauss(0, 1), problem))
    return rows


def write_checkpoint(folder: Path, tokenizer: Path, seed: int, **params: int) -> Path:
    """A random model in Meta's format, sharp enough that attention and position matter."""
    folder.mkdir()
    params = {"vocab_size": VOCAB, "rope_theta": 10000.0, "norm_eps": 1e-5} | params
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.2) -> torch.Tensor:
        return std * torch.randn(*shape, generator=generator)

    dim, hidden, n_heads = params["dim"], params["dim"] + 8, params["n_future_tokens"]
    kv_dim = dim // params["n_heads"] * params["n_kv_heads"]
    shapes = {"wq": (dim, dim), "wk": (kv_dim, dim), "wv": (kv_dim, dim), "wo": (dim, dim)}
    tensors = {"tok_embeddings.weight": normal(VOCAB, dim), "output.weight": normal(VOCAB, dim)}
    tensors["norm.weight"] = 1 + normal(dim)
    n_layers = params["n_layers"] - n_heads + 1
    blocks = [f"layers.{i}" for i in range(n_layers)]
    for block in blocks + [f"extra_heads.{j}" for j in range(n_heads - 1)]:
        for name, shape in shapes.items():
            tensors[f"{block}.attention.{name}.weight"] = normal(*shape)
        for name in ("w1", "w3"):
            tensors[f"{block}.feed_forward.{name}.weight"] = normal(hidden, dim)
        tensors[f"{block}.feed_forward.w2.weight"] = normal(dim, hidden)
        for name in ("attention_norm", "ffn_norm"):
            tensors[f"{block}.{name}.weight"] = 1 + normal(dim)
    torch.save(tensors, folder / "consolidated.pth")
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


class Assets:
    """Rows, checkpoints and the config that all runs share."""

    def __init__(self, folder: Path, replay, tokenizer: Path) -> None:
        self.folder = folder
        self.rows = make_rows(replay, seed=1, n=32)
        self.rows_val = make_rows(replay, seed=2, n=16)
        for name, rows in {"train": self.rows, "heldout": self.rows_val}.items():
            records = [asdict(row) for row in rows]
            for record in records:
                del record["weight"]  # of text only
            (folder / f"{name}.json").write_text(json.dumps(records))
        shape = {"dim": 32, "n_heads": 4, "n_kv_heads": 2}  # grouped queries
        self.model = write_checkpoint(
            folder / "model", tokenizer, 1, n_layers=5, n_future_tokens=3, **shape
        )
        # Of another width, and one with more heads than the model.
        shape = {"dim": 24, "n_heads": 2, "n_kv_heads": 1}
        self.reference = write_checkpoint(
            folder / "reference", tokenizer, 2, n_layers=2, n_future_tokens=1, **shape
        )
        self.mtp_reference = write_checkpoint(
            folder / "mtp_reference", tokenizer, 3, n_layers=5, n_future_tokens=4, **shape
        )
        rows_of = {"_component_": "ranks.token_rows"}
        self.cfg = {
            "device": "cpu",
            "dtype": "fp32",
            "fp32_master_weights": True,
            "seed": 3,
            "resume_from_checkpoint": False,
            "model": {
                "_component_": "wmtp_modules.models.mtp_llama2",
                "vocab_size": VOCAB,
                "num_layers": 5,
                "n_future_tokens": 3,
                "num_heads": 4,
                "num_kv_heads": 2,
                "embed_dim": 32,
                "intermediate_dim": 40,
                "max_seq_len": T,
            },
            "checkpointer": {"checkpoint_dir": str(self.model)},
            "tokenizer": {
                "_component_": "torchtune.models.llama2.llama2_tokenizer",
                "path": str(tokenizer),
                "max_seq_len": T,
            },
            "dataset": rows_of | {"path": str(folder / "train.json")},
            "dataset_val": rows_of | {"path": str(folder / "heldout.json")},
            "num_warmup_steps": 0,
            "run_val_every_n_steps": 2,
            "save_every_n_steps": 100,
            "keep_last": 1,
            "max_skipped_steps": 1,
            "collective_timeout_s": 300,
            "log_every_n_steps": 1,
            "activation_checkpointing": "none",
            "compile": False,
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger",
                "log_dir": str(folder / "logs"),
            },
            "profiler": {"enabled": False},
        }


@pytest.fixture(scope="session")
def assets(tmp_path_factory, replay, tiny_tokenizer_path):
    return Assets(tmp_path_factory.mktemp("golden"), replay, tiny_tokenizer_path)
