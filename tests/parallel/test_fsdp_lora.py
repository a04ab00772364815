"""Adapters of two gloo ranks against those of one process, on a frozen base and on one in NF4."""

import pytest
import torch
import torch.distributed as dist
from torchao.dtypes.nf4tensor import NF4Tensor

from wmtp_modules.checkpoints.read import load_into
from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.lora import LoRA
from wmtp_modules.parallel.sharding import (
    init_adapters_,
    init_weights_,
    local_rows,
    shard_model,
)

pytestmark = pytest.mark.slow

ARGS = dict(
    vocab_size=512,
    num_layers=3,
    n_future_tokens=2,
    num_heads=4,
    num_kv_heads=4,
    embed_dim=128,
    max_seq_len=64,
    intermediate_dim=256,
)
LORAS = [LoRA(rank=3), LoRA(rank=3, heads=False, quantize_base=True)]  # 2 ranks x 1.5 rows of A


@torch.no_grad()
def build(lora, base, mesh=None):
    """As a run makes it; then B gets values, or A would have no gradient."""
    with torch.device("meta"):
        model = mtp_llama2(**ARGS)
        model.add_lora(lora, adapter_dtype=torch.float32)
    if mesh:
        shard_model(model, mesh, compute_dtype=torch.float32)
    load_into(model, base, device="cpu")
    init_adapters_(model, 5)
    for key, parameter in model.named_parameters():
        if key.endswith("lora_b.weight"):
            rows, start = local_rows(parameter)
            whole = torch.linspace(-0.1, 0.1, parameter.numel()).sin().view(parameter.shape)
            rows.copy_(whole[start : start + len(rows)])
    return model


def step(model, rows):
    """Gradients of this process's part of four rows."""
    tokens = torch.arange(4 * 24).view(4, 24) * 5 % 512
    labels = (torch.arange(4 * 24 * 2).view(4, 24, 2) * 7) % 512
    model(tokens[rows], labels[rows]).sum().backward()
    return {key: one.grad for key, one in model.named_parameters() if one.grad is not None}


def worker(rank, base, tokenizer, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for i, lora in enumerate(LORAS):
        model = build(lora, base, mesh)
        grads = {
            key: 2 * grad.full_tensor() for key, grad in step(model, slice(rank, 4, 2)).items()
        }
        kinds = {key: isinstance(one, NF4Tensor) for key, one in model.named_parameters()}
        if rank == 0:
            torch.save((grads, kinds), folder / f"{i}.pt")
        save_meta(model, folder / f"merged{i}", tokenizer_path=tokenizer, dtype=torch.float32)
    dist.barrier()  # a rank that leaves early aborts the other's gloo threads
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, fork_server, tiny_tokenizer_path):
    folder = tmp_path_factory.mktemp("fsdp_lora")
    model = mtp_llama2(**ARGS)
    init_weights_(model, 0)
    base = folder / "base"
    save_meta(model, base, tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    fork_server.call(worker, base, tiny_tokenizer_path, folder)
    return folder


@pytest.mark.parametrize("i", range(len(LORAS)))
def test_two_ranks_equal_one_process(two_ranks, tiny_tokenizer_path, tmp_path, i):
    grads, kinds = torch.load(two_ranks / f"{i}.pt", weights_only=True)
    model = build(LORAS[i], two_ranks / "base")
    want = step(model, slice(None))
    assert grads.keys() == want.keys() == {key for key in want if "lora" in key}
    for key, grad in want.items():
        assert (grads[key] - grad).norm() <= 3e-6 * grad.norm(), key  # fp32 in another order
    quantised = {f"{key}" for key in kinds if LORAS[i].quantize_base and LORAS[i].adapts(key)}
    assert {key for key, is_nf4 in kinds.items() if is_nf4} == quantised
    save_meta(model, tmp_path / "one", tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    files = [path / "consolidated.pth" for path in (two_ranks / f"merged{i}", tmp_path / "one")]
    two, one = (torch.load(file, weights_only=True) for file in files)
    for key, value in one.items():
        assert torch.equal(two[key], value), key
