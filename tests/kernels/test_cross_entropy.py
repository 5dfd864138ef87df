"""Cross-entropy and its gradient, in plain PyTorch and by the Triton kernel, against PyTorch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

from lasp.kernels.cross_entropy import cross_entropy_and_grad
from tests.parallel.inputs import error

triton = pytest.importorskip("lasp.kernels.triton.cross_entropy")
ON_GPU = torch.cuda.is_available()
IGNORED = -100


def draw(gen, rows: int, words: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.randint(words, (rows,), generator=gen)
    targets[torch.rand(rows, generator=gen) < 0.3] = IGNORED
    return (3 * torch.randn(rows, words, generator=gen, dtype=torch.float64)).to(dtype), targets


def definition(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' losses and the gradient of their sum."""
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, targets, ignore_index=IGNORED, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


def test_equals_the_definition(gen):
    logits, targets = draw(gen, 12, 50, torch.float64)
    losses, grad = definition(logits, targets)
    loss, found = cross_entropy_and_grad(logits, targets, IGNORED)
    assert error(loss, losses.sum()) < 1e-14
    assert error(found, grad) < 1e-14


@pytest.mark.skipif(not ON_GPU and not triton.triton.knobs.runtime.interpret, reason="needs a GPU or the interpreter")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 4e-4)])
@pytest.mark.parametrize("words", [50, 8192 + 33])
def test_kernel_equals_the_definition(gen, dtype, bound, words):
    device = "cuda" if ON_GPU else "cpu"
    logits, targets = (x.to(device) for x in draw(gen, 6, words + 3, dtype))
    logits, targets = logits[:, :words], targets.clamp(max=words - 1)  # rows that lie apart
    losses, grad = definition(logits, targets)
    found = triton.cross_entropy(logits, targets, IGNORED)
    assert error(found, losses) < 1e-6
    assert error(logits, grad) < bound
    assert not logits[targets == IGNORED].any()


@pytest.mark.skipif(not ON_GPU and not triton.triton.knobs.runtime.interpret, reason="needs a GPU or the interpreter")
def test_words_that_are_ruled_out(gen, monkeypatch):
    """Whole blocks of them, which come first."""
    monkeypatch.setattr(triton, "BLOCK", 16)
    logits, targets = (x.to("cuda" if ON_GPU else "cpu") for x in draw(gen, 6, 50, torch.float32))
    logits[:, :33], targets = -torch.inf, targets.clamp(min=33)
    targets[0] = IGNORED
    losses, grad = definition(logits, targets)
    assert error(triton.cross_entropy(logits, targets, IGNORED), losses) < 1e-6
    assert error(logits, grad) < 1e-6


def test_a_logit_that_is_no_number_is_seen(gen):
    logits, targets = draw(gen, 4, 50, torch.float32)
    targets[2] = 1
    logits[2, 40] = torch.nan
    assert cross_entropy_and_grad(logits, targets, IGNORED)[0].isnan()
