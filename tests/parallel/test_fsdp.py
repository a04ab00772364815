"""Two gloo ranks against one process."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from wmtp_modules.loss.mtp_loss import head_alphas, mtp_labels
from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.process_group import all_reduce_sum, init_process_group
from wmtp_modules.parallel.sharding import init_weights_, shard_model

pytestmark = pytest.mark.slow

K = 4
ARGS = dict(
    vocab_size=512,
    num_layers=6,
    n_future_tokens=K,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=32,
    max_seq_len=64,
    intermediate_dim=64,
)


def batch(rows: int):
    """Packed rows with unequal numbers of supervised tokens, one row with none at all."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(512, (rows, 24), generator=generator)
    doc = (torch.arange(24) >= 10).long().expand(rows, -1)
    keep = torch.rand(rows, 24, generator=generator) < torch.linspace(0.9, 0.0, rows)[:, None]
    return mtp_labels(tokens, keep, doc, K), tokens, torch.rand(rows, 24, K, generator=generator)


def build(args):
    model = mtp_llama2(**args)
    init_weights_(model, seed=0)
    return model


def test_initial_values_are_pytorchs_and_the_seed_decides(tiny_model_args):
    """Of width 32: a linear layer uniform in 1 / sqrt(32) of 0, the embedding normal(0, 1)."""
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (mtp_llama2(**tiny_model_args) for _ in range(3))
    torch.random.set_rng_state(before)
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)  # as after to_empty
        init_weights_(model, seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in first.named_parameters():
        assert torch.equal(value, again.get_parameter(name))
        assert name.endswith(".scale") or not torch.equal(value, other.get_parameter(name))
        assert not name.endswith(".scale") or (value == 1).all()
    width = tiny_model_args["embed_dim"]
    assert first.output.proj.weight.std().item() == pytest.approx((3 * width) ** -0.5, rel=0.05)
    assert first.output.proj.weight.abs().max() <= width**-0.5
    assert first.tok_embeddings.weight.std().item() == pytest.approx(1, rel=0.05)
    with pytest.raises(TypeError, match="LayerNorm has no initial values here"):
        init_weights_(torch.nn.LayerNorm(4), 0)


def reference_gradients(args):
    """One process, all rows at once, straight from the definition."""
    model = build(args)
    labels, tokens, weights = batch(4)
    losses = model(tokens, labels)
    mask = (labels != -100).float()
    alphas = head_alphas(K, decay=0.6)
    n_prime = (alphas * mask.sum((0, 1))).sum()
    ((alphas * weights * mask * losses).sum() / n_prime).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@contextmanager
def counted(counts):
    """Count FSDP2's collectives at the calls it makes."""
    names = ("all_gather_single", "reduce_scatter_single")
    originals = {name: getattr(dist, name) for name in names}

    def counting(name):
        def call(*args, **kwargs):
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    yield
    for name in names:
        setattr(dist, name, originals[name])


def worker(rank, args, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    alphas = head_alphas(K, decay=0.6)
    out = {}
    for fold in (False, True):
        for accumulation in (1, 2):
            model = shard_model(build(args), mesh, compute_dtype=torch.float32)
            labels, tokens, weights = (x[rank::2] for x in batch(4))
            n_k = torch.zeros(K)
            counts = Counter()
            with counted(counts):
                for part in range(accumulation):
                    rows = slice(part, part + 1) if accumulation == 2 else slice(None)
                    mask = labels[rows] != -100
                    n_k += mask.sum((0, 1))
                    token_weights = alphas * weights[rows] * mask
                    if fold:
                        total, _ = model(
                            tokens[rows], labels[rows], token_weights_BTK=token_weights
                        )
                    else:
                        total = (model(tokens[rows], labels[rows]) * token_weights).sum()
                    total.backward()
            (n_k,) = all_reduce_sum(n_k)
            scale = 2 / (alphas * n_k).sum()
            grads = {n: p.grad.full_tensor() * scale for n, p in model.named_parameters()}
            out[fold, accumulation] = (grads, dict(counts))
    if rank == 0:
        torch.save(out, results)
    dist.barrier()  # a rank that leaves early aborts the other's gloo threads
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, fork_server):
    folder = tmp_path_factory.mktemp("fsdp")
    fork_server.call(worker, ARGS, folder / "store", folder / "out.pt")
    return ARGS, torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_gradient_equals_one_process(two_ranks, fold, accumulation):
    args, out = two_ranks
    grads, _ = out[fold, accumulation]
    for name, want in reference_gradients(args).items():
        assert (grads[name] - want).norm() <= 3e-6 * want.norm(), name  # fp32 in another order


@pytest.mark.parametrize("fold", [False, True])
def test_collectives_of_one_backward(two_ranks, fold):
    """8 units and 2 trunk blocks: the bound is units + trunk blocks + 1 all-gathers."""
    _, out = two_ranks
    _, counts = out[fold, 1]
    assert 0 < counts["all_gather_single"] <= 8 + 2 + 1
    assert counts["reduce_scatter_single"] == 8


@pytest.mark.parametrize(("timeout_s", "of_collectives"), [(5, 65), (None, 30 * 60)])
def test_the_watchdog_speaks_before_collectives_give_up(timeout_s, of_collectives):
    device, mesh = init_process_group("cpu", timeout_s)
    group = mesh.get_group()._get_backend(device)
    dist.destroy_process_group()
    assert group.options._timeout.total_seconds() == of_collectives


def test_unknown_device():
    with pytest.raises(ValueError, match="device 'tpu' is not cuda or cpu"):
        init_process_group("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU"):
            init_process_group("cuda")
