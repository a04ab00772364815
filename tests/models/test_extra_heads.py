"""Heads 1 to K - 1 that train apart: where their gradient ends, what is scaled by what."""

import pytest
import torch

from wmtp_modules.loss.distill import Distill
from wmtp_modules.loss.mtp_loss import head_alphas, mtp_labels
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.head_groups import head_groups, scale_and_clip_
from wmtp_modules.models.lora import LoRA
from wmtp_modules.parallel.sharding import init_weights_

K, V, T = 4, 512, 24
DISTILL = Distill(0.6, 1.5)
DRAW = torch.Generator().manual_seed(3)
TOKENS = torch.randint(V, (2, T), generator=DRAW)
DOC = torch.tensor([[0] * 10 + [1] * 14, [0] * 24])
LABELS = mtp_labels(TOKENS, torch.rand(2, T, generator=DRAW) < 0.8, DOC, K)
WEIGHTS = torch.rand(2, T, K, generator=DRAW) * (LABELS >= 0)


@pytest.fixture
def model(tiny_model_args):
    made = mtp_llama2(**tiny_model_args)
    init_weights_(made, 0)
    with torch.no_grad():  # sharp enough that what attention sees matters
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


@pytest.fixture
def alone(model, tiny_model_args):
    """Trunk and head 0 of it."""
    args = tiny_model_args | {"n_future_tokens": 1, "num_layers": 3}
    made = mtp_llama2(**args)
    made.load_state_dict({name: model.state_dict()[name] for name in made.state_dict()})
    return made


def trained(model, folds, labels=LABELS, weights=WEIGHTS, distill=DISTILL, tokens=TOKENS, **more):
    """Gradients by name, after a step as the recipes make it; losses and the distillation's."""
    more |= {"token_weights_BTK": weights} if folds else {}
    loss, *figures = model(tokens, labels, distill=distill, **more)
    (loss if folds else (loss * weights).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}, *figures


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("distill", [Distill(), DISTILL])
def test_isolated_trains_the_trunk_as_one_head_does_to_the_bit(model, alone, folds, distill):
    """And its own heads as in full, where the loss has no chunk across both."""
    alone.zero_grad()
    want, losses, _ = trained(alone, folds, LABELS[..., :1], WEIGHTS[..., :1], distill)
    full, _, of_full = trained(model, folds, distill=distill)
    model.zero_grad()
    model.set_extra_heads("isolated")
    got, of_all, of_others = trained(model, folds, distill=distill)
    assert torch.equal(of_all[..., :1], losses)
    assert (of_others[..., 0] == 0).all()
    torch.testing.assert_close(of_others, of_full)
    for name, grad in got.items():
        if name in want:
            assert torch.equal(grad, want[name]), name
            assert not torch.equal(grad, full[name]) or name.startswith("heads.0"), name
        else:
            torch.testing.assert_close(grad, full[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("folds", [True, False])
def test_only_has_no_gradient_elsewhere(model, folds):
    model.set_extra_heads("isolated")
    want, _, _ = trained(model, folds)
    model.zero_grad()
    model.set_extra_heads("only")
    got, _, _ = trained(model, folds)
    for name, grad in got.items():
        if name.startswith(("heads.1", "heads.2", "heads.3")):
            assert torch.equal(grad, want[name]), name
        else:
            assert grad is None, name


@pytest.mark.parametrize("how", ["full", "isolated"])
@pytest.mark.parametrize("folds", [True, False])
def test_distillation_of_a_packed_row_is_that_of_its_documents(model, how, folds):
    """The teacher of a document's last positions is no other document's."""
    model.set_extra_heads(how)
    inside = torch.ones(T, T, dtype=torch.bool).tril() & (DOC[:1, :, None] == DOC[:1, None])
    position = torch.cat([torch.arange(10), torch.arange(14)])[None]
    row = LABELS[:1], WEIGHTS[:1], DISTILL, TOKENS[:1]
    got, *packed = trained(model, folds, *row, mask=inside, input_pos=position)
    got = {name: grad.clone() for name, grad in got.items()}
    model.zero_grad()
    apart = []
    for own in (slice(0, 10), slice(10, 24)):
        part = LABELS[:1, own], WEIGHTS[:1, own], DISTILL, TOKENS[:1, own]
        want, *figures = trained(model, folds, *part)  # added up
        apart.append(figures)
    for one, parts in zip(packed, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(one, torch.cat(parts, 1), rtol=1e-5, atol=1e-5)
    assert packed[1][..., 1:].max() > 0.1
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 2e-5 * grad.norm(), name


def test_distillation_in_full_has_no_gradient_through_the_teacher(model):
    """Weight 1 and labels of the further heads alone: head 0's block learns nothing."""
    labels = LABELS.clone()
    labels[..., 0] = -100
    grads, _, _ = trained(model, True, labels, distill=Distill(1.0))
    assert all((g == 0).all() for name, g in grads.items() if name.startswith("heads.0"))
    assert grads["layers.0.mlp.w1.weight"].norm() > 0 < grads["output.proj.weight"].norm()


def test_groups_and_what_each_is_divided_by(model):
    def names(group):
        known = {id(p): name for name, p in model.named_parameters()}
        return [known[id(p)] for p in group.parameters]

    every = [name for name, _ in model.named_parameters()]
    further = [name for name in every if name.startswith(("heads.1", "heads.2", "heads.3"))]
    (group,) = head_groups(model, 0.5)
    assert names(group) == every
    assert torch.equal(group.alphas_K, head_alphas(K, 0.5))
    model.set_extra_heads("isolated")
    first, second = head_groups(model, 0.5)
    assert names(first) == [name for name in every if name not in further]
    assert names(second) == further
    assert first.alphas_K.tolist() == [1, 0, 0, 0]
    assert second.alphas_K.tolist() == pytest.approx([0, 4 / 7, 2 / 7, 1 / 7])

    grads, _, _ = trained(model, True)
    before = {name: grad.clone() for name, grad in grads.items()}
    n_K = torch.tensor([40, 30, 20, 10])
    norms = scale_and_clip_([first, second], n_K, 2, 0.01)
    for group, n_prime, norm in ((first, 40, norms[0]), (second, 170 / 7, norms[1])):
        scaled = {name: before[name] * 2 / n_prime for name in names(group)}
        want = torch.cat([grad.flatten() for grad in scaled.values()]).norm()
        torch.testing.assert_close(norm, want, rtol=1e-5, atol=0)
        assert want > 0.01
        for name, grad in scaled.items():
            torch.testing.assert_close(grads[name], grad * 0.01 / want, rtol=1e-4, atol=1e-9)

    model.set_extra_heads("only")
    (group,) = head_groups(model)
    assert names(group) == further
    assert group.alphas_K.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])


def test_adapters_are_divided_among_the_groups(model):
    model.add_lora(LoRA(rank=4), adapter_dtype=torch.float32)
    model.set_extra_heads("isolated")
    first, second = head_groups(model)
    assert (len(first.parameters), len(second.parameters)) == (2 * 7 * 3, 2 * 7 * 3)
