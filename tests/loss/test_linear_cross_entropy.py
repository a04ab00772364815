"""Value, hidden gradient and weight gradient against ten lines of plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from wmtp_modules.config.rules import cpp_compiler
from wmtp_modules.loss import linear_cross_entropy as module
from wmtp_modules.loss.linear_cross_entropy import IMPLS, linear_cross_entropy


def plain(hidden, weight, labels, token_weights):
    logits = (hidden @ weight.T).float()
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=-100
    ).view(labels.shape)
    return (losses * token_weights).sum(), losses


@pytest.fixture(params=[(2, 7, 4, 16, 50), (1, 33, 1, 24, 101), (3, 5, 2, 8, 257)])
def problem(request, monkeypatch):
    """Odd shapes, ignored labels, and chunks that do not divide the number of tokens."""
    B, T, K, D, V = request.param
    monkeypatch.setattr(module, "CHUNK_LOGITS_CPU", 10 * V)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, K, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    labels = torch.randint(V, (B, T, K), generator=generator)
    labels[torch.rand(B, T, K, generator=generator) < 0.3] = -100
    token_weights = torch.rand(B, T, K, generator=generator) * 3
    return hidden, weight, labels, token_weights


def gradients(function, hidden, weight):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total, losses = function(hidden, weight)
    total.backward()
    return losses.detach(), hidden.grad, weight.grad


def weighted_afterwards(labels, token_weights, impl="chunked"):
    def run(hidden, weight):
        losses = linear_cross_entropy(hidden, weight, labels, impl=impl)
        return (losses * token_weights).sum(), losses

    return run


def folded(labels, token_weights, impl="chunked"):
    return lambda hidden, weight: linear_cross_entropy(
        hidden, weight, labels, token_weights, impl=impl
    )


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("path", [weighted_afterwards, folded])
def test_equals_plain_pytorch(problem, path):
    hidden, weight, labels, token_weights = problem
    want = gradients(lambda h, w: plain(h, w, labels, token_weights), hidden, weight)
    got = gradients(path(labels, token_weights), hidden, weight)
    for g, w in zip(got, want, strict=True):
        assert relative(g, w) < 1e-6
    assert (got[0][labels == -100] == 0).all()


@pytest.mark.slow
@pytest.mark.skipif(not cpp_compiler(), reason="torch.compile finds no C++ compiler ($CXX or g++)")
@pytest.mark.parametrize("path", [weighted_afterwards, folded])
def test_compiled_equals_chunked(problem, path):
    hidden, weight, labels, token_weights = problem
    want = gradients(path(labels, token_weights), hidden, weight)
    got = gradients(path(labels, token_weights, "compiled"), hidden, weight)
    for g, w in zip(got, want, strict=True):
        assert relative(g, w) < 1e-6


@pytest.mark.parametrize("path", [weighted_afterwards, folded])
def test_scale_of_the_incoming_gradient_is_applied(problem, path):
    hidden, weight, labels, token_weights = problem

    def scaled(h, w):
        total, losses = path(labels, token_weights)(h, w)
        return total * 0.25, losses

    want = gradients(path(labels, token_weights), hidden, weight)
    got = gradients(scaled, hidden, weight)
    torch.testing.assert_close(got[1], want[1] * 0.25)
    torch.testing.assert_close(got[2], want[2] * 0.25)


def test_gradcheck_in_double(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS_CPU", 3 * 11)
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 2, -100, 3, 10, 0, -100])
    token_weights = torch.rand(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels), (hidden, weight)
    )
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, token_weights)[0], (hidden, weight)
    )


@pytest.mark.parametrize("path", [weighted_afterwards, folded])
def test_bf16_is_as_close_to_fp32_as_plain_bf16_with_upcast(problem, path):
    hidden, weight, labels, token_weights = problem
    truth = gradients(lambda h, w: plain(h, w, labels, token_weights), hidden, weight)
    hidden16, weight16 = hidden.bfloat16(), weight.bfloat16()
    reference = gradients(lambda h, w: plain(h, w, labels, token_weights), hidden16, weight16)
    got = gradients(path(labels, token_weights), hidden16, weight16)
    assert got[0].dtype == torch.float32
    for g, r, t in zip(got, reference, truth, strict=True):
        assert relative(g.float(), t) < 1.3 * relative(r.float(), t) + 1e-6


def test_weight_gradient_accumulates_in_fp32(monkeypatch):
    """Many chunks that each add a little: a bf16 sum would lose what lies under its last bit."""
    N, D, V = 512, 4, 8
    monkeypatch.setattr(module, "CHUNK_LOGITS_CPU", V)  # one token a chunk
    torch.manual_seed(0)
    hidden, weight = torch.ones(N, D).bfloat16(), torch.zeros(V, D).bfloat16()
    labels = torch.zeros(N, dtype=torch.long)
    for path in (weighted_afterwards, folded):
        _, _, grad = gradients(path(labels, torch.ones(N)), hidden, weight)
        torch.testing.assert_close(grad[1].float(), torch.full((D,), N / V), rtol=4e-3, atol=0)


@pytest.mark.parametrize("path", [weighted_afterwards, folded])
def test_all_ignored_gives_zero_gradients_not_an_error(path):
    labels = torch.full((4, 3), -100)
    losses, hidden_grad, weight_grad = gradients(
        path(labels, torch.ones(4, 3)), torch.randn(4, 3, 8), torch.randn(20, 8)
    )
    assert losses.sum() == hidden_grad.abs().sum() == weight_grad.abs().sum() == 0


@pytest.mark.parametrize("path", [weighted_afterwards, folded])
def test_any_negative_label_is_ignored(problem, path):
    """Another fill value than -100 must not train token 0."""
    hidden, weight, labels, token_weights = problem
    want = gradients(path(labels, token_weights), hidden, weight)
    other = torch.where(labels == -100, -1, labels)
    for got, wanted in zip(
        gradients(path(other, token_weights), hidden, weight), want, strict=True
    ):
        assert torch.equal(got, wanted)


def test_token_weights_get_no_gradient(problem):
    hidden, weight, labels, token_weights = problem
    token_weights.requires_grad_()
    total, _ = linear_cross_entropy(hidden.requires_grad_(), weight, labels, token_weights)
    total.backward()
    assert token_weights.grad is None


def test_never_holds_all_logits(problem, monkeypatch):
    hidden, weight, labels, token_weights = problem
    sizes = []
    original = module._logits
    monkeypatch.setattr(
        module, "_logits", lambda h, w: sizes.append(len(h) * len(w)) or original(h, w)
    )
    for path in (weighted_afterwards, folded):
        gradients(path(labels, token_weights), hidden, weight)
    assert max(sizes) <= module.CHUNK_LOGITS_CPU < labels.numel() * len(weight)


def test_errors():
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="impl 'fast' is not one of chunked, compiled"):
        linear_cross_entropy(hidden, weight, labels, impl="fast")
    with pytest.raises(ValueError, match=r"labels \(2,\) do not fit hidden"):
        linear_cross_entropy(hidden, weight, labels[:2])
    with pytest.raises(ValueError, match=r"token_weights \(2,\) do not fit labels"):
        linear_cross_entropy(hidden, weight, labels, torch.ones(2))
    assert IMPLS == ("chunked", "compiled")


def test_sharded_weight_is_refused(gloo_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    weight = distribute_tensor(torch.randn(5, 4), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="the output weight is sharded"):
        linear_cross_entropy(torch.randn(3, 4), weight, torch.zeros(3, dtype=torch.long))
