"""SwiGLU, the gated activation of arXiv:2002.05202, and its gradient; on GPUs one Triton kernel in each direction.

a = SiLU(g) u      dg = da u σ(g) (1 + g (1 - σ(g)))      du = da SiLU(g)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.autocast import Function
from lasp.kernels.fused import by_kernel
from lasp.kernels.once_differentiable import once_differentiable


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) up: [..., 2 I], gate before up, -> [..., I]. Keeps its input alone. Differentiable once."""
    return _SwiGLU.apply(gate_up)


def swiglu_and_grad(gate_up: Tensor, d_act: Tensor) -> tuple[Tensor, Tensor]:
    """(swiglu(gate_up), the gradient for gate_up [..., 2 I]) for d_act, the gradient of the former, [..., I]."""
    return _compute(gate_up, d_act, with_act=True)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _compute(gate_up, None, with_act=True)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_act: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return _compute(gate_up, d_act, with_act=False)[1]


def _compute(gate_up: Tensor, d_act: Tensor | None, with_act: bool) -> Any:
    """(The activation if it is wanted, its gradient if d_act is given); None for what is not."""
    if by_kernel(gate_up):
        from lasp.kernels.triton.swiglu import swiglu

        return swiglu(gate_up, d_act, with_act)
    gate, up = gate_up.chunk(2, dim=-1)
    act = F.silu(gate) * up if with_act else None
    return act, None if d_act is None else _grad(gate, up, d_act)


def _grad(gate: Tensor, up: Tensor, d_act: Tensor) -> Tensor:
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return torch.cat([d_act * up * (sigmoid + silu * (1 - sigmoid)), d_act * silu], dim=-1)
