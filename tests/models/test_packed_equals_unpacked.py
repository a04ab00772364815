"""A packed row gives each document the losses, and the model the gradients, it would have alone."""

import pytest
import torch
from datasets import Dataset

from wmtp_modules.data.packing import PackedDataset, collate
from wmtp_modules.loss.mtp_loss import head_alphas, mtp_labels
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.attention_mask import document_mask


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    lengths = [17, 5, 2, 30, 9, 1, 24, 11]
    return Dataset.from_dict(
        {
            "tokens": [torch.randint(512, (n,), generator=generator).tolist() for n in lengths],
            "keep": [[i >= n // 3 for i in range(n)] for n in lengths],
        }
    )


def gradients(model, batches):
    """Summed over batches and divided once by all targets, as a step does."""
    K = model.n_future_tokens
    model.zero_grad()
    n_prime = 0.0
    losses = {}
    for batch in batches:
        labels = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], K)
        losses_BTK = model(
            batch["tokens"],
            labels,
            mask=document_mask(batch["doc"]),
            input_pos=batch["input_pos"],
        )
        (head_alphas(K) * losses_BTK).sum().backward()
        n_prime += (head_alphas(K) * (labels != -100).sum((0, 1))).sum()
        for b, t in (batch["doc"] >= 0).nonzero().tolist():
            key = (int(batch["row"][b, t]), int(batch["input_pos"][b, t]))
            losses[key] = losses_BTK[b, t].detach()
    return losses, {name: p.grad / n_prime for name, p in model.named_parameters()}


def test_packed_equals_unpacked(rows, tiny_model_args):
    torch.manual_seed(0)
    model = mtp_llama2(**tiny_model_args)
    packed = PackedDataset(rows, max_seq_len=48, seed=0)
    assert len(packed) < len(rows)
    together = collate([packed[i] for i in range(len(packed))])
    alone = [
        collate([PackedDataset(rows.select([i]), max_seq_len=48, seed=0)[0]]) for i in range(8)
    ]
    for i, batch in enumerate(alone):  # each is row 0 of a data set of its own
        batch["row"][batch["row"] >= 0] = i

    losses, grads = gradients(model, [together])
    want_losses, want_grads = gradients(model, alone)
    assert losses.keys() == want_losses.keys()
    for key, want in want_losses.items():
        torch.testing.assert_close(losses[key], want, rtol=1e-5, atol=1e-6)
    for name, want in want_grads.items():
        assert (grads[name] - want).norm() <= 1e-5 * want.norm(), name
