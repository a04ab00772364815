"""Checkpoint folders are read into models; of a defective one, one clear error each."""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

from wmtp_modules.checkpoints import write_hf as export
from wmtp_modules.checkpoints.names import parameter_shapes
from wmtp_modules.checkpoints.read import (
    Checkpoint,
    check_folder,
    check_model,
    check_same_vocabulary,
    check_vocab,
    load_into,
    model_args_from_folder,
)
from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.models import mtp_llama2

CPU = torch.device("cpu")


def meta_device(args):
    with torch.device("meta"):
        return mtp_llama2(**args)


def assert_equal_states(a, b):
    assert list(a) == list(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=key)


def edit_json(file: Path, **fields) -> None:
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@contextmanager
def edited_weights(file: Path):
    """Change the tensors of a file in place."""
    load, save = (torch.load, torch.save) if file.suffix == ".pth" else (load_file, save_file)
    state = {key: value.clone() for key, value in load(file).items()}
    yield state
    file.unlink()
    save(state, file)


# ------------------------------------------------------------- Meta's format


def test_loading_converts_the_dtype_and_makes_the_rope_tables(model, args, meta_folder):
    loaded = meta_device(args)
    load_into(loaded, meta_folder, device=CPU)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens), loaded(tokens))
    half = meta_device(args)
    for parameter in half.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    load_into(half, meta_folder, device=CPU)
    assert_equal_states(model.to(torch.bfloat16).state_dict(), half.state_dict())
    assert torch.equal(
        half.layers[0].attn.pos_embeddings.cache, loaded.layers[0].attn.pos_embeddings.cache
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"intermediate_dim": 88, "norm_eps": 1e-6, "rope_base": 500_000.0},
        {"intermediate_dim": 256},
        {"intermediate_dim": 3},
        {"n_future_tokens": 1, "num_kv_heads": 4},
    ],
)
def test_params_json_gives_the_arguments_back(build, args, changes, tmp_path, tiny_tokenizer_path):
    args = args | changes
    folder = tmp_path / "m"
    save_meta(build(args), folder, tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    assert model_args_from_folder(folder, max_seq_len=64) == args
    # Of the fields that determine the width, none is needed: the tensors know it.
    edit_json(folder / "params.json", multiple_of=None, ffn_dim_multiplier=None, vocab_size=-1)
    assert model_args_from_folder(folder, max_seq_len=64) == args


def test_released_params_json_is_enough(build, tmp_path, tiny_tokenizer_path, args):
    args = args | {"intermediate_dim": 256, "num_kv_heads": 4}
    folder = tmp_path / "m"
    save_meta(build(args), folder, tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    (folder / "consolidated.pth").rename(folder / "consolidated.00.pth")
    with edited_weights(folder / "consolidated.00.pth") as state:
        state["rope.freqs"] = torch.zeros(4)  # a table, not a parameter
    (folder / "params.json").write_text(
        '{"dim": 32, "n_layers": 6, "n_heads": 4, "n_future_tokens": 4}'
    )
    assert model_args_from_folder(folder, max_seq_len=64, n_future_tokens=4) == args


def test_context_length_is_kept(build, model, args, hf_folder, tmp_path, tiny_tokenizer_path):
    """Meta's files do not name theirs, which is 4096; only another one is written."""
    common = dict(tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    for context in (64, 4096):
        folder = tmp_path / str(context)
        save_meta(build(args | {"max_seq_len": context}), folder, **common)
        params = json.loads((folder / "params.json").read_text())
        assert params.get("max_seq_len", 4096) == context
        assert ("max_seq_len" in params) == (context != 4096)
        assert Checkpoint(folder).args["max_seq_len"] == context
    edit_json(hf_folder / "config.json", max_position_embeddings=100)
    assert Checkpoint(hf_folder).args["max_seq_len"] == 100
    # Training on shorter rows does not shorten what the weights are good for; on longer, it does.
    for context in (16, 128):
        tuned = meta_device(args | {"max_seq_len": context})
        load_into(tuned, tmp_path / "64", device=CPU)
        assert tuned.max_seq_len == context
        save_meta(tuned, tmp_path / "again", **common)
        assert Checkpoint(tmp_path / "again").args["max_seq_len"] == max(context, 64)


def test_a_context_too_short_for_the_rows(meta_folder, args, tiny_tokenizer_path):
    with pytest.raises(ValueError, match=r"m was trained on rows of 64 tokens, this run has rows"):
        model_args_from_folder(meta_folder, max_seq_len=65)
    message = r"tokenizer.max_seq_len 65 exceeds model.max_seq_len 64: raise the model's"
    for folder in (None, meta_folder):
        check_model(args, tiny_tokenizer_path, 64, folder)
        with pytest.raises(ValueError, match=message):
            check_model(args, tiny_tokenizer_path, 65, folder)


def test_a_model_from_nothing_fits_its_tokenizer(meta_folder, args, tiny_tokenizer_path, tmp_path):
    with pytest.raises(ValueError, match="has 512 pieces but tok_embeddings has 500 rows"):
        check_model(args | {"vocab_size": 500}, tiny_tokenizer_path, 64)
    with pytest.raises(ValueError, match=r"none.model is missing: that file does not exist"):
        check_model(args, tmp_path / "none.model", 64)
    with pytest.raises(ValueError, match=r"params.json describes another model"):
        check_model(args | {"norm_eps": 1e-3}, tiny_tokenizer_path, 64, meta_folder)


# ------------------------------------------------------------- Hugging Face


def test_heads_start_as_copies_of_the_last_block(hf_folder, tmp_path):
    args = model_args_from_folder(hf_folder, max_seq_len=64, n_future_tokens=4)
    assert (args["num_layers"], args["n_future_tokens"]) == (6, 4)
    mtp, llama = meta_device(args), meta_device(model_args_from_folder(hf_folder, max_seq_len=64))
    load_into(mtp, hf_folder, device=CPU)
    load_into(llama, hf_folder, device=CPU)
    for head in mtp.heads:
        assert_equal_states(head.state_dict(), llama.heads[0].state_dict())
    tokens = torch.arange(12)[None]
    assert torch.equal(mtp(tokens), llama(tokens).expand(-1, -1, 4, -1))
    # Meta's format can hold it, heads of their own: a change of one leaves the others alone.
    tokenizer = hf_folder / "tokenizer.model"
    save_meta(mtp, tmp_path / "m", tokenizer_path=tokenizer, dtype=torch.float32)
    state = torch.load(tmp_path / "m" / "consolidated.pth")
    state["extra_heads.0.ffn_norm.weight"].zero_()
    assert state["extra_heads.1.ffn_norm.weight"].abs().min() > 0


def test_torch_weights_of_older_hub_folders(hf_folder):
    state = load_file(hf_folder / "model.safetensors")
    expected = Checkpoint(hf_folder).read("heads.0.attn.k_proj.weight").clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    torch.save(state, hf_folder / "pytorch_model.bin")
    (hf_folder / "model.safetensors").unlink()
    assert torch.equal(Checkpoint(hf_folder).read("heads.0.attn.k_proj.weight"), expected)


def test_tied_embeddings_are_read_twice(hf_folder, tmp_path):
    edit_json(hf_folder / "config.json", tie_word_embeddings=True)
    with edited_weights(hf_folder / "model.safetensors") as state:
        del state["lm_head.weight"]
    checkpoint = Checkpoint(hf_folder)
    embedding = checkpoint.read("tok_embeddings.weight")
    assert torch.equal(checkpoint.read("output.proj.weight"), embedding)
    llama = meta_device(checkpoint.args)
    load_into(llama, hf_folder, device=CPU)
    assert torch.equal(llama.output.proj.weight, embedding)


def test_rope_base_of_both_transformers_generations(hf_folder):
    config = hf_folder / "config.json"
    edit_json(config, rope_parameters={"rope_type": "default", "rope_theta": 7.0}, rope_theta=None)
    assert Checkpoint(hf_folder).args["rope_base"] == 7.0
    edit_json(config, rope_parameters=None, rope_theta=9.0)
    assert Checkpoint(hf_folder).args["rope_base"] == 9.0


def test_our_loader_reads_what_transformers_saves(transformers, tmp_path, tiny_tokenizer_path):
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    shutil.copy(tiny_tokenizer_path, tmp_path / "tokenizer.model")
    ours = meta_device(model_args_from_folder(tmp_path, max_seq_len=64))
    load_into(ours, tmp_path, device=CPU)
    tokens = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        logits = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens)[:, :, 0], logits, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------- sharded models


@pytest.mark.parametrize("rows", [(0, 7), (7, 20), (31, 32), (5, 5)])
def test_rows_of_a_reordered_projection(hf_folder, rows):
    checkpoint = Checkpoint(hf_folder)
    for key in ("layers.0.attn.q_proj.weight", "tok_embeddings.weight"):
        assert torch.equal(checkpoint.read(key, *rows), checkpoint.read(key)[slice(*rows)])


# ------------------------------------------------------------- one clear error each


def test_wrong_n_future_tokens(meta_folder, args):
    message = "params.json: n_future_tokens is 4, the model has 2: set model.n_future_tokens to 4"
    with pytest.raises(ValueError, match=message):
        load_into(meta_device(args | {"n_future_tokens": 2}), meta_folder, device=CPU)
    with pytest.raises(ValueError, match=message):
        model_args_from_folder(meta_folder, max_seq_len=64, n_future_tokens=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 8, "num_kv_heads": 4},
            "num_heads is 4 in the checkpoint and 8 in the model",
        ),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-05 in the checkpoint and 1e-06"),
        ({"rope_base": 5.0}, "rope_base is 10000.0 in the checkpoint and 5.0"),
        ({"num_layers": 7}, "params.json describes another model:\n  num_layers is 6"),
    ],
)
def test_another_model(meta_folder, args, tiny_tokenizer_path, changes, message):
    model = meta_device(args | changes)
    with pytest.raises(ValueError, match=message):
        load_into(model, meta_folder, device=CPU)
    with pytest.raises(ValueError, match=message):
        check_folder(meta_folder, model.args, tiny_tokenizer_path)
    assert model.tok_embeddings.weight.is_meta  # nothing was allocated


