"""Value, hidden gradient and weight gradient against ten lines of plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp_modules.config.rules import cpp_compiler
from wmtp_modules.loss import linear_cross_entropy as module
from wmtp_modules.loss.linear_cross_entropy import (
    IMPLS,
    linear_cross_entropy,
    linear_logits,
    losses_and_choices,
)


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


def weighted_afterwards(labels, token_weights, **how):
    def run(hidden, weight):
        losses = linear_cross_entropy(hidden, weight, labels, **how)
        return (losses * token_weights).sum(), losses

    return run


def folded(labels, token_weights, **how):
    return lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, token_weights, **how)


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


@pytest.mark.parametrize("path", [weighted_afterwards, folded])
@pytest.mark.parametrize("spare", [0, 2])
def test_rows_without_a_target_take_no_part(problem, path, spare, monkeypatch):
    """Values and gradients are as before, and products have as many rows as there are targets."""
    hidden, weight, labels, token_weights = problem
    want = gradients(path(labels, token_weights), hidden, weight)
    most, seen, logits_of = int((labels >= 0).sum()) + spare, [], module._logits

    def counting(hidden_ND, *rest):
        seen.append(len(hidden_ND))
        return logits_of(hidden_ND, *rest)

    monkeypatch.setattr(module, "_logits", counting)
    got = gradients(path(labels, token_weights, most_targets=most), hidden, weight)
    for g, w in zip(got, want, strict=True):
        assert relative(g, w) < 1e-6
    assert (got[0][labels == -100] == 0).all()
    assert sum(seen) == most * (2 if path is weighted_afterwards else 1)  # and in the backward


def test_a_second_backward_is_the_first_one_again(problem):
    """The first one scales the gradients of the forward where they lie, if it is the last one."""
    hidden, weight, labels, token_weights = problem
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = 3 * linear_cross_entropy(*leaves, labels, token_weights)[0]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.usefixtures("small_chunks")
def test_a_cpu_has_all_chunks_in_one_place(monkeypatch):
    places, original = [], module._logits

    def noting(*operands):
        logits = original(*operands)
        places.append((logits.data_ptr(), len(logits)))
        return logits

    monkeypatch.setattr(module, "_logits", noting)
    hidden, weight = torch.randn(23, 8, requires_grad=True), torch.randn(1000, 8)
    labels = torch.randint(1000, (23,))
    losses = linear_cross_entropy(hidden, weight, labels)
    losses.sum().backward()
    assert [rows for _, rows in places] == [6, 6, 6, 5] * 2
    assert len({place for place, _ in places[:4]}) == len({place for place, _ in places[4:]}) == 1


def test_targets_beyond_the_promised_number_are_an_error(problem):
    hidden, weight, labels, _ = problem
    with pytest.raises(RuntimeError, match="more targets than most_targets"):
        linear_cross_entropy(hidden, weight, labels, most_targets=int((labels >= 0).sum()) - 1)


@pytest.mark.slow
@pytest.mark.skipif(not cpp_compiler(), reason="torch.compile finds no C++ compiler ($CXX or g++)")
@pytest.mark.parametrize("path", [weighted_afterwards, folded])
def test_compiled_equals_chunked(problem, path):
    hidden, weight, labels, token_weights = problem
    want = gradients(path(labels, token_weights), hidden, weight)
    got = gradients(path(labels, token_weights, impl="compiled"), hidden, weight)
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


# ------------------------------------------------------------------- operands in bf16


def bf16_problem(N=96, D=512, V=1000):
    """Logits with a deviation of 2, of which bf16 would keep steps of 0.008 to 0.03."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, D, generator=generator).bfloat16()
    weight = (torch.randn(V, D, generator=generator) * 2 / D**0.5).bfloat16()
    labels = torch.randint(V, (N,), generator=generator)
    labels[::7] = -100
    return hidden, weight, labels, torch.rand(N, generator=generator) * 3


@pytest.fixture
def small_chunks(monkeypatch):
    """Seven rows of logits at a time, and a weight that is read in several pieces."""
    monkeypatch.setattr(module, "CHUNK_LOGITS_CPU", 7 * 1000)


def assert_rounded_once(got, want):
    """``got`` is bf16; ``want`` its value in fp64. Half a unit in the last place is 2^-8."""
    assert got.dtype == torch.bfloat16
    error = (got.double() - want).abs()
    assert (error <= 2**-8 * want.abs() + 1e-6 * want.abs().max()).all()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("path", [weighted_afterwards, folded])
def test_bf16_operands_give_the_losses_and_gradients_of_fp64(path):
    """Rho-1 ranks differences of losses: the logits' own rounding to bf16 would be 1e-2."""
    hidden, weight, labels, token_weights = bf16_problem()
    losses, *grads = gradients(path(labels, token_weights), hidden, weight)
    want, *want_grads = gradients(path(labels, token_weights), hidden.double(), weight.double())
    assert losses.dtype == torch.float32
    assert (losses - want).abs().max() < 1e-5
    for got, wanted in zip(grads, want_grads, strict=True):
        assert_rounded_once(got, wanted)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("path", [weighted_afterwards, folded])
