"""A KV cache whose rows are at different positions, and what attention needs beside it.

torchtune's ``KVCache`` keeps one position for the whole batch. Self-speculative decoding accepts
a different number of drafted tokens in each row, and rows leave and enter.
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class RowKVCache(nn.Module):
    """Keys and values stored at the position of their token.

    The model sets ``rows`` (int64 [B, 1], the rows of the cache that the tokens belong to),
    ``input_pos`` (int64 [B, S]) and ``end`` before each forward. To roll a row back, or to give it
    to another text, call again with smaller positions: the entries after them are overwritten
    before any query can see them, because a query at position p attends only to positions <= p.
    """

    def __init__(
        self,
        batch_size: int,
        cache_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        shape = (batch_size, num_kv_heads, cache_len, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.rows: torch.Tensor | None = None
        self.input_pos: torch.Tensor | None = None
        self.end: int | None = None

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k and v, both [B, heads, S, head_dim], and return what the queries look at.

        That is the first B rows up to position ``end``; without an end, k and v alone.
        """
        # Advanced indices around a slice put their dimensions first: [B, S, heads, head_dim].
        self.k_cache[self.rows, :, self.input_pos] = k.transpose(1, 2)
        self.v_cache[self.rows, :, self.input_pos] = v.transpose(1, 2)
        if self.end is None:
            return k, v
        B = k.shape[0]
        return self.k_cache[:B, :, : self.end], self.v_cache[:B, :, : self.end]

    def copy_rows(self, source: torch.Tensor, to: torch.Tensor, end: int) -> None:
        """Copy rows, int64, onto others, up to position ``end``."""
        self.k_cache[to, :, :end] = self.k_cache[source, :, :end]
        self.v_cache[to, :, :end] = self.v_cache[source, :, :end]


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> torch.Tensor:
    """torchtune's attention call, for a block with a cache; heads x positions x head_dim.

    torchtune never asks for causal attention where there is a cache, so ``is_causal`` is not read:
    without a mask, several queries are a text from its beginning, and a single one sees every key.
    Both are open to flash kernels, which take no mask.
    """
    if mask is None:
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=q.shape[2] > 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], dropout_p=dropout_p)


class CachedRoPE(nn.Module):
    """torchtune's rotary embeddings up to rounding, looked up once for all blocks of a forward.

    A pair of values is a complex number, and its rotation one product (RoFormer, arXiv 2104.09864,
    section 3.2.1), where torchtune takes 20 operators for the queries and as many for the keys.

    Attributes:
        own: the block's module, put back when the caches go.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self.turns = torch.empty(0)  # complex64 [B, S, 1, head_dim / 2]

    def look_up(self, input_pos: torch.Tensor) -> None:
        """Set the positions, int64 [B, S], of the next forward's tokens."""
        cos_sin = self.own.get_buffer("cache")[input_pos].float()
        self.turns = torch.view_as_complex(cos_sin)[:, :, None]

    def forward(self, x: torch.Tensor, *, input_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Turn x [B, S, heads, head_dim]; the positions are those looked up."""
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turns).flatten(-2).type_as(x)