def test_a_longer_context_is_not_another_model(meta_folder, args, tiny_tokenizer_path):
    check_folder(meta_folder, args | {"max_seq_len": 8}, tiny_tokenizer_path)


def defective(folder: Path, is_hf: bool):
    file = folder / ("model.safetensors" if is_hf else "consolidated.pth")
    key = "model.layers.1.self_attn.k_proj.weight" if is_hf else "layers.1.attention.wk.weight"
    return file, key


@pytest.mark.parametrize("layout", ["meta_folder", "hf_folder"])
@pytest.mark.parametrize("defect", ["missing", "extra", "shape", "all"])
def test_keys_that_do_not_fit(layout, defect, request):
    folder = request.getfixturevalue(layout)
    file, key = defective(folder, layout == "hf_folder")
    lines = []
    with edited_weights(file) as state:
        if defect in ("missing", "all"):
            lines.append(f"missing key {key}")
            del state[key]
        if defect in ("shape", "all"):
            other = key.replace("1", "0", 1)
            lines.append(f"key {other} in {file.name} has shape [16, 31], not [16, 32]")
            state[other] = torch.zeros(16, 31)
        if defect in ("extra", "all"):
            lines.append(f"extra key layers.0.bias in {file.name}")
            state["layers.0.bias"] = torch.zeros(1)
    with pytest.raises(ValueError, match="does not hold what") as error:
        model_args_from_folder(folder, max_seq_len=64)
    headline, *found = str(error.value).split("\n  ")
    assert str(file) in headline
    assert sorted(found) == sorted(lines)


