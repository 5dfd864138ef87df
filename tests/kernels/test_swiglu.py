"""SwiGLU and its gradient, in plain PyTorch and by the Triton kernel, against PyTorch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

from lasp.kernels.swiglu import swiglu, swiglu_and_grad
from tests.parallel.inputs import error

triton = pytest.importorskip("lasp.kernels.triton.swiglu")
ON_GPU = torch.cuda.is_available()
by_triton = pytest.mark.skipif(
    not ON_GPU and not triton.triton.knobs.runtime.interpret, reason="needs a GPU or Triton's interpreter"
)


def definition(gate_up: torch.Tensor, d_act: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    act = F.silu(gate) * up
    return act.detach(), torch.autograd.grad(act, leaf, d_act.double())[0]


@pytest.mark.parametrize("shape", [(2, 3, 10), (1, 5, 4098)])
def test_equals_the_definition(gen, shape):
    gate_up = torch.randn(shape, generator=gen, dtype=torch.float64, requires_grad=True)
    d_act = torch.randn(*shape[:-1], shape[-1] // 2, generator=gen, dtype=torch.float64)
    act, grad = definition(gate_up, d_act)
    found = swiglu(gate_up)
    assert error(found, act) < 1e-14
    assert error(torch.autograd.grad(found, gate_up, d_act)[0], grad) < 1e-14
    for mine, theirs in zip(swiglu_and_grad(gate_up.detach(), d_act), (act, grad), strict=True):
        assert error(mine, theirs) < 1e-14


@by_triton
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("width", [7, 2056])
def test_kernel_equals_the_definition(gen, dtype, bound, width):
    device = "cuda" if ON_GPU else "cpu"
    gate_up = (4 * torch.randn(2, 3, 2 * width, generator=gen)).to(device, dtype)
    d_act = torch.randn(2, 3, width, generator=gen).to(device, dtype)
    act, grad = definition(gate_up, d_act)
    found = triton.swiglu(gate_up, d_act, True)
    assert error(found[0], act) < bound
    assert error(found[1], grad) < bound
    assert triton.swiglu(gate_up, None, True)[1] is None
    (nothing, again) = triton.swiglu(gate_up, d_act, False)
    assert nothing is None
    assert torch.equal(again, found[1])
