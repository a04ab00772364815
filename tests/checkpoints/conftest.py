"""A multi-token model and an ordinary Llama, and a checkpoint folder of each."""

from pathlib import Path

import pytest
import torch

from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.checkpoints.write_hf import write_hf
from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.sharding import init_weights_


def built(args, seed=0):
    model = mtp_llama2(**args)
    init_weights_(model, seed)
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):  # norms of ones would hide a norm in the wrong place
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.fixture
def build():
    """build(args, seed=0): a model whose norms are not ones."""
    return built


@pytest.fixture
def args(tiny_model_args):
    return tiny_model_args | {"norm_eps": 1e-5, "rope_base": 10_000.0, "rope_scaling": None}


@pytest.fixture
def model(args):
    return built(args)


@pytest.fixture
def meta_folder(model, tmp_path, tiny_tokenizer_path) -> Path:
    save_meta(model, tmp_path / "m", tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    return tmp_path / "m"


@pytest.fixture
def hf_folder(args, tmp_path, tiny_tokenizer_path) -> Path:
    """An ordinary Llama of three blocks."""
    llama = built(args | {"num_layers": 3, "n_future_tokens": 1}, seed=5)
    write_hf(llama.state_dict().items(), llama.args, tmp_path / "h", tiny_tokenizer_path)
    return tmp_path / "h"


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="the reward extra is not installed")