def test_many_problems_are_counted(meta_folder):
    with edited_weights(meta_folder / "consolidated.pth") as state:
        for key in [key for key in state if key.startswith("extra_heads.")]:
            del state[key]
    with pytest.raises(ValueError, match=r"missing key extra_heads.0") as error:
        Checkpoint(meta_folder)
    assert len(str(error.value).splitlines()) == 12
    assert str(error.value).endswith("and 17 more")


@pytest.mark.parametrize("key", ["tok_embeddings.weight", "layers.0.feed_forward.w1.weight"])
def test_missing_key_that_determines_a_shape(meta_folder, key):
    edit_json(meta_folder / "params.json", vocab_size=-1, multiple_of=None, ffn_dim_multiplier=None)
    with edited_weights(meta_folder / "consolidated.pth") as state:
        del state[key]
    with pytest.raises(ValueError, match=f"consolidated.pth: missing key {key}"):
        Checkpoint(meta_folder)


def test_width_that_params_json_denies(meta_folder):
    edit_json(meta_folder / "params.json", multiple_of=256, ffn_dim_multiplier=None)
    message = r"feed_forward.w1.weight in consolidated.pth has shape \[64, 32\], not \[256, 32\]"
    with pytest.raises(ValueError, match=message):
        Checkpoint(meta_folder)


@pytest.mark.parametrize("layout", ["meta_folder", "hf_folder"])
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_truncated_file(layout, keep, request):
    folder = request.getfixturevalue(layout)
    file, _ = defective(folder, layout == "hf_folder")
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=f"{file.name} is truncated or damaged"):
        model_args_from_folder(folder, max_seq_len=64)


@pytest.fixture
def sharded_hf_folder(hf_folder, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(export, "HF_SHARD_BYTES", 80_000)
    checkpoint = Checkpoint(hf_folder)
    tensors = ((key, checkpoint.read(key)) for key in parameter_shapes(checkpoint.args))
    folder = tmp_path / "s"
    export.write_hf(tensors, checkpoint.args, folder, checkpoint.tokenizer_path)
    return folder


def test_truncated_or_missing_shard(sharded_hf_folder):
    shard = sorted(sharded_hf_folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{shard.name} is truncated or damaged"):
        Checkpoint(sharded_hf_folder)
    shard.unlink()
    with pytest.raises(ValueError, match=f"index.json names shards that are missing: {shard.name}"):
        Checkpoint(sharded_hf_folder)


def test_missing_key_of_a_sharded_folder(sharded_hf_folder):
    shard = sorted(sharded_hf_folder.glob("*.safetensors"))[1]
    with edited_weights(shard) as state:
        key = next(iter(state))
        del state[key]
    with pytest.raises(ValueError, match=rf"\d weight files\) .*\n  missing key {key}"):
        Checkpoint(sharded_hf_folder)


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_pickle_that_carries_code(meta_folder, capsys):
    torch.save({"a": Code()}, meta_folder / "consolidated.pth")
    with pytest.raises(ValueError, match=r"consolidated.pth carries Python code or objects"):
        Checkpoint(meta_folder)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"a": 1}, {"model": {"a": torch.zeros(1)}}])
def test_file_without_a_state_dict(meta_folder, content):
    torch.save(content, meta_folder / "consolidated.pth")
    with pytest.raises(ValueError, match=r"consolidated.pth does not hold a dictionary of tensors"):
        Checkpoint(meta_folder)


