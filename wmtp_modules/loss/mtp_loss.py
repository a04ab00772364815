"""Labels, mask and normalisation of the weighted multi-token-prediction loss.

Shapes: B batch, T positions, K heads. Head k (0-based) at position t predicts token t + k + 1.

One optimizer step minimises, with weights detached,

    L = (1 / n') * sum_{b,t,k} alpha_k * w[b,t,k] * M[b,t,k] * losses[b,t,k]
    n' = sum_k alpha_k * n_k,   n_k = sum_{b,t} M[b,t,k] over ranks and micro-batches,

so that weights of 1 give exactly plain MTP, whatever the packing, the number of ranks or the
gradient accumulation. Sum first, divide once. Plain MTP is here the mean over heads, with alpha_k
1 / K; eq. 2 of arXiv 2404.19737 is their sum. Adam's step is the same for both, but a gradient of
the mean, on which ``clip_grad_norm`` acts, is K times smaller.
"""

import torch

IGNORE_INDEX = -100


def shift_to_heads(x_BT: torch.Tensor, n_future_tokens: int, fill: float | int) -> torch.Tensor:
    """A value per token at the positions that predict it: out[b, t, k] = x_BT[b, t + k + 1].

    Beyond the end of the row it is ``fill``.
    """
    T = x_BT.shape[1]
    out_BTK = x_BT.new_full((*x_BT.shape, n_future_tokens), fill)
    for k in range(min(n_future_tokens, T - 1)):
        out_BTK[:, : T - k - 1, k] = x_BT[:, k + 1 :]
    return out_BTK


def mtp_labels(
    tokens_BT: torch.Tensor, keep_BT: torch.Tensor, doc_BT: torch.Tensor, n_future_tokens: int
) -> torch.Tensor:
    """Target of each head at each position.

    Args:
        tokens_BT: token ids, int64.
        keep_BT: bool, token is supervised (not prompt, not padding).
        doc_BT: int64, index of the token's document inside the packed row, -1 for padding.
        n_future_tokens: K.

    Returns:
        labels_BTK, int64: token t + k + 1, or -100 where that token is not supervised, belongs
        to another document or is beyond the end of the row.
    """
    kept_BT = torch.where(keep_BT, tokens_BT, IGNORE_INDEX)
    labels_BTK = shift_to_heads(kept_BT, n_future_tokens, IGNORE_INDEX)
    target_doc_BTK = shift_to_heads(doc_BT, n_future_tokens, -2)
    return torch.where(target_doc_BTK == doc_BT[..., None], labels_BTK, IGNORE_INDEX)


def head_alphas(n_future_tokens: int, decay: float = 1.0) -> torch.Tensor:
    """Weight of each head: decay^k, normalised to sum 1.

    ``decay`` 1 is the mean over heads; the paper's eq. 2 is the sum, each head with weight 1.
    """
    alphas_K = torch.tensor([decay**k for k in range(n_future_tokens)], dtype=torch.float64)
    return (alphas_K / alphas_K.sum()).float()
