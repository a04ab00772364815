"""Key maps and the independent forward of Meta's layout, in formulas of the Llama paper."""

import math

import pytest
import torch

from wmtp_modules.checkpoints.names import (
    hf_key,
    is_extra_head,
    meta_key,
    parameter_shapes,
    rotary_heads,
    rows_from_hf,
    rows_to_hf,
)
from wmtp_modules.models import mtp_llama2, mtp_llama2_7b
from wmtp_modules.parallel.sharding import init_weights_

META_7B_BLOCK = {
    "attention.wq.weight",
    "attention.wk.weight",
    "attention.wv.weight",
    "attention.wo.weight",
    "feed_forward.w1.weight",
    "feed_forward.w2.weight",
    "feed_forward.w3.weight",
    "attention_norm.weight",
    "ffn_norm.weight",
}


def rotate(x_BTHE, theta):
    """Rotary embedding as complex numbers: neighbours (2i, 2i+1) turn by t * theta^(-2i/E)."""
    T, E = x_BTHE.shape[1], x_BTHE.shape[3]
    frequencies = theta ** (-torch.arange(0, E, 2, dtype=torch.float64) / E)
    angles = torch.arange(T, dtype=torch.float64)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None, :]
    pairs = torch.view_as_complex(x_BTHE.double().reshape(*x_BTHE.shape[:3], E // 2, 2))
    return torch.view_as_real(pairs * turn).flatten(3).to(x_BTHE.dtype)


def rms_norm(x, weight, eps):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def meta_block(weights, prefix, x_BTD, params):
    """x + attention(norm(x)), then + feed forward of its norm (SwiGLU)."""

    def w(name):
        return weights[f"{prefix}.{name}.weight"]

    B, T, D = x_BTD.shape
    H, G, E = params["n_heads"], params["n_kv_heads"], D // params["n_heads"]
    h = rms_norm(x_BTD, w("attention_norm"), params["norm_eps"])
    q = rotate((h @ w("attention.wq").T).view(B, T, H, E), params["rope_theta"])
    k = rotate((h @ w("attention.wk").T).view(B, T, G, E), params["rope_theta"])
    v = (h @ w("attention.wv").T).view(B, T, G, E)
    out = torch.empty(B, T, H, E)
    for head in range(H):
        group = head // (H // G)
        scores = q[:, :, head] @ k[:, :, group].transpose(1, 2) / math.sqrt(E)
        future = torch.ones(T, T).triu(1).bool()
        out[:, :, head] = scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, :, group]
    x_BTD = x_BTD + out.reshape(B, T, D) @ w("attention.wo").T
    h = rms_norm(x_BTD, w("ffn_norm"), params["norm_eps"])
    gate = h @ w("feed_forward.w1").T
    hidden = gate * torch.sigmoid(gate) * (h @ w("feed_forward.w3").T)
    return x_BTD + hidden @ w("feed_forward.w2").T


def meta_logits(weights, tokens_BT, params):
    """Logits [B, T, K, V] of a state dict in Meta's layout."""
    n_trunk = params["n_layers"] - params["n_future_tokens"]
    x = weights["tok_embeddings.weight"][tokens_BT]
    for i in range(n_trunk):
        x = meta_block(weights, f"layers.{i}", x, params)
    heads = [f"layers.{n_trunk}"]
    heads += [f"extra_heads.{j}" for j in range(params["n_future_tokens"] - 1)]
    outputs = [meta_block(weights, head, x, params) for head in heads]
    h = rms_norm(torch.stack(outputs, 2), weights["norm.weight"], params["norm_eps"])
    return h @ weights["output.weight"].T


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_all_heads_match_the_independent_forward(tiny_model_args, num_kv_heads):
    args = tiny_model_args | {"num_kv_heads": num_kv_heads, "rope_base": 500.0, "norm_eps": 1e-4}
    model = mtp_llama2(**args)
    init_weights_(model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Attention far from uniform, norms that differ from one.
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            parameter.add_(0.1 * noise)
    weights = {meta_key(key, 2): value for key, value in model.state_dict().items()}
    params = dict(
        n_layers=6,
        n_future_tokens=4,
        n_heads=4,
        n_kv_heads=num_kv_heads,
        norm_eps=1e-4,
        rope_theta=500.0,
    )
    tokens = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(tokens)
        independent = meta_logits(weights, tokens, params)
    assert ours.std() > 0.5
    torch.testing.assert_close(ours, independent, atol=1e-4, rtol=1e-4)


def test_meta_names_of_the_released_7b():
    with torch.device("meta"):
        model = mtp_llama2_7b()
    names = {meta_key(key, 28) for key in model.state_dict()}
    blocks = [f"layers.{i}" for i in range(29)] + [f"extra_heads.{j}" for j in range(3)]
    expected = {f"{block}.{key}" for block in blocks for key in META_7B_BLOCK}
    assert names == expected | {"tok_embeddings.weight", "norm.weight", "output.weight"}
    assert meta_key("heads.0.attn.q_proj.weight", 28) == "layers.28.attention.wq.weight"
    assert meta_key("heads.3.mlp.w2.weight", 28) == "extra_heads.2.feed_forward.w2.weight"


def test_hf_names_and_the_copied_heads():
    assert hf_key("layers.1.sa_norm.scale", 2) == "model.layers.1.input_layernorm.weight"
    for head in range(4):
        key = f"heads.{head}.mlp.w3.weight"
        assert hf_key(key, 2) == "model.layers.2.mlp.up_proj.weight"
        assert is_extra_head(key) == (head > 0)
    assert not is_extra_head("output.proj.weight")


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_shapes_are_the_models(tiny_model_args, num_kv_heads):
    with torch.device("meta"):
        model = mtp_llama2(**tiny_model_args | {"num_kv_heads": num_kv_heads})
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert parameter_shapes(model.args) == shapes
    assert list(parameter_shapes(model.args)) == list(shapes)


def test_row_order_of_q_and_k():
    # One head of four rows: rows (0, 2) of Hugging Face's form turn together, and so do (1, 3).
    assert rows_from_hf(1, 4).tolist() == [0, 2, 1, 3]
    assert rows_from_hf(2, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    rows = torch.arange(24)
    assert torch.equal(rows[rows_to_hf(3, 8)][rows_from_hf(3, 8)], rows)
    assert torch.equal(rows[rows_from_hf(3, 8)][rows_to_hf(3, 8)], rows)


def test_only_q_and_k_are_reordered():
    args = {"num_heads": 4, "num_kv_heads": 2}
    assert rotary_heads("layers.0.attn.q_proj.weight", args) == 4
    assert rotary_heads("heads.1.attn.k_proj.weight", args) == 2
    assert rotary_heads("layers.0.attn.v_proj.weight", args) is None
