"""Models of a folder, and the rotary embedding of Llama 3.1 from file to file."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from torchtune.config import instantiate
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE

from wmtp_modules import convert
from wmtp_modules.checkpoints.read import Checkpoint, load_into
from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.checkpoints.write_hf import write_hf
from wmtp_modules.config.file import load_config, read_config
from wmtp_modules.models import mtp_from_checkpoint, mtp_llama2
from wmtp_modules.models.model_builders import LLAMA3_SCALING, ScaledRotaryEmbeddings
from wmtp_modules.parallel.sharding import init_weights_
from wmtp_modules.run.model import checked_model_args

SCALING = LLAMA3_SCALING | {"original_max_position_embeddings": 16}
YAML = """
checkpointer: {checkpoint_dir: "%s"}
tokenizer: {_component_: torchtune.models.llama2.llama2_tokenizer, max_seq_len: 32%s}
model: {_component_: wmtp_modules.models.mtp_from_checkpoint%s}
"""


@pytest.fixture
def model(tiny_model_args):
    made = mtp_llama2(**tiny_model_args, rope_scaling=SCALING)
    init_weights_(made, 0)
    return made


@pytest.fixture
def meta(model, tmp_path, tiny_tokenizer_path):
    save_meta(model, tmp_path / "m", tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    return tmp_path / "m"


@pytest.fixture
def hf(model, tmp_path, tiny_tokenizer_path):
    write_hf(model.state_dict().items(), model.args, tmp_path / "h", tiny_tokenizer_path)
    return tmp_path / "h"


def config_of(tmp_path, folder, tokenizer="", model="", *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(YAML % (folder, tokenizer, model))
    return read_config(["--config", str(path), *overrides])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_scaled_embedding_is_torchtunes(device):
    theirs = Llama3ScaledRoPE(16, 128, 500, 8, 1, 4, 64)
    scaling = LLAMA3_SCALING | {"original_max_position_embeddings": 64}
    with torch.device(device):
        ours = ScaledRotaryEmbeddings(16, 128, 500, scaling)
    if device == "meta":
        ours.to_empty(device="cpu")
        ours.rope_init()
    for name in ("theta", "cache"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-6)
    assert len(set((theirs.theta * 500 ** (torch.arange(0, 16, 2) / 16)).tolist())) > 2


def test_every_fact_is_the_folders(meta, hf, model):
    for folder, n_heads in ((meta, 4), (hf, 1)):
        built = mtp_from_checkpoint(checkpoint_dir=str(folder))
        assert built.args == Checkpoint(folder).args
        assert (built.n_future_tokens, built.args["rope_scaling"]) == (n_heads, SCALING)
        load_into(built, folder, device="cpu")
        tokens = torch.arange(40)[None]
        assert torch.equal(built(tokens)[:, :, 0], model(tokens)[:, :, 0])
    assert mtp_from_checkpoint(checkpoint_dir=str(hf), n_future_tokens=3).n_future_tokens == 3
    with pytest.raises(ValueError, match="n_future_tokens is 4, the model has 3"):
        mtp_from_checkpoint(checkpoint_dir=str(meta), n_future_tokens=3)
    with pytest.raises(ValueError, match="trained on rows of 64 tokens, this run has rows of 65"):
        mtp_from_checkpoint(checkpoint_dir=str(meta), max_seq_len=65)
    with pytest.raises(ValueError, match=r"there is none: set checkpointer\.checkpoint_dir"):
        mtp_from_checkpoint()


@pytest.mark.parametrize("tokenizer", ["", ", path: null"])
def test_model_and_tokenizer_of_a_config_follow_the_folder(tmp_path, meta, tokenizer):
    cfg = config_of(tmp_path, meta, tokenizer)
    assert cfg.tokenizer.path == f"{meta}/tokenizer.model"
    assert checked_model_args(cfg) == Checkpoint(meta).args
    assert load_config(tmp_path / "c.yaml").tokenizer.path == f"{meta}/tokenizer.model"
    # What names another checkpoint, here or in a control, moves both.
    other = config_of(tmp_path, "gone", tokenizer, "", f"checkpointer.checkpoint_dir={meta}")
    assert checked_model_args(other) == Checkpoint(meta).args
    elsewhere = OmegaConf.merge(cfg, {"checkpointer": {"checkpoint_dir": "elsewhere"}})
    assert elsewhere.tokenizer.path == "elsewhere/tokenizer.model"
    assert elsewhere.model.checkpoint_dir == "elsewhere"


def test_what_is_typed_stays_and_is_checked(tmp_path, meta, tiny_tokenizer_path):
    path = f', path: "{tiny_tokenizer_path}"'
    cfg = config_of(tmp_path, meta, path, ", max_seq_len: 48")
    assert cfg.tokenizer.path == str(tiny_tokenizer_path)
    assert checked_model_args(cfg)["max_seq_len"] == 48
    typed = {"_component_": "wmtp_modules.models.mtp_llama2", **Checkpoint(meta).args}
    cfg.model = typed | {"rope_scaling": None}
    with pytest.raises(ValueError, match=r"rope_scaling is \{.* in the checkpoint and None in the"):
        checked_model_args(cfg)
    cfg.model = typed
    assert checked_model_args(cfg) == Checkpoint(meta).args
    with pytest.raises(ValueError, match=r"rope_scaling is of type 'linear', only 'llama3'"):
        instantiate(OmegaConf.create(typed | {"rope_scaling": {"type": "linear", "factor": 2}}))


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_mistral_v03_is_a_llama(hf, tmp_path, capsys):
    """Its folder holds the format of Mistral as well, and a tokenizer of two names."""
    edit(hf / "config.json", model_type="mistral", sliding_window=None, architectures=["Mistral"])
    (hf / "params.json").write_text('{"dim": 32, "hidden_dim": 64}')
    (hf / "consolidated.safetensors").touch()
    (hf / "tokenizer.model.v3").touch()
    assert mtp_from_checkpoint(checkpoint_dir=str(hf)).args == Checkpoint(hf).args
    assert convert.main([str(hf), str(tmp_path / "out"), "--to", "mtp"]) == 0
    told = capsys.readouterr().out
    for part in (
        "Kept: 512 pieces (tokenizer.model), context of 64 tokens, rotary base 10000, scaled as "
        "Llama 3's by 8 from 16 tokens, width 32 and 64, 4 heads of queries and 2 of keys and "
        "values, norm_eps 1e-05, float32",
        "3 extra head(s) made, copies of the last block; model_type mistral is llama's; not copied",
        "tokenizer.model.v3",
    ):
        assert part in told
    assert Checkpoint(tmp_path / "out").args["rope_scaling"] == SCALING


def test_metas_llama_3_scales_without_saying_by_how_much(meta):
    params = json.loads((meta / "params.json").read_text())
    assert params.pop("rope_scaling") == SCALING
    (meta / "params.json").write_text(json.dumps(params))
    assert Checkpoint(meta).args["rope_scaling"] == LLAMA3_SCALING
    edit(meta / "params.json", rope_scaling={"factor": -1})
    with pytest.raises(
        ValueError, match=r"params.json: rope_scaling.factor must be a number above"
    ):
        Checkpoint(meta)


def test_transformers_computes_the_same(hf, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="the reward extra is not installed")
    theirs = transformers.LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)
    ours = mtp_from_checkpoint(checkpoint_dir=str(hf))
    load_into(ours, hf, device="cpu")
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(tokens).logits, ours(tokens)[:, :, 0], rtol=1e-4, atol=1e-5
        )
