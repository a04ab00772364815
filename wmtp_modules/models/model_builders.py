"""Component and model builders of the multi-token-prediction Llama, torchtune style."""

from typing import cast

from torch import nn
from torchtune.models.llama2._component_builders import llama2_mlp
from torchtune.models.llama2._model_utils import scale_hidden_dim_for_mlp
from torchtune.modules import (
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TransformerSelfAttentionLayer,
)

from wmtp_modules.models.mtp_transformer import LogitLinear, MTPOutput, MTPTransformer


def mtp_llama2(
    *,
    vocab_size: int,
    num_layers: int,
    n_future_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    max_seq_len: int,
    intermediate_dim: int | None = None,
    norm_eps: float = 1e-5,
    rope_base: float = 10_000.0,
) -> MTPTransformer:
    """Build a Llama-2 with ``n_future_tokens`` parallel head blocks.

    Args:
        num_layers: all blocks, counted as ``n_layers`` in Meta's ``params.json``: trunk and
            heads together, so the trunk has ``num_layers - n_future_tokens`` blocks.
        n_future_tokens: heads; 1 gives an ordinary Llama of ``num_layers`` blocks.
        num_heads: query heads.
        max_seq_len: longest row, in tokens.
        intermediate_dim: width of the feed-forward layer; Llama-2's rule if None.

    Raises:
        ValueError: if no trunk block is left, a size is below 1, or the widths do not divide.
    """
    if not 1 <= n_future_tokens < num_layers:
        raise ValueError(
            f"n_future_tokens {n_future_tokens} must be at least 1 and below num_layers "
            f"{num_layers}, which counts trunk and head blocks together"
        )
    if intermediate_dim is None:
        intermediate_dim = scale_hidden_dim_for_mlp(embed_dim)
    # Read by the checkpoint code too, to compare with a folder and to write its params.json.
    args = dict(
        vocab_size=vocab_size,
        num_layers=num_layers,
        n_future_tokens=n_future_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        max_seq_len=max_seq_len,
        intermediate_dim=intermediate_dim,
        norm_eps=norm_eps,
        rope_base=rope_base,
    )
    for name, size in args.items():
        if size < 1 and name not in ("norm_eps", "rope_base"):
            raise ValueError(f"model.{name} must be at least 1, got {size}")
    if embed_dim % num_heads or num_heads % num_kv_heads:
        raise ValueError(
            f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads}, and num_heads "
            f"a multiple of num_kv_heads {num_kv_heads}"
        )
    head_dim = embed_dim // num_heads
    # Annotated as int there, and any number in the computation; some checkpoints have a fraction.
    base = cast(int, rope_base)
    rope = RotaryPositionalEmbeddings(dim=head_dim, max_seq_len=max_seq_len, base=base)

    def block() -> TransformerSelfAttentionLayer:
        kv_dim = num_kv_heads * head_dim
        return TransformerSelfAttentionLayer(
            attn=MultiHeadAttention(
                embed_dim=embed_dim,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                q_proj=nn.Linear(embed_dim, embed_dim, bias=False),
                k_proj=nn.Linear(embed_dim, kv_dim, bias=False),
                v_proj=nn.Linear(embed_dim, kv_dim, bias=False),
                output_proj=nn.Linear(embed_dim, embed_dim, bias=False),
                pos_embeddings=rope,
                max_seq_len=max_seq_len,
            ),
            mlp=llama2_mlp(dim=embed_dim, hidden_dim=intermediate_dim),
            sa_norm=RMSNorm(embed_dim, eps=norm_eps),
            mlp_norm=RMSNorm(embed_dim, eps=norm_eps),
        )

    return MTPTransformer(
        tok_embeddings=nn.Embedding(vocab_size, embed_dim),
        layers=[block() for _ in range(num_layers - n_future_tokens)],
        heads=[block() for _ in range(n_future_tokens)],
        output=MTPOutput(RMSNorm(embed_dim, eps=norm_eps), LogitLinear(embed_dim, vocab_size)),
        args=args,
    )


def mtp_llama2_7b(*, n_future_tokens: int = 4, max_seq_len: int = 4096) -> MTPTransformer:
    """Meta's ``7B_1T_4`` shape: 28 trunk blocks and 4 heads, 6.738e9 parameters."""
    return mtp_llama2(
        vocab_size=32_000,
        num_layers=32,
        n_future_tokens=n_future_tokens,
        num_heads=32,
        num_kv_heads=32,
        embed_dim=4096,
        max_seq_len=max_seq_len,
    )


def mtp_sheared_llama_1_3b(*, n_future_tokens: int = 1, max_seq_len: int = 4096) -> MTPTransformer:
    """Sheared-LLaMA-1.3B (princeton-nlp), the Rho-1 reference: 24 blocks of width 2048.

    With ``n_future_tokens`` above 1 the extra heads are added to the 24 blocks.
    """
    return mtp_llama2(
        vocab_size=32_000,
        num_layers=24 + n_future_tokens - 1,
        n_future_tokens=n_future_tokens,
        num_heads=16,
        num_kv_heads=16,
        embed_dim=2048,
        max_seq_len=max_seq_len,
        intermediate_dim=5504,
    )
