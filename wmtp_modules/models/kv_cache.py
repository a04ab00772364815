"""A KV cache whose rows are at different positions.

torchtune's ``KVCache`` keeps one position for the whole batch. Self-speculative decoding accepts
a different number of drafted tokens in each row.
"""

import torch
from torch import nn


class RowKVCache(nn.Module):
    """Keys and values stored at the position of their token.

    The model sets ``input_pos`` (int64 [B, S]) and ``end`` before each forward. To roll a row back,
    call again with smaller positions: the entries after them are overwritten before any query can
    see them, because a query at position p attends only to positions <= p.
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
        self.input_pos: torch.Tensor | None = None
        self.end = cache_len

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k and v, both [B, heads, S, head_dim], and return the positions before ``end``."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        # Advanced indices around a slice put their dimensions first: [B, S, heads, head_dim].
        self.k_cache[rows, :, self.input_pos] = k.transpose(1, 2)
        self.v_cache[rows, :, self.input_pos] = v.transpose(1, 2)
        return self.k_cache[:, :, : self.end], self.v_cache[:, :, : self.end]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows, int64, in this order; a row may be named several times."""
        self.k_cache = self.k_cache[rows]
        self.v_cache = self.v_cache[rows]
