"""SwiGLU and its gradient (`lasp.kernels.swiglu`): a program takes a block of one token's channels."""

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import cdiv, next_power_of_2
from lasp.kernels.triton.launch import launch

BLOCK = 2048  # channels of a program, 16 for each thread of 4 warps


@triton.jit
def _swiglu(
    gate_up,  # [N, 2 I], gate before up
    d_act,  # [N, I], or None: no gradient is wanted
    act,  # [N, I], or None: only the gradient is
    d_gate_up,  # [N, 2 I], or None
    I,
    BLOCK: tl.constexpr,
):
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < I
    gate = tl.load(gate_up + row * 2 * I + col, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * I + I + col, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if act is not None:
        tl.store(act + row * I + col, (silu * up).to(act.dtype.element_ty), mask=inside)
    if d_act is not None:
        d = tl.load(d_act + row * I + col, mask=inside).to(tl.float32)
        d_gate, d_up = d * up * (sigmoid + silu * (1.0 - sigmoid)), d * silu
        tl.store(d_gate_up + row * 2 * I + col, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
        tl.store(d_gate_up + row * 2 * I + I + col, d_up.to(d_gate_up.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor, d_act: Tensor | None, with_act: bool) -> tuple[Tensor | None, Tensor | None]:
    """(SiLU(gate) up if it is wanted, the gradient if there is one of it)."""
    gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
    act = gate_up.new_empty(*gate_up.shape[:-1], width) if with_act else None
    d_act = None if d_act is None else d_act.contiguous()
    d_gate_up = None if d_act is None else gate_up.new_empty(gate_up.shape)
    block = min(BLOCK, next_power_of_2(width))
    grid = gate_up.numel() // (2 * width), cdiv(width, block)
    launch(_swiglu, grid, gate_up, d_act, act, d_gate_up, width, BLOCK=block, num_warps=4)
    return act, d_gate_up
