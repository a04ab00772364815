"""Tokens per forward of a validation against those of the decoder, on what it has decoded."""

import copy
from functools import cache

import datasets
import numpy as np
import pytest
import torch

from wmtp_modules.data.loader import heldout_batches
from wmtp_modules.data.packing import PackedDataset
from wmtp_modules.generation.generate import Request, generate
from wmtp_modules.loss.mtp_loss import mtp_labels
from wmtp_modules.run.acceptance import kept_guesses, verified_positions
from wmtp_modules.run.figures import heldout_figures, heldout_losses

N_TOKENS, MORE = 60, 8  # compared, and written beyond so that the last guesses have targets


@pytest.fixture(scope="module")
def model(trained_model):
    """In float64: logits of a forward with caches and of one without may not swap places."""
    return copy.deepcopy(trained_model).double().eval()


@pytest.fixture(scope="module")
def decoded(model, tokenizer):
    """decoded(n) -> (prompt, what the decoder makes of it in at most n tokens) of 40 prompts."""
    rng = np.random.default_rng(0)
    prompts = [(1, *rng.integers(3, 512, 2 + i % 9).tolist()) for i in range(40)]

    @cache
    def decode(n):
        requests = [Request(prompt, 0) for prompt in prompts]
        how = dict(temperature=0.0, top_p=1.0, top_k=0, stop=(), dtype=torch.float64)
        how |= {"decoding": "self_speculative", "max_new_tokens": n}
        return list(zip(prompts, generate(model, tokenizer, requests, **how), strict=True))

    return decode


@torch.no_grad()
def test_block_by_block_it_is_the_decoder(model, decoded):
    """Exactly the decoder's forwards, and how many guesses of each head it kept."""
    seen, compared = set(), 0
    for (prompt, done), (_, longer) in zip(
        decoded(N_TOKENS), decoded(N_TOKENS + MORE), strict=True
    ):
        if len(longer.tokens) < N_TOKENS + MORE:
            continue
        tokens_BT = torch.tensor([[*prompt, *longer.tokens]])
        keep_BT = torch.arange(tokens_BT.shape[1])[None] >= len(prompt)
        labels_BTK = mtp_labels(tokens_BT, keep_BT, torch.zeros_like(tokens_BT), 4)
        _, choices_BTK = model(tokens_BT, labels_BTK, with_choices=True)
        kept_BT = kept_guesses(choices_BTK, labels_BTK)
        forwards, accepted = 0, [0, 0, 0]
        for t in verified_positions(kept_BT)[0].nonzero().flatten().tolist():
            left = N_TOKENS - 1 - (t - (len(prompt) - 1))
            if left <= 0:
                break
            kept = int(kept_BT[0, t])
            seen.add(kept)
            forwards += 1
            for j in range(min(kept, left - 1)):  # the decoder stops within the last block
                accepted[j] += 1
        assert (forwards, accepted) == (done.forwards, done.accepted)
        compared += 1
    assert compared >= 10
    assert seen == {0, 1, 2, 3}


@torch.no_grad()
def test_heads_that_train_apart_choose_alike(model):
    apart = copy.deepcopy(model)
    apart.set_extra_heads("isolated")
    tokens_BT = torch.randint(3, 512, (2, 30), generator=torch.Generator().manual_seed(0))
    every = torch.ones_like(tokens_BT).bool()
    labels_BTK = mtp_labels(tokens_BT, every, torch.zeros_like(tokens_BT), 4)
    losses_BTK, choices_BTK = apart(tokens_BT, labels_BTK, with_choices=True)
    logits_BTKV = model(tokens_BT)
    assert choices_BTK.equal(logits_BTKV.argmax(-1))
    torch.testing.assert_close(losses_BTK, model(tokens_BT, labels_BTK))


@pytest.mark.usefixtures("gloo_group")
def test_a_validation_gives_what_the_decoder_gives_within_its_error(model, tokenizer, decoded):
    """Packed rows in which a prompt is not supervised, some ended by EOS; sums over batches."""
    written = decoded(N_TOKENS + MORE)
    rows = [
        {
            "tokens": [*prompt, *done.tokens],
            "keep": [False] * len(prompt) + [True] * len(done.tokens),
        }
        for prompt, done in written
    ]
    data = PackedDataset(datasets.Dataset.from_list(rows), max_seq_len=192, seed=0)
    batches = list(heldout_batches(data, 4, 0, 1, torch.device("cpu")))
    losses, found = heldout_figures(model, batches, tokenizer)
    assert losses == heldout_losses(model, batches)

    new = np.array([len(done.tokens) - 1 for _, done in written], float)
    forwards = np.array([done.forwards for _, done in written], float)
    ratio = new.sum() / forwards.sum()
    # Standard error of a ratio of sums over texts.
    error = np.sqrt(((new - ratio * forwards) ** 2).sum()) / forwards.sum()
    assert error < 0.1
    assert found["tokens_per_forward"] == pytest.approx(ratio, abs=2 * error)
    accepted = np.array([done.accepted for _, done in written]).sum(0) / forwards.sum()
    assert found["per_head"] == pytest.approx(accepted, abs=2 * error)
    # The mean over all positions, which an evaluation calls acceptance length, is another figure.
    assert found["acceptance_length"] > ratio + 2 * error
