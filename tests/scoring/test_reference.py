"""Reference losses land on the token and head they belong to."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from wmtp_modules.data.packing import PackedDataset, collate
from wmtp_modules.loss.mtp_loss import mtp_labels
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.attention_mask import document_mask
from wmtp_modules.scoring.reference import (
    align_reference,
    beside_model,
    packed_losses,
    reference_losses,
    said_of,
    score_rows,
)
from wmtp_modules.scoring.score_table import ScoreTable, compute_scores
from wmtp_modules.weighting.rho1 import excess_scores
from wmtp_modules.weighting.token_weighting import TokenWeighting

ROW_IDS = [[3], list(range(12))]  # one document alone, and several to a pack


def make_model(args, **changes):
    torch.manual_seed(0)
    return mtp_llama2(**{**args, **changes})


@pytest.fixture
def next_token_args(tiny_model_args):
    return {**tiny_model_args, "num_layers": 3, "n_future_tokens": 1}


def make_rows(n=12, seed=0):
    random = np.random.default_rng(seed)
    tokens = [random.integers(0, 512, random.integers(1, 30)).tolist() for _ in range(n)]
    keep = [[bool(u >= len(row) // 3) for u in range(len(row))] for row in tokens]
    return Dataset.from_dict({"tokens": tokens, "keep": keep})


def packed(rows, row_ids, scores):
    """A batch of the named rows, packed, with its attention mask."""
    packs = PackedDataset(
        rows.select(row_ids),
        max_seq_len=64,
        seed=0,
        scores={"reference": [scores[row] for row in row_ids]},
    )
    batch = collate([packs[i] for i in range(len(packs))])
    return batch | {"mask": document_mask(batch["doc"])}


def table_of(tmp_path, model, rows, kind):
    fingerprint = dict(
        checkpoint="c",
        tokenizer="t",
        dataset="d",
        max_seq_len=64,
        kind=kind,
        n_heads=model.n_future_tokens,
    )
    compute_scores(
        tmp_path,
        fingerprint,
        rows,
        lambda batch: score_rows(model, batch),
        batch_tokens=64,
        part_rows=5,
    )
    return ScoreTable.open(tmp_path, fingerprint, rows)


def test_next_token_losses_sit_at_their_target(next_token_args):
    model = make_model(next_token_args)
    tokens_BT = torch.arange(20).view(2, 10) * 7
    doc_BT = torch.tensor([[0] * 10, [0] * 6 + [-1] * 4])
    q_BT = reference_losses(model, tokens_BT, doc_BT)
    logits_BTV = model(tokens_BT)[:, :, 0].detach()
    for b, length in ((0, 10), (1, 6)):
        expected = torch.nn.functional.cross_entropy(
            logits_BTV[b, : length - 1], tokens_BT[b, 1:length], reduction="none"
        )
        torch.testing.assert_close(q_BT[b, 1:length], expected)
        assert q_BT[b, 0].isnan()
        assert q_BT[b, length:].isnan().all()


def test_scoring_leaves_mode_and_gradients_alone(next_token_args):
    model = make_model(next_token_args).train()
    losses_BT = reference_losses(
        model, torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64)
    )
    assert model.training
    assert not losses_BT.requires_grad


@pytest.mark.parametrize("heads", [1, 4])
def test_batched_scores_equal_each_row_alone(tiny_model_args, heads):
    model = make_model(tiny_model_args, n_future_tokens=heads)
    rows = [np.array(tokens) for tokens in make_rows()["tokens"]]
    for together, row in zip(score_rows(model, rows), rows, strict=True):
        (alone,) = score_rows(model, [row])
        assert together.shape == ((len(row),) if heads == 1 else (len(row), heads))
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row_ids", ROW_IDS, ids=str)
def test_mtp_reference_equal_to_the_model_has_no_excess(tmp_path, tiny_model_args, row_ids):
    model, rows = make_model(tiny_model_args), make_rows()
    batch = packed(rows, row_ids, table_of(tmp_path, model, rows, "mtp"))
    tokens_BT, doc_BT = batch["tokens"], batch["doc"]
    labels_BTK = mtp_labels(tokens_BT, batch["keep"], doc_BT, 4)
    mask_BTK = labels_BTK != -100
    attention = {"mask": batch["mask"], "input_pos": batch["input_pos"]}
    losses_BTK = model(tokens_BT, labels_BTK, **attention)
    reference_BTK = align_reference(batch["reference"], 4, mask_BTK)
    assert (mask_BTK.sum((0, 1)) > 0).all()
    assert excess_scores(losses_BTK, reference_BTK)[mask_BTK].abs().max() < 1e-5
    # online: the same figures from the packed row
    online = reference_losses(model, tokens_BT, doc_BT, **attention)
    torch.testing.assert_close(online, batch["reference"], equal_nan=True)


@pytest.mark.parametrize("row_ids", ROW_IDS, ids=str)
def test_next_token_table_lines_up_with_every_head(tmp_path, row_ids):
    """With losses and reference both a function of the target token alone, excess is zero."""
    rows = make_rows()
    fingerprint = dict.fromkeys(("checkpoint", "tokenizer", "dataset", "max_seq_len", "kind"), "x")
    fingerprint["n_heads"] = 1

    def f(tokens):
        return torch.sin(tokens.float() * 1.3) + tokens / 100

    def score(batch):
        scores = [f(torch.from_numpy(row)).numpy() for row in batch]
        for row_scores in scores:
            row_scores[0] = np.nan
        return scores

    compute_scores(tmp_path, fingerprint, rows, score, batch_tokens=64, part_rows=5)
    batch = packed(rows, row_ids, ScoreTable.open(tmp_path, fingerprint, rows))
    labels_BTK = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], 4)
    mask_BTK = labels_BTK != -100
    losses_BTK = torch.where(mask_BTK, f(labels_BTK), 0.0)
    reference_BTK = align_reference(batch["reference"], 4, mask_BTK)
    assert (mask_BTK.sum((0, 1)) > 0).all()
    assert (excess_scores(losses_BTK, reference_BTK)[mask_BTK] == 0).all()
    # and so all tokens tie: the soft weights are all 1
    weighting = TokenWeighting("rho1", selection="soft")
    weights_BTK, _ = weighting(losses_BTK, mask_BTK, batch["doc"], reference_BTK, step=0)
    torch.testing.assert_close(weights_BTK, mask_BTK.float())


@pytest.mark.parametrize("row_ids", ROW_IDS, ids=str)
def test_packed_online_reference_equals_the_table(tmp_path, next_token_args, row_ids):
    model, rows = make_model(next_token_args), make_rows()
    batch = packed(rows, row_ids, table_of(tmp_path, model, rows, "ntp"))
    online_BT = reference_losses(
        model, batch["tokens"], batch["doc"], mask=batch["mask"], input_pos=batch["input_pos"]
    )
    torch.testing.assert_close(online_BT, batch["reference"], equal_nan=True)


def test_an_mtp_reference_may_have_more_heads_but_not_fewer():
    reference_BTK = torch.randn(2, 8, 4)
    assert torch.equal(align_reference(reference_BTK, 2), reference_BTK[..., :2])
    with pytest.raises(ValueError, match="the MTP reference has 4 heads, the model 5"):
        align_reference(reference_BTK, 5)


def test_a_target_without_reference_is_refused():
    q_BT = torch.tensor([[torch.nan, 1.0, torch.nan, 2.0]])
    mask_BTK = torch.tensor([[True, False, True, False]])[..., None]
    align_reference(q_BT, 1, mask_BTK)
    mask_BTK[0, 1] = True
    with pytest.raises(ValueError, match="1 supervised targets of the batch have no reference"):
        align_reference(q_BT, 1, mask_BTK)


@pytest.mark.parametrize("row_ids", ROW_IDS, ids=str)
@pytest.mark.parametrize("heads", [1, 4])
def test_packed_losses_are_those_of_each_heads_targets(tmp_path, tiny_model_args, heads, row_ids):
    """For a model of three heads: its labels, the table's losses, and 0 without a target."""
    model, rows = make_model(tiny_model_args, n_future_tokens=heads), make_rows()
    batch = packed(rows, row_ids, table_of(tmp_path, model, rows, "x"))
    losses_BTK, labels_BTK = packed_losses(model, batch, 3)
    expected_BTK = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], 3)
    assert torch.equal(labels_BTK, expected_BTK)
    mask_BTK = expected_BTK != -100
    assert mask_BTK.any()
    assert not mask_BTK.all()
    assert (losses_BTK[~mask_BTK] == 0).all()
    at = align_reference(batch["reference"], 3, mask_BTK)[mask_BTK]
    torch.testing.assert_close(losses_BTK[mask_BTK], at)


