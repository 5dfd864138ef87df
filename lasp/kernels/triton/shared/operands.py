"""Tensors as the kernels take and give them."""

from typing import TypeVar

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.inputs import Inputs
from lasp.kernels.layouts import laid_out
from lasp.kernels.triton.device import cdiv, next_power_of_2
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait

Call = TypeVar("Call", bound=Inputs)


def contiguous(x: Call) -> Call:
    """The same inputs, laid out as the kernels assume.

    Copies have to live until their half of the op has ended, since kernels that overlap may get their memory (see pdl).
    """
    laid = ((name, t, laid_out(t) if name in "qkv" else t.contiguous()) for name, t in x.tensors.items())
    copies = {name: copy for name, t, copy in laid if copy is not t}
    return x.having(copies) if copies else x


@triton.jit(do_not_specialize=["ROWS"])
def _sum_heads(
    d,  # [rows, G, K]
    y,  # [rows, K]
    ROWS,
    G: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    rows, cols = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BK)
    here = (rows < ROWS)[:, None] & (cols < K)[None, :]
    griddepcontrol_wait()
    total = tl.zeros([BR, BK], tl.float32)
    for n in tl.static_range(G):
        total += tl.load(d + ((rows * G + n) * K)[:, None] + cols[None, :], mask=here, other=0.0).to(tl.float32)
    tl.store(y + (rows * K)[:, None] + cols[None, :], total.to(y.dtype.element_ty), mask=here)


def per_q_head(d: Tensor, q: Tensor) -> Tensor:
    """[B, T, H, K] -> [B, T, Hq, K]: the sum over the value heads that share a q/k head, in fp32."""
    if d.shape[2] == q.shape[2]:
        return d.to(q.dtype)
    y, block = q.new_empty(q.shape), next_power_of_2(q.shape[3])
    rows, at_once = y.numel() // q.shape[3], max(1, 4096 // block)
    launch(
        _sum_heads, (cdiv(rows, at_once),),
        d, y, rows, G=d.shape[2] // q.shape[2], K=q.shape[3], BK=block, BR=at_once, num_warps=4, pdl=True,
    )  # fmt: skip
    return y
