"""The command line of ``python -m wmtp_modules.convert``, in this process."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2

from wmtp_modules import convert
from wmtp_modules.checkpoints.read import Checkpoint
from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.checkpoints.write_hf import write_hf
from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.sharding import init_weights_


def make(save, args, folder, tokenizer, dtype=torch.bfloat16):
    model = mtp_llama2(**args)
    init_weights_(model, seed=0)
    save(model, folder, tokenizer_path=tokenizer, dtype=dtype)
    return str(folder)


def make_hf(args, folder, tokenizer):
    model = mtp_llama2(**args)
    init_weights_(model, seed=0)
    write_hf(model.to(torch.bfloat16).state_dict().items(), model.args, folder, tokenizer)
    return str(folder)


@pytest.fixture
def meta(tiny_model_args, tmp_path, tiny_tokenizer_path):
    return make(save_meta, tiny_model_args, tmp_path / "meta", tiny_tokenizer_path)


@pytest.fixture
def hf(tiny_model_args, tmp_path, tiny_tokenizer_path):
    args = tiny_model_args | {"num_layers": 3, "n_future_tokens": 1}
    return make_hf(args, tmp_path / "hf", tiny_tokenizer_path)


def test_meta_to_hf_is_the_model_itself(meta, tiny_model_args, tmp_path, capsys):
    assert convert.main([meta, str(tmp_path / "out"), "--to", "hf"]) == 0
    assert "out: Hugging Face format, 2 trunk blocks, 1 head(s), 0.00 GB" in capsys.readouterr().out
    make_hf(tiny_model_args, tmp_path / "exported", Path(meta) / "tokenizer.model")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    for name in names:
        want = (tmp_path / "exported" / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == want


def test_hf_to_mtp_to_hf(hf, tmp_path):
    mtp, back = tmp_path / "mtp", tmp_path / "back"
    assert convert.main([hf, str(mtp), "--to", "mtp", "--n-future-tokens", "3"]) == 0
    checkpoint = Checkpoint(mtp)
    assert (checkpoint.args["num_layers"], checkpoint.args["n_future_tokens"]) == (5, 3)
    # Heads of their own in the file, not one tensor under several names.
    state = torch.load(mtp / "consolidated.pth")
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert convert.main([str(mtp), str(back), "--to", "hf"]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (back / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_hf_to_mtp_makes_four_heads(hf, tmp_path):
    assert convert.main([hf, str(tmp_path / "mtp"), "--to", "mtp"]) == 0
    assert Checkpoint(tmp_path / "mtp").args["n_future_tokens"] == 4


def test_hf_to_meta_to_hf(hf, tmp_path):
    assert convert.main([hf, str(tmp_path / "m"), "--to", "meta"]) == 0
    assert Checkpoint(tmp_path / "m").args["n_future_tokens"] == 1
    assert convert.main([str(tmp_path / "m"), str(tmp_path / "b"), "--to", "hf"]) == 0
    config = (tmp_path / "b" / "config.json").read_text()
    assert config == (tmp_path / "hf" / "config.json").read_text()  # context length included
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "b"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_meta_to_meta_is_the_same_file(meta, tmp_path):
    (tmp_path / "again").mkdir()  # an empty folder is welcome
    assert convert.main([meta, str(tmp_path / "again"), "--to", "meta"]) == 0
    for name in ("consolidated.pth", "params.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "meta" / name).read_bytes()


def test_large_checkpoints_show_a_bar(meta, hf, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "LARGE", 0)
    assert convert.main([meta, str(tmp_path / "a"), "--to", "hf"]) == 0
    assert re.search(r"writing: (\S+)/\1 B .*B/s", capsys.readouterr().err)
    assert convert.main([hf, str(tmp_path / "b"), "--to", "meta"]) == 0
    assert re.search(r"writing: .*B/s", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{meta}", "{tmp}/meta", "--to", "hf"], "meta is not an empty folder: give a new one"),
        (["{tmp}/none", "{tmp}/out", "--to", "hf"], "none is not a checkpoint"),
        (["{meta}", "{tmp}/out", "--to", "mtp"], "meta is in Meta's format"),
        (["{hf}", "{tmp}/out", "--to", "mtp", "--n-future-tokens", "1"], "must be at least 2"),
        (["{hf}", "{tmp}/out", "--to", "hf", "--n-future-tokens", "4"], "requires --to mtp"),
        (["{meta}", "{meta}/params.json", "--to", "hf"], "params.json is not an empty folder"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(meta, hf, tmp_path, capsys, arguments, message):
    filled = [argument.format(meta=meta, hf=hf, tmp=tmp_path) for argument in arguments]
    assert convert.main(filled) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_failed_conversion_leaves_nothing(meta, tmp_path, capsys):
    """A tokenizer that cannot be expressed shows when the folder is begun."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(
        Path(meta, "tokenizer.model").read_bytes()
    )
    proto.trainer_spec.model_type = 1  # unigram
    Path(meta, "tokenizer.model").write_bytes(proto.SerializeToString())
    before = sorted(path.name for path in tmp_path.iterdir())
    assert convert.main([meta, str(tmp_path / "out"), "--to", "hf"]) == 1
    assert "is not a BPE model" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_wrong_arguments_exit_with_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        convert.main(["a", "b", "--to", "onnx"])
    assert "invalid choice: 'onnx'" in capsys.readouterr().err


def test_two_conversions_into_one_folder(meta, tmp_path, children, capfd):
    """The same one twice: both succeed. Another one: it says so, and what was there stays."""

    def both(*ways):
        out = tmp_path / "-".join(ways)
        gate = tmp_path / f"{out.name}.gate"  # on a busy machine one may begin after the other

        def one(to, name):
            gate.with_suffix(name).touch()
            while not all(gate.with_suffix(f".{i}").exists() for i in (0, 1)):
                time.sleep(0.01)
            sys.exit(convert.main([meta, str(out), "--to", to]))

        started = [children.begin(one, to, f".{i}") for i, to in enumerate(ways)]
        return out, children.ends(*started)

    for to in ("hf", "meta"):
        out, codes = both(to, to)
        assert codes == [0, 0], capfd.readouterr().err
        Checkpoint(out)
    out, codes = both("hf", "meta")
    assert sorted(codes) == [0, 1]
    kinds = ["config.json", "params.json"]
    assert [(out / name).exists() for name in kinds] == [code == 0 for code in codes]
    assert len(list(out.iterdir())) == (6 if codes[0] == 0 else 3)
    told = capfd.readouterr().err
    assert "made something else in" in told or "is not an empty folder" in told
    assert not list(tmp_path.glob("*.partial*"))
