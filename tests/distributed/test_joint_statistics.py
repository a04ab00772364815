"""Two gloo ranks compute the weights that one process computes on the same rows."""

import pytest
import torch
import torch.distributed as dist

from wmtp_modules.weighting.advantage import CriticWeighting
from wmtp_modules.weighting.token_weighting import TokenWeighting, gather_rows, own_rows

pytestmark = pytest.mark.slow

WORLD, LOCAL, T, K = 2, 3, 24, 4
VARIANTS = [{"name": name} for name in TokenWeighting.NAMES] + [
    {"name": "rho1", "selection": "soft"},
    {"name": "rho1", "score": "abs_excess", "strength": 0.5},
    {"name": "rho1", "scope": "document"},
    {"name": "shuffled", "selection": "soft"},
    {"name": "shuffled", "scope": "document"},
]
CRITIC_VARIANTS = [{"name": "critic"}, {"name": "shuffled"}, {"name": "oracle"}] + [
    {"name": name, "advantage": "gae"} for name in ("critic", "shuffled")
]


def joint_case(empty_rank):
    """Rows in the order in which one process sees them; optionally one rank has no target."""
    generator = torch.Generator().manual_seed(0)
    G = WORLD * LOCAL
    doc_GT = (torch.rand(G, T, generator=generator) < 0.2).long().cumsum(1)
    mask_GTK = torch.rand(G, T, K, generator=generator) < 0.7
    mask_GTK[:, -1] = False
    if empty_rank is not None:
        mask_GTK[empty_rank::WORLD] = False
    losses_GTK = torch.randn(G, T, K, generator=generator).exp() * mask_GTK
    reference_GTK = torch.randn(G, T, K, generator=generator).exp()
    return losses_GTK, mask_GTK, doc_GT, torch.where(mask_GTK, reference_GTK, torch.nan)


def compute(variant, case):
    return TokenWeighting(**variant)(*case, step=5)


def compute_critic(variant, case):
    """With logarithms of raw weights, one per token, in the place of reference losses."""
    losses_BTK, mask_BTK, doc_BT, _ = case
    log_raw_BT = losses_BTK[..., 0] - 1
    scale_K = [0.5, 0.6, 0.7, 0.8]
    return CriticWeighting(**variant)(None, mask_BTK, doc_BT, log_raw_BT, step=5, scale_K=scale_K)


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    results = {}
    for empty_rank in (None, 0, 1):
        local = [x[rank::WORLD] for x in joint_case(empty_rank)]
        for i, variant in enumerate(VARIANTS):
            results[empty_rank, i] = compute(variant, local)
        for variant in CRITIC_VARIANTS:
            results[empty_rank, str(variant)] = compute_critic(variant, local)
        results[empty_rank, "rank"] = compute({"name": "rho1", "scope": "rank"}, local)
    rows_B = torch.arange(LOCAL) * WORLD + rank
    results["gathered"] = gather_rows(rows_B)
    results["own"] = own_rows(gather_rows(rows_B))
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def rank_results(tmp_path_factory, fork_server):
    folder = tmp_path_factory.mktemp("ranks")
    fork_server.call(rank_main, str(folder), ranks=WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("empty_rank", [None, 0, 1])
@pytest.mark.parametrize("i", range(len(VARIANTS)), ids=lambda i: str(VARIANTS[i]))
def test_two_ranks_equal_one_process(rank_results, i, empty_rank):
    expected_GTK, expected_stats = compute(VARIANTS[i], joint_case(empty_rank))
    for rank in range(WORLD):
        weights_BTK, stats = rank_results[rank][empty_rank, i]
        assert torch.equal(weights_BTK, expected_GTK[rank::WORLD])
        assert all(torch.equal(stats[key], expected_stats[key]) for key in expected_stats)


@pytest.mark.parametrize("empty_rank", [None, 0, 1])
@pytest.mark.parametrize("variant", CRITIC_VARIANTS, ids=str)
def test_two_ranks_equal_one_process_for_the_critic(rank_results, variant, empty_rank):
    expected_GTK, _ = compute_critic(variant, joint_case(empty_rank))
    for rank in range(WORLD):
        weights_BTK, _ = rank_results[rank][empty_rank, str(variant)]
        assert torch.equal(weights_BTK, expected_GTK[rank::WORLD])


@pytest.mark.parametrize("empty_rank", [None, 0])
def test_scope_rank_equals_each_rank_alone(rank_results, empty_rank):
    case = joint_case(empty_rank)
    for rank in range(WORLD):
        expected_BTK, _ = compute({"name": "rho1"}, [x[rank::WORLD] for x in case])
        assert torch.equal(rank_results[rank][empty_rank, "rank"][0], expected_BTK)


def test_rows_are_gathered_in_the_samplers_order(rank_results):
    for rank in range(WORLD):
        assert rank_results[rank]["gathered"].tolist() == list(range(WORLD * LOCAL))
        assert rank_results[rank]["own"].tolist() == list(range(rank, WORLD * LOCAL, WORLD))
