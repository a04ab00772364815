"""Adapters on a model: the formula, what is frozen, what is written, and what is merged again."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.modules.peft import disable_adapter

from wmtp_modules.checkpoints.adapter import Adapter
from wmtp_modules.checkpoints.read import Checkpoint, load_into
from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.convert import convert
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.lora import LoRA, quantised_and_back
from wmtp_modules.parallel.sharding import cast_parameters_, init_adapters_, init_weights_

LORA = LoRA(rank=4, alpha=6.0)
WIDE = {"embed_dim": 128, "num_kv_heads": 4, "intermediate_dim": 256}  # that NF4's blocks divide
TOKENS = torch.arange(48).view(2, 24) % 512
LABELS = (torch.arange(2 * 24 * 4).view(2, 24, 4) * 7) % 512


def base_of(args, dtype=torch.float32):
    model = mtp_llama2(**args)
    init_weights_(model, 0)
    cast_parameters_(model, dtype)
    return model


def adapted(args, lora=LORA, dtype=torch.float32):
    """A model whose adapters do something: B as if it had been trained."""
    model = base_of(args, dtype)
    model.add_lora(lora, adapter_dtype=dtype)
    init_adapters_(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("lora_b.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


@pytest.fixture
def saved(tmp_path, tiny_tokenizer_path):
    """saved(model, name, dtype): the folder that an export makes."""

    def save(model, name, dtype=torch.float32):
        folder = tmp_path / name
        save_meta(model, folder, tokenizer_path=tiny_tokenizer_path, dtype=dtype)
        return folder

    return save


def weights_of(folder):
    return torch.load(folder / "consolidated.pth", weights_only=True)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key


# --------------------------------------------------------------------------- the formula


def test_forward_and_gradients_are_those_of_the_formula(tiny_model_args):
    """W + (alpha / rank) B A, in float64, of trunk and heads and every layer."""
    model = adapted(tiny_model_args, dtype=torch.float64)
    plain = base_of(tiny_model_args, torch.float64).state_dict()
    adapters = {
        key: value.detach().clone().requires_grad_()
        for key, value in model.named_parameters()
        if "lora" in key
    }
    assert len(adapters) == 2 * 7 * 6
    for key in plain:
        layer = key.removesuffix("weight")
        if f"{layer}lora_a.weight" in adapters:
            a, b = adapters[f"{layer}lora_a.weight"], adapters[f"{layer}lora_b.weight"]
            plain[key] = plain[key] + 6.0 / 4 * b @ a
    weights = torch.rand(LABELS.shape, generator=torch.Generator().manual_seed(3)).double()
    want = functional_call(base_of(tiny_model_args, torch.float64), plain, (TOKENS, LABELS))
    got = model(TOKENS, LABELS)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for key, value in adapters.items():
        torch.testing.assert_close(
            model.get_parameter(key).grad, value.grad, rtol=1e-9, atol=1e-12, msg=key
        )


def test_a_new_adapter_changes_nothing(tiny_model_args):
    model = base_of(tiny_model_args)
    want = model(TOKENS)
    model.add_lora(LORA, adapter_dtype=torch.float32)
    init_adapters_(model, 1)
    assert torch.equal(model(TOKENS), want)
    layer = model.layers[0].attn.q_proj
    assert layer.lora_a.weight.abs().max() <= 32**-0.5  # kaiming's bound, torchtune's convention
    assert layer.lora_a.weight.std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.2)
    other = base_of(tiny_model_args)
    other.add_lora(LORA, adapter_dtype=torch.float32)
    init_adapters_(other, 2)
    assert not torch.equal(other.layers[0].attn.q_proj.lora_a.weight, layer.lora_a.weight)


def test_only_adapters_learn_and_the_base_stays_to_the_bit(tiny_model_args):
    model = adapted(tiny_model_args)
    before = {key: value.detach().clone() for key, value in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    model(TOKENS, LABELS).sum().backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == ("lora" not in key), key
    with disable_adapter(model), torch.no_grad():
        assert torch.equal(model(TOKENS), base_of(tiny_model_args)(TOKENS))


@pytest.mark.parametrize(
    ("change", "blocks", "names"),
    [
        ({}, 6, "q_proj k_proj v_proj output_proj w1 w2 w3"),
        ({"targets": ("v_proj", "q_proj")}, 6, "q_proj v_proj"),
        ({"targets": ("w2",), "heads": False}, 3, "w2"),
    ],
)
def test_targets_and_heads_say_what_is_adapted(tiny_model_args, change, blocks, names):
    """Without further heads it is the trunk and head 0, an ordinary Llama."""
    model, lora = base_of(tiny_model_args), dataclasses.replace(LORA, **change)
    model.add_lora(lora, adapter_dtype=torch.float32)
    trained = [key for key, one in model.named_parameters() if one.requires_grad]
    want = ["layers.0", "layers.1", "heads.0", "heads.1", "heads.2", "heads.3"][:blocks]
    layers = {key.partition(".lora")[0] for key in trained}
    assert {layer.rsplit(".", 2)[0] for layer in layers} == {*want}
    assert {layer.rsplit(".", 1)[1] for layer in layers} == {*names.split()}
    keys = base_of(tiny_model_args).state_dict()
    assert {key for key in keys if lora.adapts(key)} == {f"{layer}.weight" for layer in layers}


# -------------------------------------------------------------------------- merged, alone


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
def test_the_merged_model_computes_what_the_adapters_do(tiny_model_args, saved, dtype, tolerance):
    model = adapted(tiny_model_args, dtype=dtype)
    merged = mtp_llama2(**tiny_model_args)
    cast_parameters_(merged, dtype)
    load_into(merged, saved(model, "merged", dtype), device="cpu")
    with torch.no_grad():
        got, want = merged(TOKENS), model(TOKENS)
        base = base_of(tiny_model_args, dtype)(TOKENS)
    assert (base - want).norm() > 0.1 * want.norm()
    assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("change", [{}, {"heads": False, "targets": ("q_proj", "k_proj", "w2")}])
def test_an_adapter_alone_and_its_base_are_the_merged_model(
    tiny_model_args, saved, tmp_path, change
):
    lora = dataclasses.replace(LORA, **change)
    merged = saved(adapted(tiny_model_args, lora), "merged")
    alone = saved(adapted(tiny_model_args, dataclasses.replace(lora, save_adapter_only=True)), "a")
    files = {"adapter_config.json", "adapter_model.safetensors"}
    files |= {"adapter_extra_heads.safetensors"} if lora.heads else set()
    assert {path.name for path in alone.iterdir()} == files
    whole = {"consolidated.pth", "params.json", "tokenizer.model"}
    assert {path.name for path in merged.iterdir()} == files | whole
    base = saved(base_of(tiny_model_args), "base")
    convert(base, tmp_path / "again", to="meta", adapter=alone)
    assert_same(weights_of(tmp_path / "again"), weights_of(merged))


def test_the_adapter_is_one_of_peft_for_an_ordinary_llama(tiny_model_args, saved, tmp_path):
    """PEFT's own formula, on Hugging Face's names and order of rows, gives the merged model."""
    merged = saved(adapted(tiny_model_args), "merged")
    convert(saved(base_of(tiny_model_args), "base"), tmp_path / "base_hf", to="hf")
    convert(merged, tmp_path / "merged_hf", to="hf")
    config = json.loads((merged / "adapter_config.json").read_text())
    names = "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj"
    assert (config["r"], config["lora_alpha"]) == (4, 6.0)
    assert {*config["target_modules"]} == {*names.split()}
    tensors = load_file(merged / "adapter_model.safetensors")
    read = [Checkpoint(tmp_path / name)._tensors for name in ("base_hf", "merged_hf")]
    changed = 0
    for key, base in read[0].items():
        layer = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in tensors:
            a, b = (tensors.pop(f"{layer}.lora_{part}.weight") for part in "AB")
            base, changed = base + config["lora_alpha"] / config["r"] * b @ a, changed + 1
        torch.testing.assert_close(read[1][key], base, rtol=1e-6, atol=1e-6, msg=key)
    assert changed == 7 * 3  # trunk and head 0
    assert not tensors


def test_adapters_of_another_model_are_refused(tiny_model_args, saved, tmp_path):
    folder = saved(adapted(tiny_model_args), "merged")
    with pytest.raises(ValueError, match=r"of another model: of heads\.0\.attn\.q_proj"):
        Adapter(folder, tiny_model_args | {"num_layers": 7})
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="was not written by this package: merge it with PEFT"):
        Adapter(folder, tiny_model_args)
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is missing, truncated or"):
        Adapter(folder, tiny_model_args)


# --------------------------------------------------------------------------------- QLoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_base_is_nf4_and_computes_with_its_values(
    tiny_model_args, saved, tmp_path, dtype
):
    """Forward, gradients and export are those of adapters on the rounded weights."""
    args = tiny_model_args | WIDE
    lora = dataclasses.replace(LORA, quantize_base=True)
    base = saved(base_of(args), "base", dtype)
    with torch.device("meta"):
        model = mtp_llama2(**args)
        cast_parameters_(model, dtype)
        model.add_lora(lora, adapter_dtype=dtype)
    load_into(model, base, device="cpu")
    init_adapters_(model, 1)
    rounded = adapted(args, dtype=dtype)
    own = dict(rounded.named_parameters())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora" in key:
                parameter.copy_(own[key])
            elif lora.adapts(key):
                assert isinstance(parameter, NF4Tensor), key
                own[key].copy_(quantised_and_back(own[key]))
                error = (own[key] - base_of(args, dtype).get_parameter(key)).norm()
                assert 0.01 < error / own[key].norm() < 0.15, key
            else:
                assert torch.equal(parameter, own[key]), key
    for one in (model, rounded):
        one(TOKENS, LABELS).sum().backward()
    assert torch.equal(model(TOKENS), rounded(TOKENS))
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, own[key].grad), key
    exported = saved(model, "merged", dtype)
    assert_same(weights_of(exported), weights_of(saved(rounded, "rounded", dtype)))
    convert(base, tmp_path / "again", to="meta", adapter=exported)
    assert_same(weights_of(tmp_path / "again"), weights_of(exported))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 16}, "lora.rank: 16 is not below 16, the width of k_proj"),
        ({"quantize_base": True}, "q_proj has 32 x 32 weights, and NF4 takes multiples of 16384"),
    ],
)
def test_what_a_layer_cannot_have_is_refused(tiny_model_args, change, message):
    with torch.device("meta"):
        model = mtp_llama2(**tiny_model_args)
        with pytest.raises(ValueError, match=message):
            model.add_lora(dataclasses.replace(LORA, **change), adapter_dtype=torch.float32)
