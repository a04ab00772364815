"""Held-out losses that cannot be had are an error that says why; epochs and shares are counted."""

import pytest
import torch

from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.sharding import init_weights_
from wmtp_modules.run.figures import Share, TrainingError, epoch_lines, heldout_losses


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


class Data:
    """59,213 packs, 2.3 % padding: CodeContests as large as it can be."""

    max_seq_len, n_tokens, padding_share = 4096, 236_918_528, 0.0231

    def __len__(self):
        return 59_213


class SmallData(Data):
    def __len__(self):
        return 3


def test_a_run_says_how_many_epochs_it_makes():
    said, many = epoch_lines(Data(), 59_200, 64, 2_000, 0)
    assert said == (
        "The data are 236,918,528 tokens in 59,213 packs of 4,096, 2.31% padding. An epoch "
        "takes 59,200 packs, a step 64: 2,000 steps are 2.2 epochs."
    )
    assert not many
    said, _ = epoch_lines(Data(), 59_200, 64, 2_000, 925)
    assert said.endswith("2,000 steps are 2.2 epochs, of which 1.0 are done.")


def test_more_than_four_epochs_are_warned_of():
    assert epoch_lines(Data(), 59_200, 64, 3_700, 0)[1] == ""
    said, many = epoch_lines(Data(), 59_200, 64, 3_701, 0)
    assert many == (
        "That is more than 4 epochs, beyond which repeated data teach little: set max_steps to at "
        "most 3,700, or add data."
    )
    assert "3,701 steps are 4.0 epochs" in said
    assert epoch_lines(Data(), 59_200, 64, 13_000, 0)[0].endswith("13,000 steps are 14.1 epochs.")
    small = epoch_lines(SmallData(), 2, 16, 1, 0)  # not one whole step
    assert small[0].endswith("An epoch takes 2 packs, a step 16: 1 steps are 8.0 epochs.")
    assert small[1].endswith("teach little: add data.")


def test_a_share_is_of_what_was_counted_since():
    share = Share()
    assert share.since_last() is None
    assert share.in_all() is None
    for so in (True, False, False, True):
        share.add(so)
    assert share.since_last() == 0.5
    assert share.since_last() is None
    share.add(False)
    again = Share()
    again.load_state_dict(share.state_dict())
    for one in (share, again):
        one.add(True)
        one.add(True)
        assert one.since_last() == pytest.approx(2 / 3)
        assert one.in_all() == pytest.approx(4 / 7)