def test_format_before_torch_1_6(meta_folder):
    file = meta_folder / "consolidated.pth"
    torch.save({"a": torch.zeros(1)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"consolidated.pth is in torch's format from before 1.6"):
        Checkpoint(meta_folder)


def test_vocabulary_of_another_tokenizer(meta_folder, tiny_tokenizer_path, args, tmp_path):
    other = tmp_path / "other"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(Path(spm.__file__).read_text())
    for size in (512, 500):
        spm.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=f"{other}{size}",
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
    check_vocab(tiny_tokenizer_path, 512)
    check_same_vocabulary(tiny_tokenizer_path, meta_folder / "tokenizer.model")
    with pytest.raises(ValueError, match=r"the vocabularies of .*other512.model and .* differ in"):
        check_folder(meta_folder, args, f"{other}512.model")
    with pytest.raises(ValueError, match=r"the vocabularies of .* differ in"):
        check_same_vocabulary(tiny_tokenizer_path, f"{other}500.model")
    message = "500.model has 500 pieces but tok_embeddings has 512 rows"
    model = meta_device(args)
    with pytest.raises(ValueError, match=message):
        save_meta(model, tmp_path / "x", tokenizer_path=f"{other}500.model", dtype=torch.float32)
    shutil.copy(f"{other}500.model", meta_folder / "tokenizer.model")
    with pytest.raises(
        ValueError, match=r"tokenizer.model has 500 pieces but tok_embeddings has 512"
    ):
        load_into(model, meta_folder, device=CPU)
    (meta_folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"tokenizer.model is not a SentencePiece model"):
        Checkpoint(meta_folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("params.json", "is not a checkpoint: it has neither params.json .* nor config.json"),
        ("consolidated.pth", "consolidated.pth is missing beside params.json"),
        ("tokenizer.model", "tokenizer.model is missing"),
    ],
)
def test_incomplete_meta_folder(meta_folder, name, message):
    (meta_folder / name).unlink()
    with pytest.raises(ValueError, match=message):
        Checkpoint(meta_folder)


def test_incomplete_hf_folder(hf_folder):
    (hf_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing beside config.json"):
        Checkpoint(hf_folder)


def test_model_parallel_parts(meta_folder):
    (meta_folder / "consolidated.pth").rename(meta_folder / "consolidated.00.pth")
    shutil.copy(meta_folder / "consolidated.00.pth", meta_folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match="holds 2 model-parallel parts"):
        Checkpoint(meta_folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"dim": 32', "params.json is not valid JSON"),
        ("[]", "params.json does not hold a JSON object"),
        ('{"dim": 32}', "params.json has no 'n_heads'"),
    ],
)
def test_bad_params_json(meta_folder, text, message):
    (meta_folder / "params.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Checkpoint(meta_folder)


@pytest.mark.parametrize(
    ("field", "value", "must"),
    [
        ("dim", "32", "a whole number, at least 1"),
        ("dim", None, "a whole number, at least 1"),
        ("n_heads", 0, "a whole number, at least 1"),
        ("n_heads", True, "a whole number, at least 1"),
        ("n_kv_heads", -2, "a whole number, at least 1"),
        ("n_layers", 6.0, "a whole number, at least 1"),
        ("n_future_tokens", 0, "a whole number, at least 1"),
        ("vocab_size", 0, "a whole number, at least 1"),
        ("vocab_size", "512", "a whole number, at least 1"),
        ("multiple_of", 0, "a whole number, at least 1"),
        ("max_seq_len", 0, "a whole number, at least 1"),
        ("ffn_dim_multiplier", "1", "a number above 0"),
        ("norm_eps", 0, "a number above 0"),
        ("norm_eps", "1e-5", "a number above 0"),
        ("rope_theta", -1.0, "a number above 0"),
    ],
)
def test_bad_field_of_params_json(meta_folder, field, value, must):
    file = meta_folder / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    message = f"params.json: {field} must be {must}, got {re.escape(json.dumps(value))}$"
    with pytest.raises(ValueError, match=message):
        Checkpoint(meta_folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layers": 4}, "params.json: n_layers is 4 and n_future_tokens 4"),
        ({"n_layers": 3}, "params.json: n_layers is 3 and n_future_tokens 4"),
        ({"n_heads": 3}, "params.json: a width of 32 does not divide into 3 heads"),
        ({"n_heads": 32}, "a width of 32 does not divide into 32 heads of an even width"),
        ({"n_kv_heads": 3}, "or these into 3 groups of keys and values"),
    ],
)
def test_fields_that_do_not_fit_together(meta_folder, fields, message):
    edit_json(meta_folder / "params.json", **fields)
    with pytest.raises(ValueError, match=message):
        Checkpoint(meta_folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "32"),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 1.5),
        ("num_hidden_layers", 1),
        ("vocab_size", -1),
        ("intermediate_size", [64]),
        ("max_position_embeddings", "long"),
        ("rms_norm_eps", True),
        ("rope_theta", 0),
    ],
)
def test_bad_field_of_config_json(hf_folder, field, value):
    edit_json(hf_folder / "config.json", **{field: value}, rope_parameters=None)
    with pytest.raises(ValueError, match=f"config.json: {field} must be .*, got "):
        Checkpoint(hf_folder)


