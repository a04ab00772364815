"""Models and a tokenizer for decoding: random weights, and weights that know a short text."""

from types import SimpleNamespace

import pytest
import torch
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.generation.generate import Request, generate
from wmtp_modules.loss.mtp_loss import mtp_labels
from wmtp_modules.models import mtp_llama2

LESSON = '''def total(values):
    """Return the sum."""
    result = 0
    for value in values:
        result += value
    return result


def largest(values):
    """Return the largest."""
    result = values[0]
    for value in values:
        if value > result:
            result = value
    return result
'''


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer_path):
    return Llama2Tokenizer(str(tiny_tokenizer_path))


@pytest.fixture
def random_model(tiny_model_args):
    torch.manual_seed(0)
    return mtp_llama2(**tiny_model_args | {"max_seq_len": 128})


@pytest.fixture(scope="session")
def trained_model(tokenizer):
    """Four heads that know most of LESSON: drafts are kept often, not always."""
    torch.manual_seed(0)
    model = mtp_llama2(
        vocab_size=512,
        num_layers=6,
        n_future_tokens=4,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=192,
        intermediate_dim=64,
    )
    tokens_BT = torch.tensor([tokenizer.encode(LESSON, add_bos=True, add_eos=True)])
    labels_BTK = mtp_labels(
        tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool), torch.zeros_like(tokens_BT), 4
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        loss = model(tokens_BT, labels_BTK).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """Prompts of unequal length."""
    texts = ["def total(values):\n", "def", LESSON[:150], "    for value", LESSON[60:200]]
    return [tuple(tokenizer.encode(text, add_bos=True, add_eos=False)) for text in texts]


@pytest.fixture
def requests(prompts):
    return [Request(prompt, seed) for seed, prompt in enumerate(prompts)]


SETTINGS = dict(
    max_new_tokens=40, temperature=0.0, top_p=1.0, top_k=0, stop=(), dtype=torch.float32
)


@pytest.fixture
def decode(tokenizer):
    """``generate`` with defaults, in either or in both ways."""

    def one(model, requests, decoding="self_speculative", **changes):
        settings = SETTINGS | {"batch_size": max(1, len(requests))} | changes
        return generate(model, tokenizer, requests, decoding=decoding, **settings)

    def both(model, requests, **changes):
        return [one(model, requests, name, **changes) for name in ("plain", "self_speculative")]

    return SimpleNamespace(one=one, both=both)
