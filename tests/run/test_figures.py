"""Held-out losses that cannot be had are an error that says why."""

import pytest
import torch

from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.sharding import init_weights_
from wmtp_modules.run.figures import TrainingError, heldout_losses


@pytest.fixture
def model(tiny_model_args, gloo_group):
    model = mtp_llama2(**tiny_model_args)
    init_weights_(model, 0)
    return model


def batch_of(length):
    """One document of some tokens in a row of eight."""
    doc = torch.where(torch.arange(8) < length, 0, -1)[None]
    tokens = torch.arange(8)[None]
    seq_lens = [torch.tensor([length, 8 - length] if length < 8 else [8])]
    return {
        "tokens": tokens,
        "doc": doc,
        "keep": doc >= 0,
        "input_pos": tokens,
        "seq_lens": seq_lens,
    }


def test_heldout_texts_too_short_for_a_head(model):
    assert len(heldout_losses(model, [batch_of(3), batch_of(5)])) == 4
    message = r"no held-out text is long enough for head 2, which predicts 3 tokens ahead: take"
    with pytest.raises(TrainingError, match=message):
        heldout_losses(model, [batch_of(3)])


def test_heldout_losses_that_are_no_numbers(model):
    with torch.no_grad():
        model.heads[1].mlp.w1.weight[0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"the held-out losses of the heads are \[\d.*nan"):
        heldout_losses(model, [batch_of(8)])
