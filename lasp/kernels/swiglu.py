"""SwiGLU, the gated activation of arXiv:2002.05202, and its gradient; on GPUs one Triton kernel in each direction.

a = SiLU(g) u      dg = da u σ(g) (1 + g (1 - σ(g)))      du = da SiLU(g)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels.autocast import Function
from lasp.kernels.fused import is_large


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) up: [..., 2 I], gate before up, -> [..., I]. Keeps its input alone. Differentiable once."""
    return _SwiGLU.apply(gate_up)


def swiglu_and_grad(gate_up: Tensor, d_act: Tensor) -> tuple[Tensor, Tensor]:
    """(swiglu(gate_up), the gradient for gate_up [..., 2 I]) for d_act, the gradient of the former, [..., I]."""
    if _by_triton(gate_up):
        return _triton(gate_up, d_act, True)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up, _grad(gate, up, d_act)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        if _by_triton(gate_up):
            return _triton(gate_up, None, True)[0]
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_act: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if _by_triton(gate_up):
            return _triton(gate_up, d_act, False)[1]
        gate, up = gate_up.chunk(2, dim=-1)
        return _grad(gate, up, d_act)


def _grad(gate: Tensor, up: Tensor, d_act: Tensor) -> Tensor:
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return torch.cat([d_act * up * (sigmoid + silu * (1 - sigmoid)), d_act * silu], dim=-1)


def _by_triton(x: Tensor) -> bool:
    """Small ones are over before a kernel of ours has started; what is compiled as a whole sees to itself."""
    return is_large(x) and x.dtype != torch.float64 and not torch.compiler.is_compiling()


def _triton(gate_up: Tensor, d_act: Tensor | None, with_act: bool) -> Any:
    from lasp.kernels.triton.swiglu import swiglu

    return swiglu(gate_up, d_act, with_act)
