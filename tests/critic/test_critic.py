"""Pairs, figures and the folder of a critic, against loops over their definition."""

import json

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist

from wmtp_modules.critic import pairs as critics
from wmtp_modules.loss.value_loss import response_mask
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.parallel.process_group import init_weights_

# ------------------------------------------------------------------------------ pairs


def test_pairs_are_of_one_problem_like_length_and_unlike_reward():
    rng = np.random.default_rng(0)
    n = 300
    lengths, rewards = rng.integers(10, 60, n), rng.integers(0, 2, n).astype(float)
    problems = [f"p{i}" for i in rng.integers(0, 20, n)]
    pairs = critics.make_pairs(lengths, rewards, problems, seed=3)
    assert len(pairs) > 50
    assert len(np.unique(pairs)) == pairs.size  # each response in one pair at most
    for better, worse in pairs:
        assert problems[better] == problems[worse]
        assert rewards[better] > rewards[worse]
        longer, shorter = max(lengths[[better, worse]]), min(lengths[[better, worse]])
        assert longer / shorter < critics.LENGTH_BIN
    again = critics.make_pairs(lengths, rewards, problems, seed=3)
    np.testing.assert_array_equal(pairs, again)
    assert not np.array_equal(pairs, critics.make_pairs(lengths, rewards, problems, seed=4))


def test_as_many_pairs_as_a_problem_has_of_the_rarer_kind():
    rewards = np.array([1.0, 1, 1, 0, 0, 1])
    pairs = critics.make_pairs(np.full(6, 20), rewards, ["p"] * 5 + ["q"], seed=0)
    assert len(pairs) == 2
    graded = critics.make_pairs(np.full(4, 20), np.array([0.1, 0.4, 0.2, 0.3]), ["p"] * 4, seed=0)
    assert sorted(map(tuple, graded.tolist())) == [(1, 0), (3, 2)]


@pytest.mark.parametrize(
    ("lengths", "problems"),
    [([20, 20], [None, None]), ([20, 60], ["p", "p"]), ([0, 0], ["p", "p"]), ([9, 9], ["p", "q"])],
)
def test_no_pair_without_problem_or_like_length_or_response(lengths, problems):
    pairs = critics.make_pairs(np.array(lengths), np.array([1.0, 0.0]), problems, seed=0)
    assert pairs.shape == (0, 2)


def test_length_only_takes_the_better_direction_and_halves_ties():
    lengths = np.array([10, 12, 11, 11, 9, 14, 8, 9])
    pairs = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])  # shorter is better thrice, one tie
    assert critics.length_only_accuracy(lengths, pairs) == 3.5 / 4
    assert critics.length_only_accuracy(lengths, pairs[:, ::-1]) == 3.5 / 4


# ---------------------------------------------------------------------------- figures


@pytest.fixture
def valued():
    """Values of 40 rows of up to 12 tokens, their masks, sums and rewards."""
    rng = np.random.default_rng(1)
    values = torch.from_numpy(rng.normal(size=(40, 12)))
    keep = torch.from_numpy(rng.random((40, 12)) < 0.7)
    keep[5] = False
    y = response_mask(keep, torch.zeros(40, 12))
    rewards = rng.normal(size=40)
    return values, y, critics.value_sums(values, y).numpy(), rewards


def tokens_of(values, y, rewards):
    pairs = [(float(values[b, u - 1]), rewards[b]) for b, u in y.nonzero().tolist()]
    return np.array(pairs).T


def test_value_loss_and_best_constant(valued):
    values, y, sums, rewards = valued
    v, r = tokens_of(values, y, rewards)
    assert critics.value_loss_of(sums, rewards) == pytest.approx((0.5 * (v - r) ** 2).mean())
    constant = min((0.5 * (c - r) ** 2).mean() for c in np.linspace(-1, 1, 2001))
    assert critics.constant_value_loss(sums[:, 0], rewards) == pytest.approx(constant, abs=1e-6)


def test_affine_fit_is_least_squares(valued):
    values, y, sums, rewards = valued
    v, r = tokens_of(values, y, rewards)
    slope, shift = critics.fit_affine(sums, rewards)
    assert (slope, shift) == pytest.approx(np.polyfit(v, r, 1), rel=1e-6)
    flat = sums * [1, 0, 0]
    assert critics.fit_affine(flat, rewards)[0] == 0


def test_pairwise_loss_of_sums(valued):
    values, y, sums, _ = valued
    pairs = np.array([[0, 1], [2, 3]])
    means = [float(values[b, :-1][y[b, 1:]].mean()) for b in range(4)]
    expected = np.mean(
        [np.log1p(np.exp(means[1] - means[0])), np.log1p(np.exp(means[3] - means[2]))]
    )
    assert critics.pairwise_loss_of(sums, pairs) == pytest.approx(expected)


def perfect(n=60):
    """Rows of ten tokens whose value is the reward itself, in pairs."""
    rewards = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    sums = np.stack([np.full(n, 10.0), 10 * rewards, 10 * rewards**2], 1)
    return sums, rewards, np.arange(n).reshape(-1, 2)