def test_index_without_a_weight_map(sharded_hf_folder):
    edit_json(sharded_hf_folder / "model.safetensors.index.json", weight_map=["a"])
    with pytest.raises(ValueError, match=r"index.json has no 'weight_map' from keys to files"):
        Checkpoint(sharded_hf_folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
        ({"rope_parameters": 3}, "rope_parameters is 3, not a JSON object"),
        ({"model_type": "qwen3"}, "model_type is 'qwen3', which needs norms of queries and keys"),
        ({"model_type": None}, "model_type is None, which needs a model of its own"),
        (
            {"model_type": "mistral", "sliding_window": 4096},
            "sliding_window is 4096, which needs attention to the last tokens only",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn', a rotary"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling.low_freq_factor must be a number above 0, got None",
        ),
        ({"num_hidden_layers": None}, "config.json has no 'num_hidden_layers'"),
    ],
)
def test_other_llamas(hf_folder, fields, message):
    edit_json(hf_folder / "config.json", **fields)
    with pytest.raises(ValueError, match=message):
        Checkpoint(hf_folder)


# ------------------------------------------------------------ files that mean harm, or are odd


class RunsCode:
    """Unpickled by an ordinary ``torch.load``, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "it ran"))


def test_code_in_a_torch_file_does_not_run(meta_folder, tmp_path):
    spy = tmp_path / "spy"
    torch.save({"tok_embeddings.weight": RunsCode(spy)}, meta_folder / "consolidated.pth")
    with pytest.raises(ValueError, match=r"consolidated\.pth carries Python code or objects"):
        Checkpoint(meta_folder)
    assert not spy.exists()
    torch.load(meta_folder / "consolidated.pth", weights_only=False)
    assert spy.exists()  # it would have


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b", "..", "", 3])
def test_an_index_cannot_name_a_file_elsewhere(hf_folder, shard):
    (hf_folder / "model.safetensors").rename(hf_folder.parent / "secret.safetensors")
    index = hf_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(
        ValueError, match=r"index\.json names the shard .* not a file in its folder"
    ):
        Checkpoint(hf_folder)


@pytest.mark.parametrize(
    ("odd", "match"),
    [
        (lambda x: x.to(torch.int64), r"is a tensor of torch\.int64"),
        (lambda x: x.to(torch.complex64), r"is a tensor of torch\.complex64"),
        (lambda x: x.to(torch.float8_e4m3fn), r"is a tensor of torch\.float8_e4m3fn"),
        (lambda x: x.to_sparse(), r"torch\.sparse_coo: weights are plain"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), r"carries Python|qint8"),
        (lambda x: x.to("meta"), r"was saved without its values|carries Python"),
        (lambda x: [x], "does not hold a dictionary of tensors"),
    ],
)
def test_a_weight_that_is_no_plain_number(meta_folder, odd, match):
    file = meta_folder / "consolidated.pth"
    with edited_weights(file) as state:
        state["norm.weight"] = odd(state["norm.weight"])
    with pytest.raises(ValueError, match=match):
        Checkpoint(meta_folder)


def test_views_of_one_storage_are_read_as_what_they_are(meta_folder, args):
    """As torch.save writes heads that were cut out of one tensor."""
    file = meta_folder / "consolidated.pth"
    with edited_weights(file) as state:
        both = torch.stack([state["norm.weight"], torch.arange(32.0)])
        state["norm.weight"] = both[1]
    assert torch.equal(Checkpoint(meta_folder).read("output.norm.scale"), torch.arange(32.0))


def test_more_layers_than_tensors_is_told_at_once(meta_folder):
    edit_json(meta_folder / "params.json", n_layers=10**9)
    with pytest.raises(ValueError, match=r"1000000000 layers cannot be in .*consolidated\.pth"):
        Checkpoint(meta_folder)


@pytest.mark.parametrize("value", [10**400, 2**31, True, "32", [32], 3.0])
def test_a_size_beyond_reason(meta_folder, value):
    edit_json(meta_folder / "params.json", dim=value)
    with pytest.raises(ValueError, match=r"params\.json: dim must be a whole number"):
        Checkpoint(meta_folder)


def test_a_folder_that_a_kill_left_aside_is_found(meta_folder):
    meta_folder.rename(meta_folder.with_name("m.old"))
    Checkpoint(meta_folder)
    assert [path.name for path in meta_folder.parent.glob("m*")] == ["m"]


def test_a_tokenizer_with_a_piece_that_is_no_text(meta_folder):
    path = meta_folder / "tokenizer.model"
    data = path.read_bytes()
    damaged = data.replace(b"def", b"d\xfff", 1)
    assert damaged != data
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"tokenizer\.model is (damaged|not a SentencePie)"):
        Checkpoint(meta_folder)


# ------------------------------------------------- a key in two files, and what an index says


def write_shards(folder: Path, suffix: str = ".safetensors", index: bool = True) -> dict[str, str]:
    """Cut a folder's weights into a and b, each also with a copy of the other's norm, of zeros."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(state)
    file_of = {key: f"{'ab'[i % 2]}{suffix}" for i, key in enumerate(keys)}
    for name in sorted(set(file_of.values())):
        part = {key: state[key] for key in keys if file_of[key] == name}
        part.setdefault(NORM, torch.zeros(32))
        save_file(part, folder / name) if suffix == ".safetensors" else torch.save(
            part, folder / name
        )
    if index:
        name = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": file_of}))
    return file_of


