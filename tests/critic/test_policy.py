"""Rows, packs and the scale of the weights that train a policy; every error."""

import errno
import json
import logging

import datasets
import numpy as np
import pytest
import torch

from wmtp_modules.critic import policy
from wmtp_modules.critic.page import page_caption, shown_rows
from wmtp_modules.critic.policy import (
    check_marks,
    log_raw_of,
    policy_packs,
    policy_rows,
    weight_scale,
)
from wmtp_modules.critic.rewards import Responses
from wmtp_modules.data.packing import collate
from wmtp_modules.loss.mtp_loss import IGNORE_INDEX, mtp_labels
from wmtp_modules.run.watchdog import Watchdog
from wmtp_modules.scoring.score_table import ScoreTable, compute_scores
from wmtp_modules.weighting.advantage import ADVANTAGES, SCALED, CriticWeighting, advantages

K, T = 3, 40


def make_responses(seed=0, n=30, good=None):
    """Rows of any length, some without a prompt, one without a response."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T - 5, n)
    prompts = [int(rng.integers(0, length + 1)) for length in lengths]
    rows = datasets.Dataset.from_dict(
        {
            "tokens": [rng.integers(1, 64, length).tolist() for length in lengths],
            "keep": [[u >= s for u in range(n)] for n, s in zip(lengths, prompts, strict=True)],
            "noise": [(rng.random(length) < 0.3).tolist() for length in lengths],
        }
    )
    good = (rng.random(n) < 0.4).astype(float) if good is None else good
    return Responses(rows, 2 * good - 1, good)


@pytest.fixture
def responses():
    return make_responses()


FINGERPRINT = dict(
    checkpoint="c", tokenizer="t", dataset="d", max_seq_len=T, kind="values", n_heads=1
)


def table_of(folder, responses, value):
    """A table with ``value(tokens)`` of each row."""
    score = lambda batch: [np.asarray(value(tokens), np.float32) for tokens in batch]  # noqa: E731
    compute_scores(folder, FINGERPRINT, responses.rows, score, batch_tokens=999)
    return ScoreTable.open(folder, FINGERPRINT, responses.rows)


def of_tokens(tokens):
    return 0.02 + 0.9 * np.cumsum(tokens) % 7 / 8


@pytest.fixture
def scaled(gloo_group, responses, tmp_path):
    """scaled(weighting, responses, chosen, value) -> (packs, scale), the table in tmp_path."""

    def go(weighting, responses=responses, chosen=None, value=of_tokens, values="v"):
        chosen = np.arange(len(responses.rows)) if chosen is None else chosen
        table = table_of(tmp_path, responses, value)
        packs = policy_packs(responses, chosen, max_seq_len=T, seed=0, table=table)
        scale = weight_scale(
            *(packs, responses, chosen, weighting),
            n_heads=K,
            device=torch.device("cpu"),
            watchdog=Watchdog(300, tmp_path),
            source=(tmp_path, {"critic": values}),
        )
        return packs, scale

    return go


def weights_of(packs, weighting, scale):
    """Weights and masks of all packs, a pack at a time as in training."""
    for i in range(len(packs)):
        batch = collate([packs[i]])
        mask = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], K) != IGNORE_INDEX
        log_raw = log_raw_of(batch, weighting, scale)
        weights, _ = weighting(None, mask, batch["doc"], log_raw, step=i, scale_K=scale["scale_K"])
        yield batch, mask, weights


@pytest.mark.parametrize("advantage", SCALED)
def test_the_mean_over_all_rows_is_one_and_not_that_of_a_pack(scaled, advantage):
    weighting = CriticWeighting(advantage=advantage, w_max=1.7)
    packs, scale = scaled(weighting)
    parts = list(weights_of(packs, weighting, scale))
    for k in range(K):
        every = torch.cat([weights[..., k][mask[..., k]] for _, mask, weights in parts])
        assert every.double().mean().item() == pytest.approx(1, abs=1e-6)
        assert (every == 1.7).any() or advantage == "gated"
    means = [weights.sum() / mask.sum() for _, mask, weights in parts if mask.any()]
    assert max(means) > min(means) + 0.01


def test_oracle_is_scaled_over_the_rows_too(scaled):
    weighting = CriticWeighting("oracle")
    packs, scale = scaled(weighting)
    parts = list(weights_of(packs, weighting, scale))
    for k in range(K):
        every = torch.cat([weights[..., k][mask[..., k]] for _, mask, weights in parts])
        assert every.double().mean().item() == pytest.approx(1, abs=1e-6)
        assert len(every.unique()) == 2


def test_the_statistics_are_of_all_response_tokens(scaled, responses):
    for advantage, lam in (("gae", 0.9), ("td", 0.0)):
        packs, scale = scaled(CriticWeighting(advantage=advantage, lam=0.9))
        every = []
        for i in range(len(packs)):
            one = collate([packs[i]])
            a = advantages(one["values"], one["reward"], one["keep"], one["doc"], lam=lam)
            mask = mtp_labels(one["tokens"], one["keep"], one["doc"], 1) != IGNORE_INDEX
            every.append(a[:, 1:][mask[:, :-1, 0]])
        every = torch.cat(every)
        want = [every.mean().item(), every.std(correction=0).item()]
        assert scale["statistics"] == pytest.approx(want)
        assert scale["scale_K"] is None


def test_the_floor_is_a_tenth_of_the_mean_of_f(scaled, responses):
    _, scale = scaled(CriticWeighting(advantage="relative"))
    assert scale["floor"] == pytest.approx(0.1 * responses.good.mean())


@pytest.mark.parametrize("advantage", SCALED)
def test_equal_values_weigh_exactly_one(scaled, advantage):
    weighting = CriticWeighting(advantage=advantage, strength=0.7)
    packs, scale = scaled(weighting, value=lambda tokens: np.full(len(tokens), 0.3))
    for _, mask, weights in weights_of(packs, weighting, scale):
        assert torch.equal(weights, mask.float())


def solved(monkeypatch):
    """Calls of ``solve_scale`` and of ``_statistics`` from now on."""
    calls = []
    for name in ("solve_scale", "_statistics"):
        original = getattr(policy, name)
        monkeypatch.setattr(
            policy, name, lambda *a, _of=original, **k: calls.append(1) or _of(*a, **k)
        )
    return calls


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_the_scale_is_found_once(scaled, monkeypatch, tmp_path, advantage):
    """Its file is beside the values, and the same for a control under another name."""
    _, first = scaled(CriticWeighting(advantage=advantage))
    calls = solved(monkeypatch)
    _, again = scaled(CriticWeighting(advantage=advantage))
    _, control = scaled(CriticWeighting("shuffled", advantage=advantage, strength=0.5))
    assert first == again == control
    assert not calls
    (path,) = tmp_path.glob("scale-*.json")
    for damaged in ("", "{}", path.read_text()[:-40], path.read_text().replace("statist", "x")):
        path.write_text(damaged)
        assert scaled(CriticWeighting(advantage=advantage))[1] == first
        assert json.loads(path.read_text())["scale"] == first
    assert len(calls) == 4


def test_another_scale_for_whatever_it_depends_on(scaled, responses, monkeypatch):
    weighting = CriticWeighting()
    scaled(weighting)
    calls = solved(monkeypatch)
    n = len(responses.rows)
    unlike_keep = [[u >= 1 for u in range(len(row))] for row in responses.rows["keep"]]
    other_keep = Responses(
        responses.rows.remove_columns("keep").add_column("keep", unlike_keep),
        responses.rewards,
        responses.good,
    )
    for i, changed in enumerate(
        (
            dict(weighting=CriticWeighting(advantage="ratio")),
            dict(weighting=CriticWeighting(w_max=3.0)),
            dict(weighting=CriticWeighting(w_min=0.1)),
            dict(chosen=np.arange(n - 1)),
            dict(values="another critic's"),
            dict(responses=Responses(responses.rows, responses.rewards, responses.good * 0.9)),
            dict(responses=other_keep),
        )
    ):
        scaled(**{"weighting": weighting, **changed})
        assert len(calls) == i + 1, changed
    scaled(weighting)
    assert len(calls) == 7


def test_values_of_another_user_are_of_use_though_nothing_can_be_written(
    scaled, monkeypatch, caplog
):
    def refuse(path):
        raise OSError(errno.EACCES, f"{path} could not be written (Permission denied)")

    monkeypatch.setattr(policy, "new_file", refuse)
    with caplog.at_level(logging.WARNING):
        _, scale = scaled(CriticWeighting())
    assert scale["scale_K"]
    assert "is found again by each run" in caplog.text
    full = OSError(errno.ENOSPC, "no space")
    monkeypatch.setattr(policy, "new_file", lambda path: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="no space"):
        scaled(CriticWeighting())


def test_uniform_needs_nothing(scaled, tmp_path):
    _, scale = scaled(CriticWeighting("uniform"))
    assert scale["scale_K"] is None
    assert not list(tmp_path.glob("scale-*"))


def test_a_scale_out_of_reach_says_what_to_do(scaled):
    nothing = lambda tokens: np.where(np.arange(len(tokens)) % 9 == 8, 0.5, 0.0)  # noqa: E731
    with pytest.raises(ValueError, match=r"raw weight of 0.*raise weighting\.w_max above"):
        scaled(CriticWeighting(w_max=1.5), value=nothing)


@pytest.mark.parametrize("name", ["critic", "oracle"])
def test_separate_runs_are_an_error_that_names_the_row(scaled, responses, name):
    keep = responses.rows["keep"][:]
    row = next(i for i, k in enumerate(keep) if sum(k[1:]) > 5)
    keep[row][-3] = False
    rows = responses.rows.remove_columns("keep").add_column("keep", keep)
    with pytest.raises(ValueError, match=f"row {row} of the data set has (2 )?separate runs"):
        scaled(CriticWeighting(name), Responses(rows, responses.rewards, responses.good))


# -------------------------------------------------------------------------------- rows


def test_validation_is_on_good_responses_whatever_trains(responses):
    heldout = make_responses(seed=1)
    good = np.flatnonzero(heldout.good)
    for above, n in ((None, len(responses.rows)), (0.0, int(responses.good.sum()))):
        chosen, chosen_val = policy_rows(responses, heldout, above)
        assert len(chosen) == n
        assert np.array_equal(chosen_val, good)
    plain = Responses(responses.rows), Responses(heldout.rows)
    assert [len(x) for x in policy_rows(*plain, None)] == [30, 30]


def test_rows_that_are_not_there(responses):
    with pytest.raises(ValueError, match=r"policy_rewards_above 7.0 leaves none of 30 training"):
        policy_rows(responses, responses, 7.0)
    bad = make_responses(good=np.zeros(30))
    with pytest.raises(ValueError, match="none of the 30 responses of dataset_val is good"):
        policy_rows(responses, bad, None)


def test_oracle_needs_marks(responses):
    check_marks(responses.rows)
    unmarked = responses.rows.remove_columns("noise")
    nowhere = [[False] * len(row) for row in responses.rows["noise"]]
    for rows in (unmarked, unmarked.add_column("noise", nowhere)):
        with pytest.raises(ValueError, match="no row of this data set has a mark"):
            check_marks(rows)


# -------------------------------------------------------------------------------- page


def test_the_page_shows_pairs_or_else_good_and_bad_responses_in_turn(responses):
    pairs = np.array([[3, 4], [5, 6], [7, 8]])
    assert shown_rows(responses, pairs, 2).tolist() == [3, 4, 5, 6]
    found = shown_rows(responses, np.zeros((0, 2), np.int64), 4)
    assert responses.good[found].tolist() == [1, 0] * 4
    few = make_responses(good=np.array([1.0] + [0.0] * 29))
    assert few.good[shown_rows(few, pairs[:0], 4)].tolist() == [1, 0, 0, 0, 0]


def test_the_caption_tells_weightings_apart():
    captions = {page_caption(CriticWeighting(advantage=a), "critic x") for a in ADVANTAGES}
    captions.add(page_caption(CriticWeighting(w_max=3.0), "critic x"))
    captions.add(page_caption(CriticWeighting(advantage="gae", lam=0.1), "critic x"))
    assert len(captions) == len(ADVANTAGES) + 2
