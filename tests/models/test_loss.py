"""The chunked loss of a linear head against F.cross_entropy, and that its logits stay in chunks."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lasp.kernels.cross_entropy import cross_entropy_and_grad
from lasp.models import linear_cross_entropy
from lasp.models.loss import CHUNK_TOKENS, linear_distillation

TOKENS = 2 * CHUNK_TOKENS + 77


def _inputs(dtype: torch.dtype, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(1, tokens, 12, dtype=dtype).requires_grad_()
    weight = torch.randn(50, 12, dtype=dtype).requires_grad_()
    labels = torch.randint(0, 50, (1, tokens)).where(torch.rand(1, tokens) < 0.9, -100)
    return hidden, weight, labels


@pytest.mark.parametrize("tokens", [1, 5, CHUNK_TOKENS, TOKENS])
def test_loss_and_gradients_are_those_of_cross_entropy(tokens):
    hidden, weight, labels = _inputs(torch.float64, tokens)
    labels[0, 0] = 7
    loss, count = linear_cross_entropy(hidden, weight, labels)
    expected = F.cross_entropy((hidden @ weight.mT)[0], labels[0], reduction="sum")
    assert count == (labels != -100).sum() and loss.dtype == torch.float64
    assert (loss - expected).abs() <= 1e-12 * expected
    for actual, wanted in zip(
        torch.autograd.grad(3 * loss, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        assert (actual - wanted).abs().max() <= 1e-12 * wanted.abs().max()  # sums of thousands of tokens


@pytest.mark.parametrize(("divergence", "cross_entropy", "temperature"), [(1.0, 0.0, 1.0), (0.7, 0.4, 2.0)])
def test_distillation_is_told_by_the_teacher_and_the_labels(monkeypatch, divergence, cross_entropy, temperature):
    def in_place(logits: torch.Tensor, *others) -> tuple[torch.Tensor, torch.Tensor]:  # as on a GPU
        total, grad = cross_entropy_and_grad(logits, *others)
        return total, logits.copy_(grad)

    monkeypatch.setattr("lasp.models.loss.cross_entropy_and_grad", in_place)
    hidden, weight, labels = _inputs(torch.float64)
    its = torch.randn(1, TOKENS, 7, dtype=torch.float64), torch.randn(50, 7, dtype=torch.float64)
    told = {"divergence": divergence, "cross_entropy": cross_entropy, "temperature": temperature}
    loss = linear_distillation(hidden, weight, labels, its, **told)
    logits, wanted, valid = (hidden @ weight.mT)[0], (its[0] @ its[1].mT)[0], labels[0] != -100
    own, target = ((z[valid] / temperature).log_softmax(-1) for z in (logits, wanted))
    expected = divergence * temperature**2 * F.kl_div(own, target, log_target=True, reduction="sum")
    expected = expected + cross_entropy * F.cross_entropy(logits, labels[0], reduction="sum")
    assert (loss - expected).abs() <= 1e-12 * expected
    for actual, right in zip(
        torch.autograd.grad(3 * loss, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        assert (actual - right).abs().max() <= 1e-12 * right.abs().max()


def test_autocast_chooses_the_dtype_of_the_inputs_and_nothing_else():
    hidden, weight, labels = _inputs(torch.float32, 40)

    def found(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = linear_cross_entropy(*inputs, labels)[0]
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    with torch.autocast("cpu", torch.bfloat16):
        got = found(hidden, weight)
    for a, b in zip(got, found(hidden.bfloat16(), weight.bfloat16()), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient(frozen):
    hidden, weight, labels = _inputs(torch.float64)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels)[0].backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


def test_half_precision_sums_in_float32():
    """Gradients err like one rounding, 0.25 eps (measured); summed over the 60 chunks in bfloat16 it would be 1 eps."""
    hidden, weight, labels = _inputs(torch.bfloat16, 60 * CHUNK_TOKENS)
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    grads = torch.autograd.grad(loss, (hidden, weight))
    logits = (hidden.detach() @ weight.detach().mT).double()[0].requires_grad_()  # as rounded as those of the loss
    expected = F.cross_entropy(logits, labels[0], reduction="sum")
    assert loss.dtype == torch.float32
    assert (loss - expected).abs() <= 1e-5 * expected
    (grad_logits,) = torch.autograd.grad(expected, logits)
    exact = grad_logits @ weight.double(), grad_logits.mT @ hidden[0].double()
    for grad, wanted in zip(grads, exact, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - wanted).norm() <= 0.5 * torch.finfo(torch.bfloat16).eps * wanted.norm()


def test_no_label_at_all_is_no_loss():
    hidden, weight, labels = _inputs(torch.float64)
    loss, count = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert loss == 0 and count == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_extreme_logits_stay_finite():
    hidden, weight, labels = _inputs(torch.float32)
    loss, _ = linear_cross_entropy(1e4 * hidden, weight, labels)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_logits_exist_in_chunks_only():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max(self.numel, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    hidden, weight, labels = _inputs(torch.float32)
    with Largest() as chunked:
        linear_cross_entropy(hidden, weight, labels)[0].backward()
    with Largest() as whole:
        F.cross_entropy((hidden @ weight.mT)[0], labels[0], reduction="sum").backward()
    assert whole.numel == TOKENS * 50
    assert chunked.numel == CHUNK_TOKENS * 50


def test_labels_of_another_shape_are_refused():
    hidden, weight, labels = _inputs(torch.float32, 6)
    with pytest.raises(ValueError, match=r"labels: got \[1, 5\], expected the tokens' shape \[1, 6\]"):
        linear_cross_entropy(hidden, weight, labels[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int16])
def test_labels_of_another_kind_are_refused(dtype):
    hidden, weight, labels = _inputs(torch.float32, 6)
    with pytest.raises(ValueError, match=f"labels: got {dtype}, expected torch.int64"):
        linear_cross_entropy(hidden, weight, labels.to(dtype))


@pytest.mark.parametrize("label", [7, -1, -101, 2**40])
def test_labels_outside_the_vocabulary_are_refused(label):
    hidden, weight = torch.randn(1, 6, 4), torch.randn(7, 4)
    labels = torch.tensor([[0, 6, -100, label, -100, 1]])
    with pytest.raises(ValueError, match=rf"labels: got {label}, expected 0 to 6 \(the vocabulary\), or -100"):
        linear_cross_entropy(hidden, weight, labels)
    labels[0, 3] = -100
    assert linear_cross_entropy(hidden, weight, labels)[1] == 3