NORM = "model.norm.weight"


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_index_decides_from_which_file_a_key_comes(hf_folder, suffix, swapped):
    expected = Checkpoint(hf_folder).read("output.norm.scale").clone()
    file_of = write_shards(hf_folder, suffix)
    index = next(hf_folder.glob("*.index.json"))
    if swapped:
        file_of[NORM] = ({f"a{suffix}", f"b{suffix}"} - {file_of[NORM]}).pop()
        expected = torch.zeros(32)
        index.write_text(json.dumps({"weight_map": file_of}))
    assert torch.equal(Checkpoint(hf_folder).read("output.norm.scale"), expected)
    del file_of[NORM]
    index.write_text(json.dumps({"weight_map": file_of}))
    message = (
        rf"key {NORM} is in a\{suffix} and in b\{suffix} of .*, and no index says which counts"
    )
    with pytest.raises(ValueError, match=message):
        Checkpoint(hf_folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_without_their_index(hf_folder, suffix):
    write_shards(hf_folder, suffix, index=False)
    with pytest.raises(ValueError, match=r"index\.json is missing, .* 2 shards \(a\.") as error:
        Checkpoint(hf_folder)
    assert f"key {NORM} is in a{suffix} and in b{suffix}" in str(error.value)


def test_one_shard_of_many_without_the_index(hf_folder):
    (hf_folder / "model.safetensors").rename(hf_folder / "model-00001-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"safetensors\.index\.json is missing, .*00001-of-00003"):
        Checkpoint(hf_folder)


def test_the_index_decides_over_a_file_of_all_weights(hf_folder):
    whole = hf_folder / "model.safetensors"
    state = load_file(whole)
    save_file(state | {NORM: torch.zeros(32)}, hf_folder / "new.safetensors")
    index = hf_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "new.safetensors")}))
    assert not Checkpoint(hf_folder).read("output.norm.scale").any()
    (hf_folder / "new.safetensors").unlink()  # an index that is left over from shards
    assert torch.equal(Checkpoint(hf_folder).read("output.norm.scale"), state[NORM])


def test_an_index_that_names_a_file_without_the_key(hf_folder):
    file_of = write_shards(hf_folder)
    key = next(key for key, name in file_of.items() if name == "a.safetensors" and key != NORM)
    index = hf_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": file_of | {key: "b.safetensors"}}))
    message = f"missing key {key}, which the index places in b.safetensors, but it is in a.safe"
    with pytest.raises(ValueError, match=message):
        Checkpoint(hf_folder)
    pairs = ", ".join(f'"{k}": "{v}"' for k, v in [*file_of.items(), (key, "b.safetensors")])
    index.write_text(f'{{"weight_map": {{{pairs}}}}}')
    with pytest.raises(ValueError, match=f"the key '{key}' stands there twice, with different val"):
        Checkpoint(hf_folder)


def test_a_key_in_two_files_of_metas_format(meta_folder):
    shutil.copy(meta_folder / "consolidated.pth", meta_folder / "consolidated.00.pth")
    message = r"key tok_embeddings\.weight is in consolidated\.pth and in consolidated\.00\.pth"
    with pytest.raises(ValueError, match=message):
        Checkpoint(meta_folder)


# ------------------------------------------------------ refusals that say what was found


def renamed(folder: Path, rename) -> None:
    file = next(f for f in folder.iterdir() if f.suffix in (".pth", ".safetensors"))
    with edited_weights(file) as state:
        new = {rename(key): value for key, value in state.items()}
        state.clear()
        state.update(new)


@pytest.mark.parametrize("layout", ["meta_folder", "hf_folder"])
@pytest.mark.parametrize(
    ("rename", "told"),
    [
        ("_orig_mod.{}", "begin with '_orig_mod.', which torch.compile puts there"),
        ("module.{}", "begin with 'module.', which DistributedDataParallel"),
        ("_orig_mod.module.{}", "begin with '_orig_mod.module.'"),
        ("_fsdp_wrapped_module.{}", "begin with '_fsdp_wrapped_module.', which FSDP"),
        ("base_model.model.{}", "begin with 'base_model.model.', which PEFT"),
        ("transformer.{}", "begin with 'transformer.': rename them (transformer."),
        ("state_dict.policy.{}", "begin with 'state_dict.policy.'"),
        (("layers.", "layers._orig_mod."), None),
        ((".0.", ".0._checkpoint_wrapped_module."), "hold the name of a wrapper, which activation"),
        ((".1.", ".1._orig_mod."), "hold the name of a wrapper, which torch.compile"),
    ],
)
def test_keys_that_a_wrapper_wrote(layout, rename, told, request):
    folder = request.getfixturevalue(layout)
    change = rename.format if isinstance(rename, str) else lambda key: key.replace(*rename)
    renamed(folder, change)
    with pytest.raises(ValueError, match=r"keys (begin|hold) .* must be ") as error:
        Checkpoint(folder)
    assert (told or "wrapper") in str(error.value)
    assert "missing key" not in str(error.value)