def test_report_of_a_perfect_and_of_an_ignorant_critic():
    sums, rewards, pairs = perfect()
    report = critics.critic_report(sums, rewards, pairs)
    assert report["pair_accuracy"] == 1
    assert report["auc"] == 1
    assert report["length_only"] == 0.5
    assert report["value_loss"] == pytest.approx(0)
    assert report["constant_value_loss"] == pytest.approx(0.5)
    assert critics.shortcomings(report, "regression") == []
    ignorant = critics.critic_report(sums * [1, 0, 0], rewards, pairs)
    assert ignorant["pair_accuracy"] == 0.5
    found = critics.shortcomings(ignorant, "regression")
    assert len(found) == 2
    assert "not below the best constant's 0.5000" in found[0]
    assert "within 30 held-out pairs is not above 0.500" in found[1]
    assert critics.shortcomings(ignorant, "pairwise") == found[1:]


def test_a_critic_that_only_knows_length_is_of_no_use():
    """Its accuracy equals that of length; values otherwise fit."""
    sums, rewards, pairs = perfect()
    sums[::2] *= 1.1  # better responses are longer
    report = critics.critic_report(sums, rewards, pairs)
    assert report["length_only"] == 1
    (found,) = critics.shortcomings(report, "pairwise")
    assert "length alone" in found


def test_without_pairs_value_loss_decides():
    sums, rewards, _ = perfect()
    report = critics.critic_report(sums, rewards, np.zeros((0, 2), np.int64))
    assert report["pair_accuracy"] is None
    assert report["length_only"] is None
    assert critics.shortcomings(report, "regression") == []


def test_near_marks_leaves_the_last_token_out():
    y = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]).bool().expand(3, -1)
    marks = torch.zeros(3, 12, dtype=torch.bool)
    marks[0, 3] = marks[1, 3] = True  # row 2 has no mark
    delta = torch.zeros(3, 12)
    delta[:, 11] = 100  # the reward is paid out there
    delta[0, 6], delta[1, 7] = -1, -1
    hits, chance, rows = critics.near_marks(delta, y, marks)
    assert (hits, rows) == (1, 2)
    # places 1..10; near 3 are 1..6
    assert chance == pytest.approx(2 * 6 / 10)


# ------------------------------------------------------------------- values and batches


@pytest.fixture(scope="module")
def model():
    model = mtp_llama2(
        vocab_size=64,
        num_layers=4,
        n_future_tokens=2,
        num_heads=2,
        num_kv_heads=2,
        embed_dim=16,
        max_seq_len=32,
    )
    init_weights_(model, 0)
    return model.eval()


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = ValueHead(16)
    torch.nn.init.normal_(head.out.weight)
    return head


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    lengths = [5, 20, 11, 7]
    return datasets.Dataset.from_dict(
        {
            "tokens": [rng.integers(1, 64, n).tolist() for n in lengths],
            "keep": [[i >= 3 for i in range(n)] for n in lengths],
            "problem_id": list("aabb"),
        }
    )


def test_values_of_a_batch_equal_those_of_each_row_alone(model, head, rows):
    tokens = [np.array(row) for row in rows["tokens"]]
    together = critics.row_values(model, head, tokens)
    for row, values in zip(tokens, together, strict=True):
        assert values.shape == (len(row),)
        (alone,) = critics.row_values(model, head, [row])
        np.testing.assert_allclose(values, alone, atol=1e-5)
        with torch.no_grad():
            expected = head(model.trunk(torch.from_numpy(row)[None]))[0]
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_a_value_that_is_not_finite_is_an_error(model, head):
    head.out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="value is not finite somewhere in a row of 3 tokens"):
        critics.row_values(model, head, [np.array([1, 2, 3])])


def test_sums_of_rows_shared_out_add_up(model, head, rows):
    whole = critics.sums_of_rows(model, head, rows, [np.arange(3), np.array([3])])
    parts = [critics.sums_of_rows(model, head, rows, [np.arange(4)[r::2]]) for r in (0, 1)]
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-5)
    assert whole[:, 0].tolist() == [2, 17, 8, 4]
    assert critics.response_lengths(rows).tolist() == [2, 17, 8, 4]


def test_advantages_of_rows_are_those_of_their_values(model, head, rows):
    rewards = np.array([1.0, -1.0, 0.5, 2.0])
    batch, a = critics.row_advantages(model, head, rows, np.array([2, 0]), rewards, lam=1.0)
    values = critics.row_values(model, head, [np.array(rows[2]["tokens"])])[0]
    np.testing.assert_allclose(a[0, 3:11], 0.5 - values[2:10], atol=1e-5)
    assert batch["y"][1].sum() == 2


