"""Attention of a rank's queries over the keys and values that visit them, and its gradient on the same way."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels.autocast import Function
from lasp.kernels.blocks import Block, Mask
from lasp.kernels.once import once
from lasp.kernels.softmax import Accumulator, Sum, attend, attend_grad
from lasp.parallel.softmax.visits import Visit, Visits

Way = Callable[[Tensor, Tensor], Visits]  # how this rank's k and v, and everybody else's, go visiting


class AttendVisits(Function):
    """o [B, T_local, H, V] of q over the keys and values that visit it. blocks: what q sees of each rank's keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, blocks: dict[int, list[Block]], way: Way):
        o, lse = once(lambda: _attended(q, k, v, mask, blocks, way))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.mask, ctx.blocks, ctx.way = mask, blocks, way
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor):
        q, k, v, o, lse = ctx.saved_tensors
        dq: dict[int, Sum] = {}
        visits = ctx.way(k, v)
        for visit in visits.backward():
            heads = _query_heads(visit, q, k)
            do_h, q_h, o_h, lse_h = (x[:, :, heads] for x in (do, q, o, lse))
            sums = (dq.setdefault(heads.start, Sum(q_h)), Sum(visit.k, visit.dk), Sum(visit.v, visit.dv))
            attend_grad(do_h, q_h, visit.k, visit.v, o_h, lse_h, sums, ctx.blocks[visit.rank], ctx.mask)
        dk, dv = visits.gradients
        whole = _join(total.result() for total in dq.values())
        return whole, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, blocks: dict[int, list[Block]], way: Way
) -> tuple[Tensor, Tensor]:
    totals: dict[int, Accumulator] = {}  # by the first of the heads
    for visit in way(k, v).forward():
        heads = _query_heads(visit, q, k)
        part = q[:, :, heads]
        total = totals.setdefault(heads.start, Accumulator(part, v.shape[-1]))
        attend(total, part, visit.k, visit.v, blocks[visit.rank], mask)
    o, lse = (_join(parts) for parts in zip(*(total.result() for total in totals.values()), strict=True))
    return o, lse


def _query_heads(visit: Visit, q: Tensor, k: Tensor) -> slice:
    """Those that use the key/value heads of the visit."""
    group = q.shape[2] // k.shape[2]
    first, last, _ = visit.heads.indices(k.shape[2])
    return slice(first * group, last * group)


def _join(parts: Iterable[Tensor]) -> Tensor:
    """The heads' parts side by side."""
    first, *others = parts
    return torch.cat([first, *others], dim=2) if others else first
