"""Four gloo ranks as two nodes of two: replicas of a sharded model, and gradients that wait.

Ranks 0 and 1 are one node. A collective crosses nodes if its group has ranks of both.
"""

import importlib.util
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from wmtp_modules.config.rules import TRAINING_RULES, shards_of, what_waits
from wmtp_modules.loss.mtp_loss import head_alphas
from wmtp_modules.parallel.process_group import all_reduce_sum, sharding_mesh
from wmtp_modules.parallel.sharding import shard_model, sync_gradients_
from wmtp_modules.run.training_state import TrainingStates

RANKS, ROWS, PARTS = 4, 8, 2  # micro-batches of a step
TIMEOUT = timedelta(seconds=77)
SHARDED, REPLICAS = None, 2  # data_parallel_shard
CASES = [(shards, each) for shards in (SHARDED, REPLICAS) for each in (True, False)]
GATHERED = (SHARDED, None)  # as (SHARDED, True), without resharding after the forward
UNITS, BLOCKS = 8, 2  # of test_fsdp's model


def two_ranks_file():
    """test_fsdp.py, whose model and reference these are; tests are no package."""
    path = Path(__file__).with_name("test_fsdp.py")
    spec = importlib.util.spec_from_file_location("test_fsdp_for_hybrid", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def crossings(counts: Counter):
    """Count FSDP2's collectives and the elements each rank brings, in a node and across nodes."""
    names = ("all_gather_single", "reduce_scatter_single", "all_reduce")
    originals = {name: getattr(dist, name) for name in names}

    def counting(name):
        def call(*args, **kwargs):
            nodes = {rank // 2 for rank in dist.get_process_group_ranks(kwargs["group"])}
            where = "across" if len(nodes) > 1 else "inside"
            counts[name, where] += 1
            tensor = kwargs.get("input", args[min(1, len(args) - 1)] if args else None)
            counts["elements", where] += tensor.numel()
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name in names:
            setattr(dist, name, originals[name])


def full(model):
    return {n: p.grad.full_tensor().clone() for n, p in model.named_parameters()}


def step(two, model, rank, waits, counts):
    """Gradients of a step of two micro-batches, scaled as recipes do, and what crossed in each."""
    alphas, n_k = head_alphas(two.K, decay=0.6), torch.zeros(two.K)
    labels, tokens, weights = (x[rank::RANKS] for x in two.batch(ROWS))
    for part in range(PARTS):
        sync_gradients_(model, waits, part == PARTS - 1)
        rows = slice(part, part + 1)
        mask = labels[rows] != -100
        n_k += mask.sum((0, 1))
        with crossings(counts[part]):
            losses = model(tokens[rows], labels[rows])
            (losses * alphas * weights[rows] * mask).sum().backward()
    (n_k,) = all_reduce_sum(n_k)
    for parameter in model.parameters():
        parameter.grad *= RANKS / (alphas * n_k).sum()


def four_ranks(rank, folder):
    dist.init_process_group("gloo", timeout=TIMEOUT)
    two, world, out = two_ranks_file(), init_device_mesh("cpu", (RANKS,)), {}
    for shards, each in (GATHERED, *CASES):
        mesh, counts = sharding_mesh(world, shards), [Counter(), Counter()]
        waits = "nothing" if each is not False else "all" if shards is None else "replicas"
        once = waits == "all" or each is None
        model = two.build(two.ARGS)
        shard_model(model, mesh, compute_dtype=torch.float32, gather_once=once)
        step(two, model, rank, waits, counts)
        grads = full(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        out[shards, each] = grads, float(norm), [dict(c) for c in counts]
    groups = mesh.get_all_groups()
    out["mesh"] = [dist.get_process_group_ranks(group) for group in groups]
    cpu = torch.device("cpu")
    out["timeouts"] = [g._get_backend(cpu).options._timeout.total_seconds() for g in groups]
    # The last model has replicas: what is saved of it is there once.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.step()
    states = TrainingStates(folder / "states", 1)
    states.save(1, model, optimizer, {"step": 1}, {"rank": rank})
    states.close()
    moments = {n: optimizer.state[p]["exp_avg"].full_tensor() for n, p in model.named_parameters()}
    values = {n: p.full_tensor() for n, p in model.named_parameters()}
    if rank == 0:
        torch.save((out, values, moments), folder / "out.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def four(tmp_path_factory, fork_server):
    folder = tmp_path_factory.mktemp("hybrid")
    fork_server.call(four_ranks, folder, ranks=RANKS)
    return folder, *torch.load(folder / "out.pt", weights_only=False)


@pytest.fixture(scope="module")
def want():
    two = two_ranks_file()
    rows = two.batch(ROWS)
    two.batch = lambda _: rows  # its reference takes four
    return two.reference_gradients(two.ARGS)


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "each"), [GATHERED, *CASES])
def test_every_gradient_equals_one_process(four, want, shards, each):
    grads, norm, _ = four[1][shards, each]
    for name, gradient in want.items():
        assert (grads[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    whole = torch.stack([gradient.norm() for gradient in want.values()]).norm()
    assert norm == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.slow
def test_what_crosses_nodes_in_each_micro_batch(four):
    """What docs/nodes.md and benchmarks/results/fsdp_collectives.txt say."""
    counts = {case: four[1][case][2] for case in (GATHERED, *CASES)}
    gathers, units = UNITS + BLOCKS, UNITS  # the root's is one of the units
    names = "all_gather_single", "reduce_scatter_single", "all_reduce"

    def found(case, where):
        return [tuple(one.get((name, where), 0) for name in names) for one in counts[case]]

    assert found((SHARDED, True), "across") == [(gathers, units, 0)] * PARTS
    assert found(GATHERED, "across") == [(units, units, 0)] * PARTS
    assert found((SHARDED, False), "across") == [(units, 0, 0), (0, units, 0)]
    for each, waits in ((True, units), (False, 0)):
        inside, across = found((REPLICAS, each), "inside"), found((REPLICAS, each), "across")
        assert inside == [(gathers, units, 0)] * PARTS
        assert across == [(0, 0, waits), (0, 0, units)]
    assert four[1]["mesh"] == [[0, 2], [0, 1]]


@pytest.mark.slow
def test_replicas_have_the_time_out_of_all(four):
    assert four[1]["timeouts"] == [TIMEOUT.total_seconds()] * 2


def resume(rank, folder, shards):
    """Fewer ranks find what four had saved, bit for bit, in whatever shards they are."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    world, two = init_device_mesh("cpu", (dist.get_world_size(),)), two_ranks_file()
    model = two.build(two.ARGS)
    shard_model(model, sharding_mesh(world, shards), compute_dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    states = TrainingStates(folder / "states", 1)
    run, own = states.load(states.newest(), model, optimizer)
    assert (run["world"], own) == (RANKS, {"rank": rank})
    _, values, moments = torch.load(folder / "out.pt", weights_only=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), values[name]), name
        assert torch.equal(optimizer.state[parameter]["exp_avg"].full_tensor(), moments[name])
    states.close()


@pytest.mark.slow
def test_a_state_of_replicas_is_there_once_and_resumes_on_fewer_ranks(four, fork_server):
    folder, _, values, _ = four
    n = sum(value.numel() for value in values.values())
    size = sum(f.stat().st_size for f in (folder / "states" / "step_000001").glob("__*"))
    assert 12 * n < size < 20 * n  # parameters, two moments and DCP's headers; twice would be 24 n
    for shards in (None, 1):
        fork_server.call(resume, folder, shards, ranks=2)


@pytest.mark.slow
def test_a_state_of_replicas_resumes_on_one_rank(four, gloo_group):
    resume(0, four[0], None)


@pytest.mark.parametrize("shards", [3, 8, 0])
def test_shards_that_do_not_divide_the_ranks(shards, monkeypatch):
    (rule,) = [rule for rule in TRAINING_RULES if rule.__name__ == "_shards_divide_ranks"]
    assert rule(shards) is None  # nobody knows how many ranks there are
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert rule(shards) == (
        f"data_parallel_shard: {shards} does not divide 4 ranks: take one of 1, 2, 4, most often "
        "the GPUs of one node, or null for all ranks"
    )
    with pytest.raises(ValueError, match=f"{shards} does not divide 4 ranks"):
        shards_of(shards, 4)
    assert [shards_of(fine, 4) for fine in (None, -1, 1, 2, 4)] == [4, 4, 1, 2, 4]


@pytest.mark.parametrize(
    ("shards", "accumulation", "chosen", "waits"),
    [
        *[(None, 1, False, "nothing"), (2, 1, False, "nothing")],  # there is only the last one
        *[(None, 2, None, "nothing"), (4, 2, None, "nothing"), (2, 2, None, "replicas")],
        *[(None, 2, False, "all"), (2, 2, False, "replicas"), (2, 2, True, "nothing")],
    ],
)
def test_when_gradients_wait(shards, accumulation, chosen, waits):
    cfg = {"data_parallel_shard": shards, "sync_each_batch": chosen}
    cfg |= {"gradient_accumulation_steps": accumulation}
    assert what_waits(cfg, 4) == waits
