"""The mask of packed rows is torchtune's, made without its waits."""

import torch
from torchtune.modules.attention_utils import create_block_causal_mask

from wmtp_modules.models.attention_mask import block_mask, document_mask

LENGTHS = ([3, 1, 8, 4], [16], [5, 5, 5, 1])
DOC_BT = torch.stack(
    [torch.arange(len(one)).repeat_interleave(torch.tensor(one)) for one in LENGTHS]
)


def test_it_is_torchtunes():
    expected = create_block_causal_mask([torch.tensor(one) for one in LENGTHS])
    assert torch.equal(document_mask(DOC_BT), expected)
    padded = DOC_BT.clone()
    padded[0, 12:] = padded[2, 15:] = -1  # padding is one more document, so no position sees none
    assert torch.equal(document_mask(padded), expected)


def test_the_function_of_flex_attention_is_the_same():
    mask, (B, T) = block_mask(DOC_BT), DOC_BT.shape
    at = torch.arange(T)
    seen = mask.mask_mod(torch.arange(B)[:, None, None], 0, at[:, None], at)
    assert torch.equal(seen, document_mask(DOC_BT))
    # Blocks of 128: what lies in none that is seen is not computed at all.
    doc_BT = torch.arange(4).repeat_interleave(128)[None]
    assert torch.equal(block_mask(doc_BT).to_dense()[0, 0], torch.eye(4, dtype=torch.int32))
