"""The attention mask of packed rows, made on their device: the host waits for nothing."""

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torchtune.modules.attention_utils import _MaskType
from torchtune.utils._import_guard import _SUPPORTS_FLEX_ATTENTION


def document_mask(doc_BT: torch.Tensor) -> _MaskType:
    """Causal inside each document: position t sees s where s <= t and doc[s] == doc[t].

    torchtune's ``packed_block_causal_mask`` asks the device for the length of every document. Make
    it once per micro-batch: all blocks share it, and so does a reference model.

    Args:
        doc_BT: int64, document of each token in its row; padding is one more, of number -1.

    Returns:
        flex attention's ``BlockMask`` on a GPU that has it, otherwise bool [B, T, T].
    """
    if doc_BT.is_cuda and _SUPPORTS_FLEX_ATTENTION:
        return block_mask(doc_BT)
    T = doc_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=doc_BT.device).tril()
    return causal_TT & (doc_BT[:, :, None] == doc_BT[:, None, :])


def block_mask(doc_BT: torch.Tensor):
    """The same as a ``BlockMask``."""
    B, T = doc_BT.shape

    def is_seen(b: torch.Tensor, _head: torch.Tensor, t: torch.Tensor, s: torch.Tensor):
        return (s <= t) & (doc_BT[b, t] == doc_BT[b, s])

    return create_block_mask(is_seen, B, None, T, T, device=str(doc_BT.device))
