"""Fixtures of several test files. Nothing is downloaded: what is needed is made here."""

import sysconfig
from pathlib import Path

import pytest
import sentencepiece as spm
from hypothesis import settings

# By default an example that takes 200 ms fails, which says how busy the machine is.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="session")
def tiny_tokenizer_path(tmp_path_factory) -> Path:
    """A Llama-style SentencePiece model of 512 pieces, trained on standard-library source."""
    folder = tmp_path_factory.mktemp("tokenizer")
    names = ["ast", "bisect", "calendar", "heapq", "json/decoder", "queue", "textwrap"]
    corpus = folder / "corpus.txt"
    corpus.write_text("".join((STDLIB / f"{name}.py").read_text() for name in names))
    spm.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        pad_id=-1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture
def tiny_model_args() -> dict:
    """Two trunk blocks and four heads with grouped queries: the smallest model with every part."""
    return dict(
        vocab_size=512,
        num_layers=6,
        n_future_tokens=4,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=64,
        intermediate_dim=64,
    )


@pytest.fixture
def gloo_group(tmp_path):
    """A one-process gloo group, for what needs a mesh but no second rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
