"""Figures that cannot be had are an error or left out; epochs and shares are counted."""

import pytest
import torch

from wmtp_modules.loss.mtp_loss import IGNORE_INDEX, head_alphas, mtp_labels
from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.sharding import init_weights_
from wmtp_modules.run.figures import (
    Share,
    TrainingError,
    epoch_lines,
    heldout_losses,
    mean_of_heads,
    step_metrics,
)
from wmtp_modules.weighting.token_weighting import TokenWeighting


@pytest.fixture
def model(tiny_model_args, gloo_group):
    model = mtp_llama2(**tiny_model_args)
    init_weights_(model, 0)
    return model


def batch_of(length):
    """One document of some tokens in a row of eight."""
    doc = torch.where(torch.arange(8) < length, 0, -1)[None]
    tokens = torch.arange(8)[None]
    return {
        "tokens": tokens,
        "doc": doc,
        "keep": doc >= 0,
        "input_pos": tokens,
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


def figures_of(lengths, losses_K):
    """What a step logs under uniform weights: documents of some lengths, each head's own loss."""
    T = max(lengths)
    doc_BT = torch.stack([torch.where(torch.arange(T) < n, 0, -1) for n in lengths])
    labels_BTK = mtp_labels(doc_BT.clamp(min=0), doc_BT >= 0, doc_BT, len(losses_K))
    mask_BTK = labels_BTK != IGNORE_INDEX
    _, stats = TokenWeighting("uniform")(None, mask_BTK, doc_BT, None, step=0)
    loss_K = torch.tensor(losses_K).double() * mask_BTK.sum((0, 1))
    alphas_K = head_alphas(len(losses_K), 1.0).double()
    sums = {
        "n_K": mask_BTK.sum((0, 1)).double(),
        "loss_K": loss_K,
        "objective": (alphas_K * loss_K).sum(),
        "noise": torch.zeros(4).double(),
    }
    return step_metrics(sums, stats, alphas_K)


def test_a_head_without_targets_has_no_figures():
    found = figures_of([2, 3], [4.0, 6.0, 100.0, 100.0])
    assert {name for name in found if "_head_" in name} == {
        *(f"loss_head_{k}" for k in (0, 1)),
        *(
            f"weight_{n}_head_{k}"
            for n in ("mean", "ess", "selected", "at_min", "at_max", "low", "high")
            for k in (0, 1)
        ),
    }
    # 3 targets of head 0 and 1 of head 1: means over heads are means over targets.
    assert found["loss"] == pytest.approx((3 * 4 + 6) / 4)
    assert found["ess"] == found["selected_share"] == 1
    assert figures_of([9, 9], [4.0, 6.0, 7.0, 8.0])["loss_head_3"] == 8


def test_a_step_without_targets_has_no_figures():
    assert figures_of([1, 1], [4.0, 6.0]) == {}


def test_mean_of_heads_counts_targets():
    assert mean_of_heads(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([3, 1, 0])) == 1.25
    assert mean_of_heads(torch.tensor([torch.nan]), torch.tensor([0])) is None


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
