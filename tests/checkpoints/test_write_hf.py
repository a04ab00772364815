"""The Hugging Face export is trunk and head 0, and transformers reads it, tokenizer included."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
from safetensors.torch import load_file

from wmtp_modules.checkpoints import write_hf as export
from wmtp_modules.checkpoints.names import rows_from_hf
from wmtp_modules.checkpoints.read import (
    load_into,
    model_args_from_folder,
)
from wmtp_modules.checkpoints.write_hf import write_hf
from wmtp_modules.models import mtp_llama2

CPU = torch.device("cpu")


def meta_device(args):
    with torch.device("meta"):
        return mtp_llama2(**args)


def assert_equal_states(a, b):
    assert list(a) == list(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=key)


def test_export_equals_trunk_and_head_0(model, args, tmp_path, tiny_tokenizer_path):
    write_hf(model.state_dict().items(), model.args, tmp_path / "h", tiny_tokenizer_path)
    llama_args = model_args_from_folder(tmp_path / "h", max_seq_len=64)
    assert llama_args == args | {"num_layers": 3, "n_future_tokens": 1}
    llama = meta_device(llama_args)
    load_into(llama, tmp_path / "h", device=CPU)
    kept = {k: v for k, v in model.state_dict().items() if k in llama.state_dict()}
    assert_equal_states(kept, llama.state_dict())
    tokens = torch.arange(12)[None]
    assert torch.equal(llama(tokens)[:, :, 0], model(tokens)[:, :, 0])


def test_of_several_dtypes_the_config_names_that_of_most_parameters(
    model, tmp_path, tiny_tokenizer_path, caplog
):
    caplog.set_level(logging.INFO, logger=export.log.name)

    def dtype_written(state):
        caplog.clear()
        write_hf(state.items(), model.args, tmp_path / "h", tiny_tokenizer_path)
        config = json.loads((tmp_path / "h" / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"]
        return config["dtype"]

    half = {key: tensor.to(torch.bfloat16) for key, tensor in model.state_dict().items()}
    assert dtype_written(half) == "bfloat16"
    assert not caplog.messages
    norms = {key: tensor.float() for key, tensor in half.items() if tensor.ndim == 1}
    assert dtype_written(half | norms | {"output.proj.weight": half["output.proj.weight"]}) == (
        "bfloat16"
    )
    assert "h: parameters of several dtypes (" in caplog.text
    assert "224 in float32): config.json says bfloat16" in caplog.text
    last = {"output.proj.weight": half["output.proj.weight"].float()}
    assert dtype_written(half | last) == "bfloat16"  # not the last tensor's, however large
    # Many small tensors are fewer parameters than a few large ones.
    large = {k: t.float() for k, t in half.items() if t.ndim == 2 and t.numel() > 2000}
    assert dtype_written(half | large) == "float32"


def test_hf_round_trip_is_bit_identical(hf_folder, tmp_path, monkeypatch):
    llama = meta_device(model_args_from_folder(hf_folder, max_seq_len=64))
    load_into(llama, hf_folder, device=CPU)
    monkeypatch.setattr(export, "HF_SHARD_BYTES", 50_000)
    tokenizer = hf_folder / "tokenizer.model"
    write_hf(llama.state_dict().items(), llama.args, tmp_path / "b", tokenizer)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    shards = {name: load_file(tmp_path / "b" / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 2
    assert all(sum(t.nbytes for t in s.values()) <= 66_000 for s in shards.values())
    before = load_file(hf_folder / "model.safetensors")
    after = {key: shards[name][key] for key, name in index["weight_map"].items()}
    assert_equal_states(dict(sorted(before.items())), dict(sorted(after.items())))
    again = meta_device(llama.args)
    load_into(again, tmp_path / "b", device=CPU)
    assert_equal_states(llama.state_dict(), again.state_dict())


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_transformers_loads_the_export(
    build, transformers, args, num_kv_heads, tmp_path, tiny_tokenizer_path
):
    args = args | {"num_kv_heads": num_kv_heads, "rope_base": 500.0, "norm_eps": 1e-4}
    model = build(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.ndim == 1 else 2)  # more would amplify rounding
    write_hf(model.state_dict().items(), model.args, tmp_path / "h", tiny_tokenizer_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "h")
    tokens = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        ours_BTV = model(tokens)[:, :, 0]
        assert ours_BTV.std() > 0.5
        torch.testing.assert_close(theirs(tokens).logits, ours_BTV, atol=1e-4, rtol=1e-4)
        # The same folder with rows of q and k in our order is another model.
        head_dim = args["embed_dim"] // args["num_heads"]
        rows = rows_from_hf(args["num_heads"], head_dim)
        for layer in theirs.model.layers:
            q, k = layer.self_attn.q_proj, layer.self_attn.k_proj
            q.weight.copy_(q.weight[rows])
            k.weight.copy_(k.weight[rows[: k.weight.shape[0]]])
        assert (theirs(tokens).logits - ours_BTV).abs().max() > 0.1
    assert theirs.generation_config.eos_token_id == 2
    assert theirs.config.max_position_embeddings == args["max_seq_len"]


TEXTS = [
    "def f(x):\n    return x  # done\n",
    "  two  leading spaces",
    "\ttab\r\n\n   x é 漢 🙂 1234",
    "<0x0A> is text",
    " ",
    "",
    Path(spm.__file__).read_text()[:20_000],
]


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_transformers_gives_the_same_token_ids(
    transformers, model, tmp_path, tiny_tokenizer_path, dummy_prefix
):
    path = tmp_path / "tokenizer.model"
    shutil.copy(tiny_tokenizer_path, path)
    if dummy_prefix:  # as Llama-2's own tokenizer has it
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
        proto.normalizer_spec.add_dummy_prefix = True
        path.write_bytes(proto.SerializeToString())
    write_hf(model.state_dict().items(), model.args, tmp_path / "h", path)
    ours = spm.SentencePieceProcessor(model_file=str(path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "h")
    for text in TEXTS:
        ids = [ours.bos_id(), *ours.encode(text)]
        assert theirs.encode(text) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eos_id(), ours.bos_id())
    assert len(theirs) == ours.get_piece_size()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"normalization_rule_name": "nfkc"}, "normalises text before encoding"),
        ({"remove_extra_whitespaces": True}, "normalises text before encoding"),
    ],
)
def test_tokenizers_that_cannot_be_exported(model, tmp_path, options, message):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(Path(spm.__file__).read_text()[:30_000])
    settings = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    }
    spm.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "t"),
        vocab_size=512,
        minloglevel=2,
        **settings | options,
    )
    with pytest.raises(ValueError, match=message):
        write_hf(model.state_dict().items(), model.args, tmp_path / "h", tmp_path / "t.model")
    assert not (tmp_path / "h").exists()


def test_a_tokenizer_without_bos_is_not_exported(model, tmp_path, tiny_tokenizer_path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tiny_tokenizer_path.read_bytes())
    proto.trainer_spec.bos_id = -1
    (tmp_path / "t.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=r"t\.model has no bos piece \(its id is -1 of 512\)"):
        write_hf(model.state_dict().items(), model.args, tmp_path / "h", tmp_path / "t.model")
    (tmp_path / "t.model").write_bytes(b"\xff" * 50)
    from wmtp_modules.checkpoints.hf_tokenizer import write_hf_tokenizer

    with pytest.raises(ValueError, match=r"t\.model is not a SentencePiece model, or is damaged"):
        write_hf_tokenizer(tmp_path / "t.model", tmp_path, max_seq_len=8)
