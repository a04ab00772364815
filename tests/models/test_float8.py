"""Float8 in the blocks, as a CPU emulates it."""

import pytest
import torch
from torch import nn
from torchao.float8.float8_linear import Float8Linear

from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.float8 import float8_blocks_

CPU = torch.device("cpu")


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_only_products_of_blocks_are_rounded(tiny_model_args, recipe):
    torch.manual_seed(0)
    plain = mtp_llama2(**tiny_model_args)
    model = mtp_llama2(**tiny_model_args)
    model.load_state_dict(plain.state_dict())
    float8_blocks_(model, recipe, device=CPU)
    assert model.state_dict().keys() == plain.state_dict().keys()
    linear = {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {n for n, kind in linear.items() if kind is not Float8Linear} == {"output.proj"}
    tokens = torch.randint(0, 512, (2, 16))
    labels = torch.randint(0, 512, (2, 16, 4))
    losses = []
    for one in (plain, model):
        losses.append(one(tokens, labels))
        losses[-1].mean().backward()
    difference = (losses[1] - losses[0]).abs()
    assert 0 < difference.max() < 0.05  # e4m3 has 3 bits of mantissa
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 0.2 * a.grad.norm(), name


def test_widths_that_float8_does_not_take(tiny_model_args):
    model = mtp_llama2(**tiny_model_args | {"intermediate_dim": 72})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.w1 has 32 x 72 weights, and both must"):
        float8_blocks_(model, "rowwise", device=CPU)