def test_keys_of_another_format(meta_folder, hf_folder):
    renamed(hf_folder, lambda key: key.removeprefix("model."))
    with pytest.raises(ValueError, match=r"keys lack the prefix 'model\.': rename them"):
        Checkpoint(hf_folder)
    shutil.copy(hf_folder / "config.json", meta_folder)
    (meta_folder / "params.json").unlink()
    (meta_folder / "consolidated.pth").rename(meta_folder / "pytorch_model.bin")
    message = r"holds keys of Meta's format .* config\.json .*: copy params\.json in its place"
    with pytest.raises(ValueError, match=message):
        Checkpoint(meta_folder)


def test_keys_of_torchtunes_format(meta_folder, model):
    torch.save(model.state_dict(), meta_folder / "consolidated.pth")
    with pytest.raises(ValueError, match=r"holds keys of torchtune's format \(layers\.0\.attn"):
        Checkpoint(meta_folder)


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "holds an adapter"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", r"adapter .*merge_and_unload"),
        ("model.layers.0.self_attn.q_proj.qweight", r"holds quantised weights \(key model"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "holds quantised weights"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "holds quantised weights"),
    ],
)
def test_keys_of_adapters_and_quantised_weights(hf_folder, key, match):
    with edited_weights(hf_folder / "model.safetensors") as state:
        state[key] = state.pop("model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(ValueError, match=match):
        Checkpoint(hf_folder)


def test_a_config_of_quantised_weights(hf_folder):
    edit_json(hf_folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(
        ValueError, match=r"quantised weights \(quantization_config in config\.json"
    ):
        Checkpoint(hf_folder)


def test_of_many_problems_those_that_are_there_are_shown(hf_folder):
    renamed(hf_folder, lambda key: f"{key}.v2")
    with pytest.raises(ValueError, match="does not hold what") as error:
        Checkpoint(hf_folder)
    lines = str(error.value).splitlines()[1:]
    kinds = [line.split()[0] for line in lines]
    assert kinds == ["missing"] * 5 + ["extra"] * 5 + ["and"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["weights.safetensors"], "where there is weights.safetensors: a single file of weights"),
        (["optimizer.bin", "training_args.bin"], "config.json, and there are no other weights"),
        (["adapter_model.safetensors"], "adapter_model.safetensors is an adapter without its base"),
        (["model.gguf"], r"where there is model.gguf"),
    ],
)
def test_a_hugging_face_folder_without_weights(hf_folder, files, message):
    (hf_folder / "model.safetensors").unlink()
    for name in files:
        (hf_folder / name).touch()
    with pytest.raises(ValueError, match=message):
        Checkpoint(hf_folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            [],
            r"x is not a checkpoint: it has neither params.json .* nor config.json .Hugging Face.$",
        ),
        (["adapter_config.json", "adapter_model.safetensors"], r"merge_and_unload\(\)"),
        (["__0_0.distcp", ".metadata"], "parts of torch.distributed.checkpoint: convert them"),
        (["llama.Q4_K_M.gguf"], "but llama.Q4_K_M.gguf: take the version in safetensors"),
        (["a/config.json"], "x/a has: give that folder"),
        (["snapshots/abc/config.json"], "x/snapshots/abc has: give that folder"),
        (["consolidated.00.pth"], "where there is consolidated.00.pth: copy its config beside it"),
    ],
)
def test_a_folder_that_is_no_checkpoint(tmp_path, files, message):
    folder = tmp_path / "x"
    with pytest.raises(ValueError, match="is not a checkpoint: there is no such folder"):
        Checkpoint(folder)
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with pytest.raises(ValueError, match=message):
        Checkpoint(folder)


def test_a_file_in_place_of_a_folder(meta_folder):
    with pytest.raises(ValueError, match="is not a checkpoint: it is a file, give its folder"):
        Checkpoint(meta_folder / "consolidated.pth")


def test_metas_folder_with_other_weights(meta_folder, hf_folder):
    (meta_folder / "consolidated.pth").unlink()
    shutil.copy(hf_folder / "model.safetensors", meta_folder)
    shutil.copy(hf_folder / "config.json", meta_folder)
    message = r"params\.json, where there is model\.safetensors; .*, take params\.json out"
    with pytest.raises(ValueError, match=message):
        Checkpoint(meta_folder)


STAND_INS = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "run `git lfs pull`"),
    (b"/annex/objects/MD5E-s123--0123.pth\n", "run `git annex get`"),
    (b"<!doctype html>\n<html></html>", "is a web page .*: download it again"),
    (b"Access to model meta-llama/Llama-2-7b is restricted", "a server's answer"),
]
IN_META = ["consolidated.pth", "params.json", "tokenizer.model"]
IN_HF = ["model.safetensors", "config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize(("content", "told"), STAND_INS)
def test_pointers_and_pages_in_place_of_files(meta_folder, hf_folder, content, told):
    for folder, names in ((meta_folder, IN_META), (hf_folder, IN_HF)):
        for name in names:
            sound = (folder / name).read_bytes() if (folder / name).exists() else None
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=told.replace("is a", "a")) as error:
                Checkpoint(folder)
            assert str(folder / name) in str(error.value)
            assert "damaged" not in str(error.value)
            (folder / name).unlink() if sound is None else (folder / name).write_bytes(sound)


