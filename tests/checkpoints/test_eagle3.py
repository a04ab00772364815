"""A folder of ``--to eagle3`` drafts, in a server, what head 1 says.

``server_logits`` states anew, in plain torch, what vLLM 0.33.0 and SGLang 0.5.23 compute from such
a folder: ``vllm/model_executor/models/llama_eagle3.py`` and
``sglang/srt/models/llama_eagle3.py``, their Llama attention, RMSNorm with residual and rotary
embedding. Neither is installed here.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention, silu

from wmtp_modules import convert
from wmtp_modules.checkpoints import write_hf as export
from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.models.model_builders import LLAMA3_SCALING

NAMES = {
    "fc.weight",
    *(
        f"midlayer.{n}.weight"
        for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    ),
    *(f"midlayer.self_attn.{n}_proj.weight" for n in "qkvo"),
    *(f"midlayer.mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    "norm.weight",
    "lm_head.weight",
}


def inverse_frequencies(config):
    """Of the halves that the rotary embedding turns together, with Llama 3's scaling."""
    rope, width = config["rope_parameters"], config["head_dim"]
    inverse = rope["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
    if rope["rope_type"] == "default":
        return inverse
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    length = 2 * math.pi / inverse
    old = rope["original_max_position_embeddings"]
    smooth = ((old / length - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / rope["factor"] + smooth * inverse


def server_logits(server, folder, hidden_TD, embeds_TD, position_T):
    """fp64 [T, V]: the only rounding is that of what it is given."""
    hidden_TD, embeds_TD = hidden_TD.double(), embeds_TD.double()
    config, w = json.loads((folder / "config.json").read_text()), {}
    for file in sorted(folder.glob("*.safetensors")):
        w |= {name: tensor.double() for name, tensor in load_file(file).items()}
    eps, T = config["rms_norm_eps"], len(position_T)

    def norm(x, name, residual=None):
        """RMSNorm; with a residual their sum is normed and is the new residual."""
        x = x if residual is None else x + residual
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w[f"{name}.weight"], x

    def rotated(x):  # [heads, T, head width]
        angle = position_T[:, None] * inverse_frequencies(config)
        cos, sin = angle.cos(), angle.sin()
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    if server == "vllm" or hidden_TD.shape[-1] != embeds_TD.shape[-1]:  # SGLang skips it
        hidden_TD = hidden_TD @ w["fc.weight"].T
    residual = hidden_TD
    normed = [norm(embeds_TD, "midlayer.input_layernorm"), norm(hidden_TD, "midlayer.hidden_norm")]
    x = torch.cat([pair[0] for pair in normed], dim=-1)
    q, k, v = (
        (x @ w[f"midlayer.self_attn.{n}_proj.weight"].T)
        .view(T, -1, config["head_dim"])
        .transpose(0, 1)
        for n in "qkv"
    )
    assert len(q) == config["num_attention_heads"]
    assert len(k) == len(v) == config["num_key_value_heads"]
    k, v = (y.repeat_interleave(len(q) // len(k), dim=0) for y in (rotated(k), v))
    x = scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
    x = x.transpose(0, 1).reshape(T, -1) @ w["midlayer.self_attn.o_proj.weight"].T
    x, residual = norm(x, "midlayer.post_attention_layernorm", residual)
    gate, up, down = (w[f"midlayer.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
    x = (silu(x @ gate.T) * (x @ up.T)) @ down.T
    return norm(x, "norm", residual)[0] @ w["lm_head.weight"].T


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("kv_heads", "scaled", "sharded"), [(4, False, False), (2, True, False), (1, True, True)]
)
def test_the_draft_is_head_1(
    build, args, tmp_path, tiny_tokenizer_path, transformers, monkeypatch, server, kv_heads,
    scaled, sharded,
):  # fmt: skip
    scaling = LLAMA3_SCALING | {"original_max_position_embeddings": 16} if scaled else None
    model = build(args | {"num_kv_heads": kv_heads, "rope_base": 500.0, "rope_scaling": scaling})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.ndim == 1 else 2)
    save_meta(model, tmp_path / "m", tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    if sharded:
        monkeypatch.setattr(export, "HF_SHARD_BYTES", 30_000)
    for to in ("eagle3", "hf"):
        assert convert.main([str(tmp_path / "m"), str(tmp_path / to), "--to", to]) == 0
    assert (len([*(tmp_path / "eagle3").glob("*.safetensors")]) > 1) == sharded
    config = json.loads((tmp_path / "eagle3" / "config.json").read_text())

    # The target is what users serve, and gives the hidden state that the config names.
    target = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens_1T = torch.randint(3, 512, (1, 40))
    with torch.no_grad():
        states = target(tokens_1T, output_hidden_states=True).hidden_states
        if server == "vllm":  # after so many blocks
            (layer,) = config["eagle_aux_hidden_state_layer_ids"]
        else:  # after the block of that index
            (layer,) = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
            layer += 1
        hidden_TD = states[layer][0]
        embeds_TD = torch.randn(40, args["embed_dim"])  # of the tokens that follow: not read
        want_TV = model(tokens_1T)[0, :, 1]
        assert want_TV.std() > 0.5
        for first in (0, 1, 1000):
            position_T = torch.arange(first, first + 40)
            found_TV = server_logits(server, tmp_path / "eagle3", hidden_TD, embeds_TD, position_T)
            torch.testing.assert_close(found_TV, want_TV.double(), atol=1e-5, rtol=0)


def test_names_and_what_the_servers_read(build, args, tmp_path, tiny_tokenizer_path):
    model = build(args)
    half = {key: tensor.to(torch.bfloat16) for key, tensor in model.state_dict().items()}
    export.write_eagle3(half.items(), model.args, tmp_path / "e", tiny_tokenizer_path)
    weights = load_file(tmp_path / "e" / "model.safetensors")
    assert weights.keys() == NAMES
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    dim = args["embed_dim"]
    assert torch.equal(weights["fc.weight"].float(), torch.eye(dim))
    assert not weights["midlayer.self_attn.v_proj.weight"][:, :dim].any()
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["num_hidden_layers"] == 1
    assert config["draft_vocab_size"] == config["vocab_size"] == 512
    assert config["eagle_aux_hidden_state_layer_ids"] == [2]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1]
