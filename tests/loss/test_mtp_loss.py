import pytest
import torch

from wmtp_modules.loss.mtp_loss import head_alphas, mtp_labels, shift_to_heads


def test_labels_equal_the_definition_position_by_position():
    """M[b,t,k] = (u < T) and keep[b,u] and doc[b,u] == doc[b,t] with u = t + k + 1."""
    generator = torch.Generator().manual_seed(0)
    B, T, K = 3, 17, 4
    tokens = torch.randint(100, (B, T), generator=generator)
    keep = torch.rand(B, T, generator=generator) < 0.7
    doc = torch.tensor(
        [[0] * 17, [0] * 3 + [1] * 1 + [2] * 6 + [-1] * 7, [0] * 8 + [1] * 9], dtype=torch.long
    )
    keep &= doc >= 0
    labels = mtp_labels(tokens, keep, doc, K)
    for b in range(B):
        for t in range(T):
            for k in range(K):
                u = t + k + 1
                valid = u < T and bool(keep[b, u]) and doc[b, u] == doc[b, t]
                assert labels[b, t, k] == (tokens[b, u] if valid else -100)


def test_packed_labels_equal_the_documents_own():
    tokens = torch.arange(10).view(1, 10)
    keep = torch.ones(1, 10, dtype=torch.bool)
    packed = mtp_labels(tokens, keep, torch.tensor([[0] * 6 + [1] * 4]), 4)
    alone = [
        mtp_labels(part, keep[:, : part.shape[1]], torch.zeros_like(part), 4)
        for part in (tokens[:, :6], tokens[:, 6:])
    ]
    assert torch.equal(packed, torch.cat(alone, dim=1))


def test_row_shorter_than_the_heads_look_ahead():
    labels = mtp_labels(
        torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2).long(), 4
    )
    assert labels.tolist() == [[[6, -100, -100, -100], [-100] * 4]]


def test_shift_keeps_trailing_fill():
    shifted = shift_to_heads(torch.tensor([[1.0, 2.0, 3.0]]), 2, float("nan"))
    assert shifted[0, :, 0].tolist()[:2] == [2.0, 3.0]
    assert shifted[0, 0, 1] == 3.0
    assert shifted[0, 1:, 1].isnan().all()


@pytest.mark.parametrize("decay", [1.0, 0.6])
def test_alphas(decay):
    alphas = head_alphas(4, decay)
    assert alphas.sum() == pytest.approx(1.0)
    assert (alphas[1:] / alphas[:-1]).tolist() == pytest.approx([decay] * 3)
