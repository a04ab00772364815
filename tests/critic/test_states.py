"""What a critic reads, against the model's own logits."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from wmtp_modules.critic import states
from wmtp_modules.critic.judge import Judge
from wmtp_modules.critic.pairs import HeldoutPairs
from wmtp_modules.critic.rewards import Responses
from wmtp_modules.critic.states import RowStates, batch_of, set_feature_statistics_, trunk_states
from wmtp_modules.models.model_builders import mtp_llama2
from wmtp_modules.models.value_head import ValueHead, features
from wmtp_modules.run.watchdog import Watchdog


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    lengths = (9, 5, 2)
    return Dataset.from_dict(
        {
            "tokens": [rng.integers(0, 512, n).tolist() for n in lengths],
            "keep": [[u >= 2 for u in range(n)] for n in lengths],
        }
    )


@pytest.fixture
def model(tiny_model_args):
    torch.manual_seed(0)
    model = mtp_llama2(**tiny_model_args).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_surprise_is_of_the_heads_that_predicted_the_token(model, rows, monkeypatch):
    monkeypatch.setattr(states, "CHUNK_LOGITS_CPU", 512 * 7)  # several chunks
    batch = batch_of(rows, [0, 1, 2], torch.device("cpu"))
    hidden_BTD, surprise_BT3 = trunk_states(model, batch["tokens"])
    torch.testing.assert_close(hidden_BTD, model.trunk(batch["tokens"]))
    with torch.no_grad():
        log_p_BTKV = model(batch["tokens"]).log_softmax(-1)
    assert surprise_BT3[:, 0].isnan().all()
    assert surprise_BT3[:, 1, 2].isnan().all()
    for b, length in enumerate((9, 5, 2)):
        for u in range(1, length):
            token, log_p_V = batch["tokens"][b, u], log_p_BTKV[b, u - 1, 0]
            want = [-log_p_V[token], -(log_p_V.exp() * log_p_V).sum()]
            if u >= 2:
                want.append(-log_p_BTKV[b, u - 2, 1, token])
            torch.testing.assert_close(surprise_BT3[b, u, : len(want)], torch.stack(want))


def test_a_model_of_one_head_has_no_loss_of_head_1(tiny_model_args):
    torch.manual_seed(0)
    model = mtp_llama2(**tiny_model_args | {"n_future_tokens": 1}).eval()
    _, surprise_BT3 = trunk_states(model, torch.arange(8)[None])
    assert surprise_BT3[:, 1:, :2].isfinite().all()
    assert surprise_BT3[..., 2].isnan().all()


def test_features_are_standardised_over_the_tokens_asked(model, rows, gloo_group):
    head = ValueHead(model.args["embed_dim"], "state")
    states = RowStates(model, rows, torch.device("cpu"))
    set_feature_statistics_(head, states, [np.array([0, 1]), np.array([2])])
    batch = batch_of(rows, [0, 1, 2], torch.device("cpu"))
    found_BTE = features(*trunk_states(model, batch["tokens"]))
    asked = [(b, u) for b, n in enumerate((9, 5)) for u in range(1, n)]  # row 2 has no response
    for i in range(found_BTE.shape[-1]):
        x = torch.stack([found_BTE[b, u, i] for b, u in asked])
        x = x[x.isfinite()]
        assert head.mean[i].item() == pytest.approx(x.mean().item(), rel=1e-4, abs=1e-5)
        assert head.std[i].item() == pytest.approx(x.std(correction=0).item(), rel=1e-3)


@pytest.mark.parametrize("kept", [0, 2**30])
def test_states_are_the_same_kept_or_not_and_computed_once(model, rows, kept, monkeypatch):
    monkeypatch.setattr(states, "KEPT_BYTES", kept)
    monkeypatch.setattr(states, "GROUP", 2)
    calls, plain = [], trunk_states
    monkeypatch.setattr(
        states, "trunk_states", lambda model, tokens: calls.append(1) or plain(model, tokens)
    )
    of_rows = RowStates(model, rows, torch.device("cpu"))
    for indices in ([1, 0], [2, 0], [1]):
        batch, hidden_BTD, surprise_BT3 = of_rows(np.array(indices))
        want = plain(model, batch["tokens"])
        for got, wanted in zip((hidden_BTD, surprise_BT3), want, strict=True):
            is_token = batch["doc"] >= 0
            close = {"rtol": 1e-5, "atol": 1e-4, "equal_nan": True}  # of other batches
            torch.testing.assert_close(got[is_token], wanted[is_token], **close)
    assert len(calls) == (2 if kept else 3)  # groups, or batches


def test_a_head_that_is_not_finite_has_no_finite_heldout_loss(model, rows, gloo_group, tmp_path):
    responses = Responses(rows, good=np.array([1.0, 0.0, 0.0]))
    pairs = HeldoutPairs(np.array([[0, 1]]), "length")
    judge = Judge(
        model, responses, responses, pairs, objective="bce", watchdog=Watchdog(300, tmp_path)
    )
    head = ValueHead(model.args["embed_dim"], "state")
    assert np.isfinite(judge.heldout_loss(head))
    head.out.bias.data.fill_(torch.nan)
    assert np.isnan(judge.heldout_loss(head))