def test_what_is_said_of_a_reference_beside_the_model():
    """An equal head is not below. A next-token reference has a note where there are later heads."""
    model_K = [2.0, 3.0, 4.0]
    beside = beside_model(4, [1.9, 3.0, 4.5], model_K)
    assert (beside["kind"], beside["heads"], beside["not_below"]) == ("mtp", 4, [1, 2])
    (_, table), *warnings = said_of(beside)
    assert [line.split()[1:] for line in table.splitlines()[2:]] == [
        ["1.900", "3.000", "4.500"],
        ["2.000", "3.000", "4.000"],
    ]
    assert [(level, text[:6]) for level, text in warnings] == [(30, "Head 1"), (30, "Head 2")]
    assert all("train it longer or on cleaner data" in text for _, text in warnings)
    assert len(said_of(beside_model(4, [1.9, 2.9, 3.9], model_K))) == 1

    beside = beside_model(1, [2.5, 2.5, 2.5], model_K)
    assert (beside["kind"], beside["heads"], beside["not_below"]) == ("next-token", 1, [0])
    _, (level, note) = said_of(beside)
    assert level == 20
    assert "tells heads 1 to 2 to learn what they cannot know; one of 3 heads" in note
    assert "tells head 1 to" in said_of(beside_model(1, [2.5, 2.5], model_K[:2]))[1][1]
    assert len(said_of(beside_model(1, [2.5], model_K[:1]))) == 1


def test_a_broken_reference_is_refused(next_token_args):
    model = make_model(next_token_args)
    with torch.no_grad():
        model.output.proj.weight[3] = torch.nan
    with pytest.raises(ValueError, match="not finite in a row of 9 tokens"):
        score_rows(model, [np.arange(9)])
