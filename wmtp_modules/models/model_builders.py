"""Component and model builders of the multi-token-prediction Llama, torchtune style."""

import math
from importlib import import_module
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torchtune.models.llama2._component_builders import llama2_mlp
from torchtune.models.llama2._model_utils import scale_hidden_dim_for_mlp
from torchtune.modules import (
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TransformerSelfAttentionLayer,
)

from wmtp_modules.models.mtp_transformer import LogitLinear, MTPOutput, MTPTransformer

# Of Llama 3.1, in the names of Hugging Face's config.json; Meta's params.json says no numbers.
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class ScaledRotaryEmbeddings(RotaryPositionalEmbeddings):
    """Llama 3.1's rotary embedding: torchtune's ``Llama3ScaledRoPE``, on any device.

    Slow frequencies turn ``factor`` times slower, fast ones as before, those between in between.
    torchtune's looks at each frequency by itself, which a model on the meta device or a memory
    estimate, whose tensors have no values, cannot.
    """

    def __init__(self, dim: int, max_seq_len: int, base: int, scaling: dict[str, Any]) -> None:
        self.scaling = scaling
        super().__init__(dim=dim, max_seq_len=max_seq_len, base=base)

    def build_rope_cache(self, max_seq_len: int = 4096) -> None:
        """As torchtune's, of frequencies that are scaled before."""
        factor, low, high = (
            self.scaling[f"{name}factor"] for name in ("", "low_freq_", "high_freq_")
        )
        context = self.scaling["original_max_position_embeddings"]
        wavelengths = 2 * math.pi / self.theta
        smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
        self.theta = (1 - smooth) * self.theta / factor + smooth * self.theta
        super().build_rope_cache(max_seq_len)


def check_rope_scaling(scaling: dict[str, Any]) -> dict[str, float]:
    """Llama 3.1's four numbers of a block that may hold more; ValueError if they are not good."""
    kind = scaling.get("rope_type", scaling.get("type", "llama3"))
    if kind != "llama3":
        raise ValueError(f"rope_scaling is of type {kind!r}, only 'llama3' is supported")
    found = {}
    for name in LLAMA3_SCALING:
        value = scaling.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise ValueError(f"rope_scaling.{name} must be a number above 0, got {value!r}")
        found[name] = value
    if found["low_freq_factor"] >= found["high_freq_factor"]:
        raise ValueError("rope_scaling.low_freq_factor must be below high_freq_factor")
    return found


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
    rope_scaling: dict[str, Any] | None = None,
) -> MTPTransformer:
    """Build a Llama-2 with ``n_future_tokens`` parallel head blocks.

    Args:
        num_layers: all blocks, counted as ``n_layers`` in Meta's ``params.json``: trunk and
            heads together, so the trunk has ``num_layers - n_future_tokens`` blocks.
        n_future_tokens: heads; 1 gives an ordinary Llama of ``num_layers`` blocks.
        num_heads: query heads.
        max_seq_len: longest row, in tokens.
        intermediate_dim: width of the feed-forward layer; Llama-2's rule if None.
        rope_scaling: of Llama 3.1's rotary embedding: factor, low_freq_factor, high_freq_factor,
            original_max_position_embeddings. None for Llama-2's.

    Raises:
        ValueError: if no trunk block is left, a size is below 1, the widths do not divide, or the
            scaling is another one.
    """
    if not 1 <= n_future_tokens < num_layers:
        raise ValueError(
            f"n_future_tokens {n_future_tokens} must be at least 1 and below num_layers "
            f"{num_layers}, which counts trunk and head blocks together"
        )
    if intermediate_dim is None:
        intermediate_dim = scale_hidden_dim_for_mlp(embed_dim)
    # Read by the checkpoint code too, to compare with a folder and to write its params.json.
    args: dict[str, Any] = dict(
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
        if name not in ("norm_eps", "rope_base") and size < 1:
            raise ValueError(f"model.{name} must be at least 1, got {size}")
    scaling = check_rope_scaling(rope_scaling) if rope_scaling else None
    args |= {"rope_scaling": scaling}
    if embed_dim % num_heads or num_heads % num_kv_heads:
        raise ValueError(
            f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads}, and num_heads "
            f"a multiple of num_kv_heads {num_kv_heads}"
        )
    head_dim = embed_dim // num_heads
    # Annotated as int there, and any number in the computation; some checkpoints have a fraction.
    base = cast(int, rope_base)
    rope: RotaryPositionalEmbeddings
    if scaling:
        rope = ScaledRotaryEmbeddings(head_dim, max_seq_len, base, scaling)
    else:
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


def mtp_from_checkpoint(
    *,
    checkpoint_dir: str | None = None,
    n_future_tokens: int | None = None,
    max_seq_len: int | None = None,
) -> MTPTransformer:
    """Build the model of a checkpoint folder: every fact is read from it, no weight is.

    Args:
        checkpoint_dir: in Meta's format or Hugging Face's. In a config it may be left out and is
            ``checkpointer.checkpoint_dir``.
        n_future_tokens: heads; None takes those of the folder. More than one for an ordinary Llama
            starts a multi-token model from it.
        max_seq_len: longest row, in tokens; None takes the folder's context.

    Raises:
        ValueError: if there is no folder, it is no checkpoint, or its context is shorter.
    """
    if not checkpoint_dir:
        raise ValueError(
            "model: mtp_from_checkpoint reads a folder and there is none: set "
            "checkpointer.checkpoint_dir, or name the model's sizes with mtp_llama2"
        )
    # By its name: checkpoints/ stands above models/, and only this builder looks up to it.
    read = import_module("wmtp_modules.checkpoints.read")
    with unset_fake_temporarily(), torch.device("cpu"):  # a memory estimate reads the folder too
        args = read.args_of(checkpoint_dir, n_future_tokens, max_seq_len)
    return mtp_llama2(**args)


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
