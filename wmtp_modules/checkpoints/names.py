"""Names and shapes of one Llama in three layouts: ours, Meta's release and Hugging Face.

Everything here works on one key or one tensor at a time, so that callers can stream a checkpoint.

- Ours: ``layers.{i}`` is the trunk, ``heads.{k}`` the heads.
- Meta's multi-token release (arXiv 2404.19737): ``layers`` holds the trunk and then head 0,
  ``extra_heads.{k - 1}`` is head k. The rotary embedding turns neighbouring pairs of rows, as
  torchtune's does, so tensors are renamed and nothing else.
- Hugging Face: one more trunk block in place of head 0, no other heads; in the folders of
  ``convert --to hf-mtp`` they are ``extra_heads.{k - 1}``. The rotary embedding turns row i
  together with row i + head_dim / 2, so the rows of q and k are in another order.
"""

import re

import torch

# ours, Meta, Hugging Face, shape: D width, K width of keys and values, H hidden, V vocabulary
_BLOCK_KEYS = (
    ("attn.q_proj.weight", "attention.wq.weight", "self_attn.q_proj.weight", "DD"),
    ("attn.k_proj.weight", "attention.wk.weight", "self_attn.k_proj.weight", "KD"),
    ("attn.v_proj.weight", "attention.wv.weight", "self_attn.v_proj.weight", "KD"),
    ("attn.output_proj.weight", "attention.wo.weight", "self_attn.o_proj.weight", "DD"),
    ("mlp.w1.weight", "feed_forward.w1.weight", "mlp.gate_proj.weight", "HD"),
    ("mlp.w2.weight", "feed_forward.w2.weight", "mlp.down_proj.weight", "DH"),
    ("mlp.w3.weight", "feed_forward.w3.weight", "mlp.up_proj.weight", "HD"),
    ("sa_norm.scale", "attention_norm.weight", "input_layernorm.weight", "D"),
    ("mlp_norm.scale", "ffn_norm.weight", "post_attention_layernorm.weight", "D"),
)
_SHARED_KEYS = (
    ("tok_embeddings.weight", "tok_embeddings.weight", "model.embed_tokens.weight", "VD"),
    ("output.norm.scale", "norm.weight", "model.norm.weight", "D"),
    ("output.proj.weight", "output.weight", "lm_head.weight", "VD"),
)
_TO_META = {ours: meta for ours, meta, _, _ in (*_BLOCK_KEYS, *_SHARED_KEYS)}
_TO_HF = {ours: hf for ours, _, hf, _ in (*_BLOCK_KEYS, *_SHARED_KEYS)}


def _pattern(layers: str, blocks: list[str], shared: list[str]) -> re.Pattern[str]:
    block, alone = ("|".join(map(re.escape, keys)) for keys in (blocks, shared))
    return re.compile(rf"(?:{layers})\.\d+\.(?:{block})|{alone}")


META, HUGGING_FACE = "Meta's", "Hugging Face's"
# Which format a key belongs to; ``fullmatch``.
LAYOUTS = {
    META: _pattern(
        "layers|extra_heads", *([row[1] for row in t] for t in (_BLOCK_KEYS, _SHARED_KEYS))
    ),
    HUGGING_FACE: _pattern(
        "model.layers|extra_heads", *([row[2] for row in t] for t in (_BLOCK_KEYS, _SHARED_KEYS))
    ),
    "torchtune's": _pattern(
        "layers|heads", [row[0] for row in _BLOCK_KEYS], ["norm.scale", "output.norm.scale"]
    ),
}


def parameter_shapes(args: dict) -> dict[str, tuple[int, ...]]:
    """Key and shape of every parameter of ``mtp_llama2(**args)``, in the model's order.

    ``args`` must have ``intermediate_dim``.
    """
    dim, n_heads = args["embed_dim"], args["n_future_tokens"]
    kv_dim = dim // args["num_heads"] * args["num_kv_heads"]
    sizes = {"D": dim, "K": kv_dim, "H": args["intermediate_dim"], "V": args["vocab_size"]}
    blocks = [f"layers.{i}" for i in range(args["num_layers"] - n_heads)]
    blocks += [f"heads.{k}" for k in range(n_heads)]
    embedding, *output = _SHARED_KEYS
    table = [embedding]
    table += [(f"{name}.{key}", *rest) for name in blocks for key, *rest in _BLOCK_KEYS]
    return {key: tuple(sizes[size] for size in shape) for key, *_, shape in (*table, *output)}


def meta_key(key: str, n_trunk: int) -> str:
    """Meta's name of one of our keys; head 0 has the index ``n_trunk`` in Meta's ``layers``."""
    if key in _TO_META:
        return _TO_META[key]
    stack, index, rest = key.split(".", 2)
    if stack == "heads":
        stack, index = ("layers", n_trunk) if index == "0" else ("extra_heads", int(index) - 1)
    return f"{stack}.{index}.{_TO_META[rest]}"


def hf_key(key: str, n_trunk: int, *, all_heads: bool = False) -> str:
    """Hugging Face's name of one of our keys; head 0 is the last block, ``n_trunk``.

    So is every other head of a folder without them: reading starts each as a copy of that block,
    writing leaves them out, see ``is_extra_head``. With ``all_heads`` they have their own names.
    """
    if key in _TO_HF:
        return _TO_HF[key]
    stack, index, rest = key.split(".", 2)
    if all_heads and is_extra_head(key):
        return f"extra_heads.{int(index) - 1}.{_TO_HF[rest]}"
    return f"model.layers.{n_trunk if stack == 'heads' else index}.{_TO_HF[rest]}"


def is_extra_head(key: str) -> bool:
    """Whether the key belongs to a head after head 0, which an ordinary Llama does not have."""
    return key.startswith("heads.") and not key.startswith("heads.0.")


def rotary_heads(key: str, args: dict) -> int | None:
    """Number of attention heads in the rows of a q or k projection, None for other keys."""
    if key.endswith("q_proj.weight"):
        return args["num_heads"]
    return args["num_kv_heads"] if key.endswith("k_proj.weight") else None


def rows_from_hf(num_heads: int, head_dim: int) -> torch.Tensor:
    """Row numbers such that ``ours = hf[rows]`` for a q or k projection, int64 [rows].

    Row (head, 2 i + p) of the interleaved form is row (head, i + p head_dim / 2) of the split one.
    """
    rows = torch.arange(num_heads * head_dim).view(num_heads, 2, head_dim // 2)
    return rows.transpose(1, 2).reshape(-1)


def rows_to_hf(num_heads: int, head_dim: int) -> torch.Tensor:
    """Row numbers such that ``hf = ours[rows]``: the inverse of ``rows_from_hf``."""
    return rows_from_hf(num_heads, head_dim).argsort()
