"""One sound input of every kind, for tests that damage copies of them."""

import importlib.util
import json
import textwrap
from pathlib import Path

import pytest
import yaml


def load_beside(name: str):
    """A module of this folder, by path: tests are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def mutate():
    """The functions of mutate.py."""
    return load_beside("mutate")


@pytest.fixture
def judge():
    """A new ``Judge``, which speaks at the end."""
    judge = load_beside("judge").Judge()
    yield judge
    print("\n" + judge.report())


@pytest.fixture(scope="package")
def text_rows(tmp_path_factory, tiny_tokenizer_path) -> Path:
    """train.jsonl and val.jsonl: short plain texts, a few with noise."""
    folder = tmp_path_factory.mktemp("rows")
    text = Path(textwrap.__file__).read_text()
    for name, part in {"train": text[:8000], "val": text[8000:9600]}.items():
        rows = [{"text": part[i : i + 40], "noise": [[0, 4]]} for i in range(0, len(part), 40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="package")
def small_config(text_rows, tiny_tokenizer_path) -> str:
    """YAML of a run from nothing that takes a second."""
    rows = {"_component_": "wmtp_modules.data.rows_dataset"}
    config = {
        "output_dir": "???",
        "device": "cpu",
        "dtype": "fp32",
        "fp32_master_weights": True,
        "seed": 1,
        "resume_from_checkpoint": False,
        "model": {
            "_component_": "wmtp_modules.models.mtp_llama2",
            "vocab_size": 512,
            "num_layers": 3,
            "n_future_tokens": 2,
            "num_heads": 2,
            "num_kv_heads": 2,
            "embed_dim": 16,
            "max_seq_len": 64,
            "intermediate_dim": 32,
            "norm_eps": 1e-5,
            "rope_base": 10000.0,
        },
        "checkpointer": None,
        "tokenizer": {
            "_component_": "torchtune.models.llama2.llama2_tokenizer",
            "path": str(tiny_tokenizer_path),
            "max_seq_len": 64,
        },
        "dataset": rows | {"source": str(text_rows / "train.jsonl"), "seed": 0, "split": "train"},
        "dataset_val": rows | {"source": str(text_rows / "val.jsonl")},
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "weighting": {
            "name": "random_topk",
            "score": "excess",
            "selection": "topk",
            "ratio": 0.6,
            "scope": "microbatch",
            "temperature": 1.0,
            "w_min": 0.1,
            "w_max": 5.0,
            "strength": 1.0,
            "decay": 1.0,
        },
        "optimizer": {
            "_component_": "torch.optim.AdamW",
            "lr": 0.003,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.1,
        },
        "num_warmup_steps": 2,
        "clip_grad_norm": 1.0,
        "max_steps": 1,
        "run_val_every_n_steps": 1,
        "save_every_n_steps": 1,
        "keep_last": 1,
        "max_skipped_steps": 1,
        "collective_timeout_s": 300,
        "log_every_n_steps": 1,
        "activation_checkpointing": "none",
        "compile": False,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": "${output_dir}/logs",
        },
        "profiler": {"enabled": False},
    }
    return yaml.safe_dump(config, sort_keys=False)
