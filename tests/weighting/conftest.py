import pytest
import torch


def make_packed_case(B=3, T=40, K=4, seed=0):
    """Packed rows with an unsupervised stretch; the mask is the one of multi-token prediction."""
    generator = torch.Generator().manual_seed(seed)
    doc_BT = (torch.rand(B, T, generator=generator) < 0.12).long().cumsum(1)
    doc_BT[:, -5:] = -1
    keep_BT = (torch.rand(B, T, generator=generator) < 0.8) & (doc_BT >= 0)
    mask_BTK = torch.zeros(B, T, K, dtype=torch.bool)
    for k in range(K):
        u = k + 1
        mask_BTK[:, :-u, k] = keep_BT[:, u:] & (doc_BT[:, u:] == doc_BT[:, :-u])
    scores_BTK = torch.randn(B, T, K, generator=generator)
    return scores_BTK, mask_BTK, doc_BT


@pytest.fixture
def packed_case():
    return make_packed_case