def test_a_scalar_behind_the_loss_scales_both_gradients_alike(path):
    """1 / 333 is 0.11 % off in bf16."""
    hidden, weight, labels, token_weights = bf16_problem()

    def scaled(h, w):
        total, losses = path(labels, token_weights)(h, w)
        return total / 333, losses

    _, *grads = gradients(scaled, hidden, weight)
    _, *want_grads = gradients(scaled, hidden.double(), weight.double())
    for got, want in zip(grads, want_grads, strict=True):
        scale = (got.double() * want).sum() / want.square().sum()
        assert abs(scale - 1) < 1e-4
        assert relative(got.double(), want) < 3e-3  # rounded to bf16, at most twice


def test_what_is_upcast_is_bounded_by_the_chunk(monkeypatch):
    """Neither the weight nor all hidden states are ever whole in fp32."""
    hidden, weight, labels, token_weights = bf16_problem(N=600, D=128, V=500)
    monkeypatch.setattr(module, "CHUNK_LOGITS_CPU", limit := 10 * 500)
    weight_grad, sizes = weight.numel(), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.dtype == torch.float32:
                sizes.append(out.untyped_storage().nbytes() // 4)
            return out

    for path in (weighted_afterwards, folded):
        with Sizes():
            gradients(path(labels, token_weights), hidden, weight)
    assert limit < hidden.numel() != weight_grad > limit
    assert {size for size in sizes if size > limit} == {weight_grad}


def test_on_cuda_the_product_itself_gives_and_adds_fp32():
    """With tensors that have no contents: what a GPU would be asked for."""
    asked = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "mm" in func.__name__:
                asked.append((func, args[0].dtype, out.dtype))
            return out

    with FakeTensorMode():
        hidden, weight = (
            torch.empty(n, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for n in (40, 300)
        )
        labels = torch.empty(40, dtype=torch.int64, device="cuda")
        with Asked():  # the folded path makes its gradients in the forward
            linear_cross_entropy(hidden, weight, labels, torch.empty(40, device="cuda"))
    aten, wide = torch.ops.aten, torch.float32
    added = (aten.addmm.dtype_out, wide, wide)  # no pass of its own over the weight's gradient
    assert asked == [(aten.mm.dtype, torch.bfloat16, wide), added, added]


def test_logits_of_bf16_operands_are_fp32_and_differentiable():
    hidden, weight, _, _ = bf16_problem(V=300)
    factor = torch.rand(8, 12, 300, generator=torch.Generator().manual_seed(4)) * 1.1

    def run(h, w):
        logits = linear_logits(h.view(8, 12, -1), w)
        return (logits * factor).sum(), logits

    logits, *grads = gradients(run, hidden, weight)
    want, *want_grads = gradients(run, hidden.double(), weight.double())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), want, rtol=0, atol=1e-5)
    for got, wanted in zip(grads, want_grads, strict=True):
        assert_rounded_once(got, wanted)


@pytest.mark.parametrize(
    ("n", "vocab", "want"),
    [
        (17, 100, [6, 6, 5]),
        (300, 4, [128, 128, 44]),  # at most 200, and multiples of 128
        (200, 4, [128, 72]),
        (16, 100, [8, 8]),
        (8, 100, [8]),
        (0, 100, [0]),
        (3, 999, [1] * 3),
    ],
)
def test_chunks_are_of_one_length_but_for_the_last(monkeypatch, n, vocab, want):
    monkeypatch.setattr(module, "CHUNK_LOGITS_CPU", 800)
    chunks = module._chunks(n, vocab, torch.device("cpu"))
    assert [chunk.stop - chunk.start for chunk in chunks] == want
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(n))


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
        module, "_logits", lambda h, w, *out: sizes.append(len(h) * len(w)) or original(h, w, *out)
    )
    for path in (weighted_afterwards, folded):
        gradients(path(labels, token_weights), hidden, weight)
    assert max(sizes) <= module.CHUNK_LOGITS_CPU < labels.numel() * len(weight)


def test_choices_are_the_likeliest_tokens_of_the_same_product(problem, monkeypatch):
    """Also where a label is ignored; one product of a chunk gives both, and no gradient."""
    hidden, weight, labels, _ = problem
    want = (hidden @ weight.T).argmax(-1)
    sizes, original = [], module._logits
    monkeypatch.setattr(
        module, "_logits", lambda h, w, *out: sizes.append(len(h) * len(w)) or original(h, w, *out)
    )
    losses, choices = losses_and_choices(hidden.requires_grad_(), weight, labels)
    assert sum(sizes) == labels.numel() * len(weight)
    assert max(sizes) <= module.CHUNK_LOGITS_CPU
    assert choices.equal(want)
    assert losses.equal(linear_cross_entropy(hidden, weight, labels).detach())
    assert not losses.requires_grad


@pytest.mark.usefixtures("small_chunks")
def test_choices_of_bf16_operands_are_those_of_fp32_logits():
    """As decoding takes them: rounded to bf16, the two best of some positions would tie."""
    hidden, weight, labels, _ = bf16_problem()
    weight[1] = weight[0] = 4 * weight[0]
    weight[1, 0] *= 1.25
    _, choices = losses_and_choices(hidden, weight, labels)
    logits = linear_logits(hidden, weight)
    assert logits.gather(1, choices[:, None]).equal(logits.amax(1, keepdim=True))
    assert (logits.bfloat16().argmax(-1) != logits.argmax(-1)).any()


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
