"""Meta's format comes back bit for bit, from sharded models too, and nothing is half-written."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh

from wmtp_modules.checkpoints import write_hf as export
from wmtp_modules.checkpoints.read import (
    Checkpoint,
    load_into,
)
from wmtp_modules.checkpoints.write import save_meta, write_meta
from wmtp_modules.checkpoints.write_hf import write_hf
from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.sharding import shard_model

CPU = torch.device("cpu")


def meta_device(args):
    with torch.device("meta"):
        return mtp_llama2(**args)


def assert_equal_states(a, b):
    assert list(a) == list(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_round_trip_is_bit_identical(model, args, tmp_path, tiny_tokenizer_path, dtype):
    first, second = tmp_path / "a", tmp_path / "b"
    save_meta(model, first, tokenizer_path=tiny_tokenizer_path, dtype=dtype)
    loaded = meta_device(args).to(dtype)
    load_into(loaded, first, device=CPU)
    assert_equal_states(model.to(dtype).state_dict(), loaded.state_dict())
    save_meta(loaded, second, tokenizer_path=first / "tokenizer.model", dtype=dtype)
    for name in ("params.json", "consolidated.pth", "tokenizer.model"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_stored_names_are_metas(meta_folder):
    state = torch.load(meta_folder / "consolidated.pth")
    assert {key.split(".")[1] for key in state if key.startswith("layers.")} == {"0", "1", "2"}
    assert {key.split(".")[1] for key in state if key.startswith("extra_heads.")} == {"0", "1", "2"}
    assert json.loads((meta_folder / "params.json").read_text())["n_layers"] == 6


@pytest.mark.parametrize("seed", [1, 2])
def test_an_export_replaces_an_earlier_one(build, meta_folder, args, tiny_tokenizer_path, seed):
    other = build(args, seed)
    tokenizer = meta_folder / "tokenizer.model"  # inside the folder that is replaced
    save_meta(other, meta_folder, tokenizer_path=tokenizer, dtype=torch.float32)
    loaded = meta_device(args)
    load_into(loaded, meta_folder, device=CPU)
    assert_equal_states(other.state_dict(), loaded.state_dict())
    assert [p.name for p in meta_folder.parent.iterdir()] == ["m"]


def test_a_failed_export_leaves_the_earlier_one(build, meta_folder, args, monkeypatch):
    before = (meta_folder / "consolidated.pth").read_bytes()

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    tokenizer = meta_folder / "tokenizer.model"
    with pytest.raises(OSError, match="disk full"):
        save_meta(build(args, 3), meta_folder, tokenizer_path=tokenizer, dtype=torch.float32)
    assert (meta_folder / "consolidated.pth").read_bytes() == before
    assert [path.name for path in meta_folder.parent.iterdir()] == ["m"]


def test_an_export_does_not_replace_other_things(model, tmp_path, tiny_tokenizer_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="something other than a checkpoint"):
        save_meta(model, tmp_path, tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="something other than a checkpoint"):
        write_hf(model.state_dict().items(), model.args, tmp_path, tiny_tokenizer_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_fsdp_with_one_rank(model, args, meta_folder, tmp_path, gloo_group, wrapped):
    sharded = meta_device(args)
    if wrapped:  # activation checkpointing puts a wrapper's name into parameter names
        block_type = type(sharded.layers[0])
        apply_activation_checkpointing(sharded, check_fn=lambda m: isinstance(m, block_type))
    shard_model(sharded, init_device_mesh("cpu", (1,)), compute_dtype=torch.float32)
    load_into(sharded, meta_folder, device=CPU)
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(sharded(tokens), model(tokens), rtol=0, atol=0)
    tokenizer = meta_folder / "tokenizer.model"
    save_meta(sharded, tmp_path / "again", tokenizer_path=tokenizer, dtype=torch.float32)
    again = (tmp_path / "again" / "consolidated.pth").read_bytes()
    assert again == (meta_folder / "consolidated.pth").read_bytes()


def two_ranks_load_and_save(rank, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for source in ("m", "h"):
        sharded = shard_model(meta_device(args[source]), mesh, compute_dtype=torch.float32)
        load_into(sharded, folder / source, device=CPU)
        assert sharded.layers[0].mlp.w1.weight.to_local().shape[0] == (33, 32)[rank]
        # Every rank finds the defect by itself; one that did not would wait for the others.
        with pytest.raises(ValueError, match="truncated or damaged"):
            load_into(sharded, folder / f"broken_{source}", device=CPU)
        again, tokenizer = folder / f"{source}_again", folder / source / "tokenizer.model"
        save_meta(sharded, again, tokenizer_path=tokenizer, dtype=torch.float32)
        assert Checkpoint(again).args["embed_dim"] == 32
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_load_their_rows_and_save_whole_folders(
    build, args, tmp_path, tiny_tokenizer_path, forks
):
    args = args | {"intermediate_dim": 65}  # does not divide by two
    llama_args = args | {"num_layers": 3, "n_future_tokens": 1}
    mtp, llama = build(args), build(llama_args, seed=5)
    common = dict(tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    save_meta(mtp, tmp_path / "m", **common)
    write_hf(llama.state_dict().items(), llama_args, tmp_path / "h", tiny_tokenizer_path)
    for name, file in (("m", "consolidated.pth"), ("h", "model.safetensors")):
        shutil.copytree(tmp_path / name, tmp_path / f"broken_{name}")
        file = tmp_path / f"broken_{name}" / file
        file.write_bytes(file.read_bytes()[:-1000])
    forks.call(two_ranks_load_and_save, tmp_path, {"m": args, "h": llama_args})

    save_meta(llama, tmp_path / "h_meta", **common)
    for whole, sharded in (("m", "m_again"), ("h_meta", "h_again")):
        file = "consolidated.pth"
        assert (tmp_path / whole / file).read_bytes() == (tmp_path / sharded / file).read_bytes()


@pytest.mark.parametrize("write", [write_meta, write_hf])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    model, meta_folder, tiny_tokenizer_path, monkeypatch, write
):
    before = {path.name: path.read_bytes() for path in meta_folder.iterdir()}

    def full(*args, **kwargs):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:  # as torch does
            raise RuntimeError("unexpected pos 768 vs 662") from error.with_traceback(None)

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match=r"m could not be written \(No space left on device\); what"):
        write(model.state_dict().items(), model.args, meta_folder, tiny_tokenizer_path)
    assert {path.name: path.read_bytes() for path in meta_folder.iterdir()} == before
    assert not list(meta_folder.parent.glob("*.partial"))