def test_joint_batches_cover_an_epoch_in_any_world_size():
    seen = [critics.joint_batch(10, 3, step, seed=1) for step in range(3)]
    assert len(set(np.concatenate(seen).tolist())) == 9
    assert not np.array_equal(critics.joint_batch(10, 3, 3, seed=1), seen[0])
    np.testing.assert_array_equal(critics.joint_batch(10, 3, 1, seed=1), seen[1])
    with pytest.raises(ValueError, match="there are 2 to train the critic on, fewer than"):
        critics.joint_batch(2, 3, 0, seed=1)


# ----------------------------------------------------------------------------- folder


def test_a_critic_comes_back_bit_for_bit(head, tmp_path):
    head.scale.fill_(0.3)
    record = {"fingerprint": {"trunk": "a"}, "settings": {"seed": 1}, "report": {"pairs": 0}}
    critics.save_critic(tmp_path / "c", head, record)
    loaded = critics.load_value_head(tmp_path / "c", 16)
    for key, value in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert critics.check_critic(tmp_path / "c", {"trunk": "a"}) == record
    assert critics.check_critic(tmp_path / "c", {"trunk": "a"}, {"seed": 1}) == record
    with pytest.raises(ValueError, match=r"something else \(seed: the critic has 1, this run 2"):
        critics.check_critic(tmp_path / "c", {"trunk": "a"}, {"seed": 2})


def test_a_critic_from_another_trunk_is_an_error(head, tmp_path):
    critics.save_critic(
        tmp_path, head, {"fingerprint": {"trunk": "a", "x": 1}, "settings": {}, "report": {}}
    )
    with pytest.raises(
        ValueError, match=r"something else \(trunk: the critic has 'a', this run 'b'"
    ):
        critics.check_critic(tmp_path, {"trunk": "b", "x": 1})
    with pytest.raises(ValueError, match="holds no trained critic: add 'critic' to stages"):
        critics.check_critic(tmp_path / "none", {})


def test_damaged_folders(head, tmp_path):
    critics.save_critic(tmp_path, head, {"fingerprint": {}, "settings": {}, "report": {}})
    file = tmp_path / critics.HEAD_FILE
    with pytest.raises(ValueError, match="no value head of width 8"):
        critics.load_value_head(tmp_path, 8)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is missing, damaged"):
        critics.load_value_head(tmp_path, 16)
    (tmp_path / critics.RECORD_FILE).write_text(json.dumps({"report": {}}))
    with pytest.raises(ValueError, match=r"critic\.json is damaged"):
        critics.read_critic(tmp_path)


def test_training_state_resumes_and_keeps_the_best(head, tmp_path, gloo_group):
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    state = critics.TrainingState(tmp_path, {"trunk": "a"})
    for step, loss in enumerate((0.5, 0.4, 0.6, 0.7)):
        head(torch.randn(1, 3, 16)).sum().backward()
        optimizer.step()
        state.step = step + 1
        state.evaluated(loss, head, optimizer)
        if loss == 0.4:
            best = {key: value.clone() for key, value in head.state_dict().items()}
    assert state.evaluations_since_best == 2
    assert dist.get_rank() == 0
    again, fresh = critics.TrainingState(tmp_path, {"trunk": "a"}), ValueHead(16)
    again.resume(fresh, torch.optim.AdamW(fresh.parameters(), lr=0.1))
    assert (again.step, again.evaluations_since_best) == (4, 2)
    assert again.heldout_losses == [0.5, 0.4, 0.6, 0.7]
    for key, value in head.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)
        assert torch.equal(again.best_head[key], best[key])
    other = critics.TrainingState(tmp_path, {"trunk": "b"})
    other.resume(ValueHead(16), optimizer)
    assert other.step == 0


# ------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04\x95", b"[" * 1000, b"\xff\xfe"])
def test_a_damaged_state_of_training_says_what_to_do(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    head = ValueHead(8)
    state = critics.TrainingState(tmp_path, {"trunk": "t"})
    with pytest.raises(ValueError, match=r"state\.pt is damaged .*: delete it, and the critic is"):
        state.resume(head, torch.optim.AdamW(head.parameters()))


def test_a_state_of_training_that_runs_code_is_refused(tmp_path):
    class RunsCode:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "spy",))

    torch.save({"fingerprint": {"trunk": "t"}, "head": RunsCode()}, tmp_path / "state.pt")
    head = ValueHead(8)
    state = critics.TrainingState(tmp_path, {"trunk": "t"})
    with pytest.raises(ValueError, match="damaged or no state of a critic's training"):
        state.resume(head, torch.optim.AdamW(head.parameters()))
    assert not (tmp_path / "spy").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"fingerprint": [], "settings": {}, "report": {}}',
        '{"fingerprint": {}, "settings": null, "report": {}}',
    ],
)
def test_a_damaged_record_of_a_critic(tmp_path, content):
    (tmp_path / "critic.json").write_text(content)
    with pytest.raises(ValueError, match=r"critic\.json is damaged: train the critic again"):
        critics.check_critic(tmp_path, {"trunk": "t"}, {"seed": 1})