@pytest.mark.parametrize("name", [*IN_META, "model.safetensors", "config.json"])
def test_a_link_to_what_git_annex_has_not_fetched(meta_folder, hf_folder, name):
    folder = meta_folder if name in IN_META else hf_folder
    (folder / name).unlink()
    (folder / name).symlink_to(f"../.git/annex/objects/Xx/0q/MD5E-s1--0/{name}")
    with pytest.raises(ValueError, match=rf"{name} is .*a link to .*: run `git annex get {name}`"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"IQ== 0\nIg== 1\nIw== 2\n", "but a tiktoken vocabulary, as Llama 3 has it"),
        (b'{\n  "version": "1.0", "model": {}}', "but JSON, such as Hugging Face's tokenizer.json"),
        (b"<unk>\t0\n<s>\t0\n\xe2\x96\x81t\t-0\n", "a listing of its pieces: take the .model file"),
        (b"", "it is empty, copy it again"),
        (b"\x0a\x0f\x00\xff", "is not a SentencePiece model, or is damaged"),
        (STAND_INS[0][0], "but a Git LFS pointer, not the file itself: run `git lfs pull`"),
    ],
)
def test_what_is_no_sentencepiece_model(meta_folder, content, told, tmp_path):
    path = meta_folder / "tokenizer.model"
    path.write_bytes(content)
    for read in (
        lambda: Checkpoint(meta_folder),
        lambda: check_vocab(path, 512),
        lambda: check_same_vocabulary(path, path),
    ):
        with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece") as error:
            read()
        assert told in str(error.value)


def test_a_tokenizer_that_is_not_there(meta_folder, tmp_path, tiny_tokenizer_path):
    (meta_folder / "tokenizer.model").rename(meta_folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"does not exist, tokenizer\.json beside it is another"):
        Checkpoint(meta_folder)
    with pytest.raises(ValueError, match=r"none/t\.model is missing: .* neither is its folder"):
        check_vocab(tmp_path / "none" / "t.model", 512)
    with pytest.raises(ValueError, match="but a folder: give the file"):
        check_same_vocabulary(tmp_path, tiny_tokenizer_path)


@pytest.fixture
def longer_tokenizer(tiny_tokenizer_path, tmp_path) -> Path:
    """The tokenizer with one more piece."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(tiny_tokenizer_path).read_bytes())
    proto.pieces.add(piece="<pad>", score=0.0, type=4)
    (tmp_path / "longer.model").write_bytes(proto.SerializeToString())
    return tmp_path / "longer.model"


def test_a_vocabulary_with_one_added_token(hf_folder, longer_tokenizer, tiny_tokenizer_path):
    check_vocab(longer_tokenizer, 513)
    with pytest.raises(ValueError, match=r"513 pieces but .* 512 rows: .* \('<pad>' come last\)"):
        check_vocab(longer_tokenizer, 512)
    message = "longer.model has '<pad>' after the 512 that both have: use "
    for pair in ((longer_tokenizer, tiny_tokenizer_path), (tiny_tokenizer_path, longer_tokenizer)):
        with pytest.raises(ValueError, match=message):
            check_same_vocabulary(*pair)
    edit_json(hf_folder / "config.json", vocab_size=513)
    with edited_weights(hf_folder / "model.safetensors") as state:
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            state[key] = torch.cat([state[key], state[key][:1]])
    told = r"has 512 pieces but tok_embeddings has 513 rows: .*padding{}: cut .* to 512 rows"
    with pytest.raises(ValueError, match=told.format("")):
        Checkpoint(hf_folder)
    (hf_folder / "added_tokens.json").write_text('{"<s>": 1, "<pad>": 512}')
    with pytest.raises(ValueError, match=told.format(r" \(added: '<pad>'\)")):
        Checkpoint(hf_folder)
    (hf_folder / "added_tokens.json").unlink()
    decoder = {"1": {"content": "<s>"}, "512": {"content": "<pad>"}}
    edit_json(hf_folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    with pytest.raises(ValueError, match=told.format(r" \(added: '<pad>'\)")):
        Checkpoint(hf_folder)


def test_weights_under_the_name_of_another_format(meta_folder, hf_folder):
    weights, other = meta_folder / "consolidated.pth", hf_folder / "model.safetensors"
    both = weights.read_bytes(), other.read_bytes()
    weights.write_bytes(both[1])
    other.write_bytes(both[0])
    with pytest.raises(ValueError, match="is a safetensors file under another name"):
        Checkpoint(meta_folder)
    with pytest.raises(ValueError, match="is a torch file under another name"):
        Checkpoint(hf_folder)


def test_a_training_state_in_place_of_weights(meta_folder):
    torch.save({"model": {}, "optimizer": {}, "step": 3}, meta_folder / "consolidated.pth")
    message = "but one of 'model', 'optimizer', 'step': save the model's state_dict alone"
    with pytest.raises(ValueError, match=message):
        Checkpoint(meta_folder)


@pytest.mark.parametrize("name", ["params.json", "config.json", "model.safetensors.index.json"])
def test_json_with_a_byte_order_mark(meta_folder, hf_folder, name):
    folder = meta_folder if name == "params.json" else hf_folder
    if name.endswith("index.json"):
        write_shards(hf_folder)
    args = Checkpoint(folder).args
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert Checkpoint(folder).args == args
