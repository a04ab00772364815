"""Self-speculative sampling has the distribution of the model, counted on a tiny vocabulary."""

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare

from wmtp_modules.generation import sampling, self_speculative
from wmtp_modules.generation.generate import Request, generate
from wmtp_modules.generation.sampling import next_token_probs
from wmtp_modules.generation.self_speculative import count_kept
from wmtp_modules.models import mtp_llama2

N, PROMPT = 3000, (1, 5, 2, 7)
SAMPLING = dict(temperature=1.5, top_k=4, top_p=0.95)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = mtp_llama2(
        vocab_size=8,
        num_layers=6,
        n_future_tokens=4,
        num_heads=2,
        num_kv_heads=2,
        embed_dim=16,
        max_seq_len=16,
        intermediate_dim=32,
    )
    with torch.no_grad():  # random weights: context must matter, or a wrong rule would not show
        for block in (*model.layers, *model.heads):
            for p in block.parameters():
                p.mul_(1.5)
        model.output.proj.weight.mul_(3)
    return model


@torch.no_grad()
def exact_probabilities(model):
    """Probability of each sequence of three tokens, by whole forwards."""
    sequences = list(itertools.product(range(8), repeat=3))
    tokens_BT = torch.tensor([[*PROMPT, *sequence] for sequence in sequences])
    logits_BTV = model(tokens_BT)[:, len(PROMPT) - 1 : -1, 0]
    probs_BTV = next_token_probs(logits_BTV, **SAMPLING)
    drawn_BT = probs_BTV.gather(2, tokens_BT[:, len(PROMPT) :, None])[..., 0]
    return dict(zip(sequences, drawn_BT.prod(1).tolist(), strict=True))


def sample(model, first_seed):
    tokenizer = SimpleNamespace(eos_id=-1, decode=lambda ids: "")
    return generate(
        model,
        tokenizer,
        [Request(PROMPT, first_seed + i) for i in range(N)],
        batch_size=1000,  # rows enter three times
        decoding="self_speculative",
        max_new_tokens=3,
        stop=(),
        dtype=torch.float32,
        **SAMPLING,
    )


def p_value(model, generations):
    """Chi-square against the exact probabilities; sequences that are rare share a cell."""
    counts = Counter(tuple(g.tokens) for g in generations)
    expected = {s: N * p for s, p in exact_probabilities(model).items()}
    common = [s for s, n in expected.items() if n >= 5]
    assert len(common) > 20
    observed = [counts[s] for s in common]
    wanted = [expected[s] for s in common]
    return chisquare([*observed, N - sum(observed)], [*wanted, N - sum(wanted)]).pvalue


@pytest.mark.parametrize("first_seed", [0, 10_000])
def test_sampling_is_distribution_exact(model, first_seed):
    generations = sample(model, first_seed)
    kept = sum(g.accepted[0] for g in generations) / N
    assert 0.15 < kept < 0.85  # else the rule would not matter
    exact = exact_probabilities(model)
    assert all(exact[tuple(g.tokens)] > 0 for g in generations)  # what the filters cut
    assert p_value(model, generations) > 0.01


@pytest.mark.parametrize("broken", ["every_guess", "the_likeliest"])
def test_a_wrong_rule_would_be_seen(model, monkeypatch, broken):
    """Keep every guess; or keep a guess that is head 0's likeliest token, whatever it draws."""
    likeliest_BS = None

    def draw_tokens(logits_BSV, *args, **kwargs):
        nonlocal likeliest_BS
        likeliest_BS = logits_BSV.argmax(-1)
        return sampling.draw_tokens(logits_BSV, *args, **kwargs)

    def kept(fed_BS, draws_BS):
        return count_kept(fed_BS, likeliest_BS if broken == "the_likeliest" else fed_BS.roll(-1, 1))

    monkeypatch.setattr(self_speculative, "draw_tokens", draw_tokens)
    monkeypatch.setattr(self_speculative, "count_kept", kept)
    assert p_value(model, sample(model, 0)) < 1e-6
