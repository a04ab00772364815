"""Values, sums and advantages of rows, against those of each row alone."""

import datasets
import numpy as np
import pytest
import torch

from wmtp_modules.critic.pairs import (
    response_lengths,
)
from wmtp_modules.critic.values import (
    row_advantages,
    row_values,
    sums_of_rows,
)
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.parallel.sharding import init_weights_


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
    together = row_values(model, head, tokens)
    for row, values in zip(tokens, together, strict=True):
        assert values.shape == (len(row),)
        (alone,) = row_values(model, head, [row])
        np.testing.assert_allclose(values, alone, atol=1e-5)
        with torch.no_grad():
            expected = head(model.trunk(torch.from_numpy(row)[None]))[0]
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_a_value_that_is_not_finite_is_an_error(model, head):
    head.out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="value is not finite somewhere in a row of 3 tokens"):
        row_values(model, head, [np.array([1, 2, 3])])


def test_sums_of_rows_shared_out_add_up(model, head, rows):
    whole = sums_of_rows(model, head, rows, [np.arange(3), np.array([3])])
    parts = [sums_of_rows(model, head, rows, [np.arange(4)[r::2]]) for r in (0, 1)]
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-5)
    assert whole[:, 0].tolist() == [2, 17, 8, 4]
    assert response_lengths(rows).tolist() == [2, 17, 8, 4]


def test_advantages_of_rows_are_those_of_their_values(model, head, rows):
    rewards = np.array([1.0, -1.0, 0.5, 2.0])
    batch, a = row_advantages(model, head, rows, np.array([2, 0]), rewards, lam=1.0)
    values = row_values(model, head, [np.array(rows[2]["tokens"])])[0]
    np.testing.assert_allclose(a[0, 3:11], 0.5 - values[2:10], atol=1e-5)
    assert batch["y"][1].sum() == 2
