"""Values of rows, against those of each row alone."""

import datasets
import numpy as np
import pytest
import torch

from wmtp_modules.critic.states import batch_of, trunk_states
from wmtp_modules.critic.values import row_values, tokens_and_keep
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


@pytest.fixture(params=["state", "turn", "sum"])
def head(request):
    torch.manual_seed(0)
    head = ValueHead(16, request.param)
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
    items = tokens_and_keep(rows)
    together = row_values(model, head, items)
    for i, values in enumerate(together):
        assert values.shape == (len(items[i][0]),)
        (alone,) = row_values(model, head, [items[i]])
        np.testing.assert_allclose(values, alone, atol=1e-5)
        batch = batch_of(rows, [i], torch.device("cpu"))
        with torch.no_grad():
            logits = head(*trunk_states(model, batch["tokens"]), batch["y"])[0]
        np.testing.assert_allclose(values, logits.sigmoid(), atol=1e-5)
        assert 0 < values.min() <= values.max() <= 1


def test_a_value_that_is_not_finite_is_an_error(model, head, rows):
    head.out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="value is not finite somewhere in a row of"):
        row_values(model, head, tokens_and_keep(rows))
