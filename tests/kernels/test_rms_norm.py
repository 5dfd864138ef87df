"""RMSNorm behind an addition, in plain PyTorch and by the Triton kernels, against its definition in float64."""

import pytest
import torch

import lasp.kernels.rms_norm as rms_norm
from tests.parallel.inputs import error

triton = pytest.importorskip("lasp.kernels.triton.rms_norm")
ON_GPU = torch.cuda.is_available()
EPS = 1e-3


def definition(x, h, weight, ds, dy):
    """s, y, and the gradients for x (and h, which is the same) and the weight."""
    x, weight = (t.double().requires_grad_() for t in (x, weight))
    s = x if h is None else x + h.double()
    y = s / (s.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    outputs, gradients = ([s, y], [ds, dy]) if ds is not None else ([y], [dy])
    return [s, y, *torch.autograd.grad(outputs, [x, weight], [d.double() for d in gradients])]


def draw(gen, rows: int, channels: int, dtype: torch.dtype, device: str = "cpu"):
    return [torch.randn(*shape, channels, generator=gen, dtype=torch.float64).to(device, dtype)
            for shape in ((2, rows), (2, rows), (), (2, rows), (2, rows))]  # fmt: skip


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("around", [True, False])
def test_equals_the_definition(gen, added, around):
    x, h, weight, ds, dy = draw(gen, 3, 20, torch.float64)
    h, ds = h if added else None, ds if around else None
    for t in (x, weight):
        t.requires_grad_()
    s, y = rms_norm.add_rms_norm(x, h, weight, EPS)
    outputs, gradients = ([s, y], [ds, dy]) if around else ([y], [dy])
    found = [s, y, *torch.autograd.grad(outputs, [x, weight], gradients)]
    for mine, exact in zip(found, definition(x.detach(), h, weight.detach(), ds, dy), strict=True):
        assert error(mine, exact) < 1e-14


@pytest.mark.skipif(not ON_GPU and not triton.triton.knobs.runtime.interpret, reason="needs a GPU or the interpreter")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize(("rows", "channels"), [(3, 20), (20, 300), (4, 2304)])
@pytest.mark.parametrize(("added", "around"), [(True, True), (False, True), (True, False), (False, False)])
def test_kernels_equal_the_definition(gen, monkeypatch, dtype, bound, rows, channels, added, around):
    """Through autograd, and with fewer programs than there are blocks of tokens."""
    monkeypatch.setattr(rms_norm, "by_kernel", lambda x: True)
    monkeypatch.setattr(triton, "PROGRAMS", 2)
    monkeypatch.setattr(triton, "multiprocessors", lambda device: 1)
    x, h, weight, ds, dy = draw(gen, rows, channels, dtype, "cuda" if ON_GPU else "cpu")
    leaves = [x, weight, *([h] if added else [])]
    for t in leaves:
        t.requires_grad_()
    s, y = rms_norm.add_rms_norm(x, h if added else None, weight, EPS)
    outputs, gradients = ([s, y], [ds, dy]) if around else ([y], [dy])
    found = [s, y, *torch.autograd.grad(outputs, leaves, gradients)]
    s_exact, y_exact, dx, dw = definition(x.detach(), h.detach() if added else None, weight.detach(),
                                          ds if around else None, dy)  # fmt: skip
    for mine, exact in zip(found, [s_exact, y_exact, dx, dw, *([dx] if added else [])], strict=True):
        assert mine.dtype == dtype
        assert error(mine, exact) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_default_eps_is_pytorchs(gen, monkeypatch, dtype):
    monkeypatch.setattr(rms_norm, "by_kernel", lambda x: True)
    if not ON_GPU and not triton.triton.knobs.runtime.interpret:
        pytest.skip("needs a GPU or the interpreter")
    x, _, weight, _, _ = draw(gen, 2, 20, dtype, "cuda" if ON_GPU else "cpu")
    x *= 1e-2
    wanted = torch.nn.functional.rms_norm(x.float(), (20,), weight.float())
    assert error(rms_norm.add_rms_norm(x, None, weight, None)[1].float(), wanted) < torch.finfo(dtype).eps


def test_nothing_through_the_norm(gen, monkeypatch):
    monkeypatch.setattr(rms_norm, "by_kernel", lambda x: True)
    if not ON_GPU and not triton.triton.knobs.runtime.interpret:
        pytest.skip("needs a GPU or the interpreter")
    x, h, weight, ds, _ = draw(gen, 2, 20, torch.float32, "cuda" if ON_GPU else "cpu")
    x.requires_grad_(), h.requires_grad_()
    s, _ = rms_norm.add_rms_norm(x, h, weight, EPS)
    for d in torch.autograd.grad(s, [x, h], ds):
        assert torch.equal(d, ds)
