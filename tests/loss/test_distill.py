"""Self-distillation against plain PyTorch: values, gradients, precision, and what is held."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp_modules.config.rules import cpp_compiler
from wmtp_modules.loss import distill as distill_module
from wmtp_modules.loss import linear_cross_entropy as module
from wmtp_modules.loss.distill import Distill, distilled_cross_entropy
from wmtp_modules.loss.linear_cross_entropy import linear_cross_entropy
from wmtp_modules.loss.mtp_loss import mtp_labels

DISTILL = Distill(weight=0.7, temperature=2.0)
B, T, J, D, V = 3, 9, 3, 16, 50


def plain(hidden, weight, labels, teacher, token_weights, distill=DISTILL):
    """Position by position, from the definition."""
    (z, y), s = ((x @ weight.T for x in (hidden, teacher)), distill.temperature)
    ce, kl = torch.zeros(2, *labels.shape, dtype=z.dtype)
    ce, kl = [*ce.flatten()], [*kl.flatten()]
    places = [(b, t, j) for b in range(B) for t in range(T) for j in range(J)]
    for i, (b, t, j) in enumerate(places):
        if labels[b, t, j] >= 0:
            k = j + 1  # head 0 predicts token t + k + 1 at position t + k
            log_p, log_q = ((x / s).log_softmax(-1) for x in (y[b, t + k].detach(), z[b, t, j]))
            ce[i] = F.cross_entropy(z[b, t, j], labels[b, t, j])
            kl[i] = s**2 * (log_p.exp() * (log_p - log_q)).sum()
    ce, kl = (torch.stack(x).view(labels.shape) for x in (ce, kl))
    loss = (1 - distill.weight) * ce + distill.weight * kl
    return (loss * token_weights).sum(), ce, kl


def afterwards(
    hidden, weight, labels, teacher, token_weights, distill=DISTILL, impl="chunked", **how
):
    operands = hidden, weight, labels, teacher, distill
    loss, *figures = distilled_cross_entropy(*operands, impl=impl, **how)
    return (loss * token_weights).sum(), *figures


def folded(hidden, weight, labels, teacher, token_weights, distill=DISTILL, impl="chunked", **how):
    operands = hidden, weight, labels, teacher, distill, token_weights
    return distilled_cross_entropy(*operands, impl=impl, **how)


@pytest.fixture
def problem(monkeypatch):
    """Rows of two documents, prompts, padding, and chunks that end in the midst of a row."""
    monkeypatch.setattr(module, "CHUNK_LOGITS_CPU", 2 * 5 * V)
    draw = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(B, T, *n, D, generator=draw) for n in ((J,), ()))
    weight, tokens = torch.randn(V, D, generator=draw), torch.randint(V, (B, T), generator=draw)
    doc = torch.tensor([[0] * 5 + [1] * 4, [0] * 7 + [-1] * 2, [0] * 9])
    keep = (torch.rand(B, T, generator=draw) < 0.8) & (doc >= 0)
    labels = mtp_labels(tokens, keep, doc, J + 1)[..., 1:]
    return hidden, weight, labels, teacher, torch.rand(B, T, J, generator=draw) * 3


def gradients(function, hidden, weight, labels, teacher, *rest):
    hidden, weight, teacher = (x.clone().requires_grad_() for x in (hidden, weight, teacher))
    total, ce, kl = function(hidden, weight, labels, teacher, *rest)
    total.backward()
    assert teacher.grad is None
    return [x.detach() for x in (total, ce, kl, hidden.grad, weight.grad)]


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("path", [afterwards, folded])
@pytest.mark.parametrize("distill", [DISTILL, Distill(1.0, 1.0), Distill(0.3, 0.5)])
def test_equals_plain_pytorch(problem, path, distill):
    got, want = (gradients(f, *problem, distill) for f in (path, plain))
    assert (want[2] > 0.1).any()
    for g, w in zip(got, want, strict=True):
        assert relative(g, w) < 2e-6
    nothing = problem[2] < 0
    assert all((x[nothing] == 0).all() for x in got[1:4])


@pytest.mark.parametrize("path", [afterwards, folded])
def test_gradcheck_in_double(problem, path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS_CPU", 2 * 4 * 7)
    hidden, weight, labels, teacher, token_weights = problem
    hidden = hidden[:2, ..., :4].double().requires_grad_()
    weight, teacher = weight[:7, :4].double().requires_grad_(), teacher[:2, :, :4].double()
    rest = labels[:2].clamp(max=6), teacher, token_weights[:2].double()
    # Of the weight only what comes through the student counts: the teacher is made beforehand.
    logits = (teacher @ weight.T).detach()
    assert torch.autograd.gradcheck(lambda h: path(h, weight.detach(), *rest)[0], hidden)

    def student(h, w):
        s, total = DISTILL.temperature, 0.0
        for j in range(J):
            own, k = rest[0][:, : T - j - 1, j], j + 1
            z, y = h[:, : T - k, j] @ w.T, logits[:, k:]
            kl = F.kl_div((z / s).log_softmax(-1), (y / s).softmax(-1), reduction="none").sum(-1)
            ce = F.cross_entropy(z.flatten(0, 1), own.flatten(), reduction="none").view(own.shape)
            mixed = (1 - DISTILL.weight) * ce + DISTILL.weight * s**2 * kl
            total = total + (mixed * (own >= 0) * rest[2][:, : T - k, j]).sum()
        return total

    want = torch.autograd.grad(student(hidden, weight), weight)[0]
    got = torch.autograd.grad(path(hidden, weight, *rest)[0], weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", [afterwards, folded])
def test_a_scalar_behind_the_loss_and_frozen_weights(problem, path):
    want = gradients(path, *problem)
    hidden, weight = problem[0].clone().requires_grad_(), problem[1]
    (path(hidden, weight, *problem[2:])[0] / 3).backward()
    torch.testing.assert_close(hidden.grad, want[3] / 3)
    assert not path(problem[0], weight, *problem[2:])[0].requires_grad


@pytest.mark.parametrize("path", [afterwards, folded])
def test_bf16_operands_give_what_fp64_does(problem, path):
    """Losses to 1e-5, gradients rounded once."""
    narrow = [x.bfloat16() if i in (0, 1, 3) else x for i, x in enumerate(problem)]
    wide = [x.double() if x.is_floating_point() else x for x in narrow]
    got, want = gradients(path, *narrow), gradients(path, *wide)
    for g, w in zip(got[1:3], want[1:3], strict=True):
        assert g.dtype == torch.float32
        assert (g - w).abs().max() < 1e-5
    for g, w in zip(got[3:], want[3:], strict=True):
        assert g.dtype == torch.bfloat16
        assert (g - w).abs().max() <= 2**-8 * w.abs().max()
        assert ((g - w).abs() <= 2**-8 * w.abs() + 1e-6 * w.abs().max()).all()


def test_a_teacher_that_is_the_student_teaches_nothing(problem):
    """With the positions shifted: KL and its gradient are 0."""
    _, weight, labels, teacher, token_weights = problem
    hidden = torch.stack([teacher.roll(-j - 1, dims=1) for j in range(J)], dim=2)
    rest = labels, teacher, token_weights, Distill(1.0, 2.0)
    _, ce, kl, *grads = gradients(folded, hidden, weight, *rest)
    assert kl.abs().max() < 1e-5 < ce.max()
    assert max(g.abs().max() for g in grads) < 1e-5


@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize("path", [afterwards, folded])
def test_positions_that_predict_nothing_take_no_part(problem, path, spare, monkeypatch):
    """Values and gradients are as before, and products have as many rows as there are targets."""
    want, (_, _, labels, *_) = gradients(path, *problem), problem
    teachers = {(b, t + j + 1) for b, t, j in (labels >= 0).nonzero().tolist()}
    most, seen, logits_of = len(teachers) + spare, [], distill_module._logits
    assert most < 0.9 * B * T

    def counting(hidden_ND, *rest):
        seen.append(len(hidden_ND))
        return logits_of(hidden_ND, *rest)

    monkeypatch.setattr(distill_module, "_logits", counting)
    got = gradients(lambda *a: path(*a, most_targets=most), *problem)
    for g, w in zip(got, want, strict=True):
        assert relative(g, w) < 1e-6
    # The teacher once and each head; those of the heads again in a backward of their own.
    assert sum(seen) == most * (1 + J) * (2 if path is afterwards else 1)
    with pytest.raises(RuntimeError, match="more targets than most_targets"):
        path(*problem, most_targets=len(teachers) - 1)


@pytest.mark.parametrize("path", [afterwards, folded])
def test_never_holds_all_logits(problem, path, monkeypatch):
    """The largest tensor is the plain loss's: a chunk, of which each of two has half."""
    hidden, weight, labels, teacher, token_weights = problem
    n = 40  # so that logits are most of what there is
    hidden, labels, token_weights = (
        x.repeat(n, 1, *[1] * (x.dim() - 2)) for x in (hidden, labels, token_weights)
    )
    teacher, weight = teacher.repeat(n, 1, 1), weight.repeat(40, 1)
    monkeypatch.setattr(module, "CHUNK_LOGITS_CPU", limit := 60 * len(weight))
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out):
                sizes.append(out.untyped_storage().nbytes() // 4)
            return out

    with Sizes():
        gradients(path, hidden, weight, labels, teacher, token_weights)
    everything = labels.numel() * len(weight)
    assert max(sizes) <= limit < everything / 50


@pytest.mark.nightly
@pytest.mark.skipif(not cpp_compiler(), reason="torch.compile finds no C++ compiler ($CXX or g++)")
@pytest.mark.parametrize("path", [afterwards, folded])
def test_compiled_equals_chunked(problem, path):
    want, got = (gradients(path, *problem, DISTILL, impl) for impl in ("chunked", "compiled"))
    for g, w in zip(got, want, strict=True):
        assert relative(g, w) < 1e-6


def test_next_to_no_distillation_is_the_plain_loss(problem):
    hidden, weight, labels, _, token_weights = problem
    want, losses = linear_cross_entropy(hidden, weight, labels, token_weights)
    got, ce, _ = folded(*problem, Distill(1e-9))
    torch.testing.assert_close((got, ce), (want, losses))
