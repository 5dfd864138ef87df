"""Attention of a rank's queries over the keys and values that visit them, and its gradient on the same way."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.kernels.autocast import Function
from lasp.kernels.blocks import Block, Mask
from lasp.kernels.keys import KeyStore
from lasp.kernels.once import once
from lasp.kernels.once_differentiable import once_differentiable
from lasp.kernels.softmax import Accumulator, Sum, attend, attend_grad
from lasp.parallel.softmax.visits import Visit, Visits

Way = Callable[[Tensor, Tensor], Visits]  # how this rank's k and v, and everybody else's, go visiting
Blocks = dict[int, list[Block]]  # what q sees of each rank's keys


class Earlier(NamedTuple):
    """The segments before the one at hand whose keys it sees, in one call of one softmax layer.

    store: their keys and values, as this rank has them. segment: the number of the one at hand. visitors: the others'
    numbers, and for each what is seen of it and how it goes visiting.
    """

    store: KeyStore
    segment: int
    visitors: dict[int, tuple[Blocks, Way]]


class AttendVisits(Function):
    """o [B, T_local, H, V] of q over the keys and values that visit it: its own segment's, and those of earlier ones.

    In backward the gradients of earlier segments' k and v are added to what the store has of them, and what it has of
    this segment's own, where later ones have added theirs, becomes part of dk and dv.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, blocks: Blocks, way: Way, earlier: Earlier | None = None
    ):
        o, lse = once(lambda: _seen_before(earlier, lambda: _attended(q, k, v, mask, blocks, way, earlier)))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.mask, ctx.blocks, ctx.way, ctx.earlier = mask, blocks, way, earlier
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor):
        q, k, v, o, lse = ctx.saved_tensors
        earlier: Earlier | None = ctx.earlier
        dq: dict[int, Sum] = {}

        def gradients(visits: Visits, blocks: Blocks) -> tuple[Tensor, ...]:
            for visit in visits.backward():
                heads = _query_heads(visit, q, k)
                do_h, q_h, o_h, lse_h = (x[:, :, heads] for x in (do, q, o, lse))
                sums = (dq.setdefault(heads.start, Sum(q_h)), Sum(visit.k, visit.dk), Sum(visit.v, visit.dv))
                attend_grad(do_h, q_h, visit.k, visit.v, o_h, lse_h, sums, blocks[visit.rank], ctx.mask)
            return visits.gradients

        dk, dv = gradients(ctx.way(k, v), ctx.blocks)
        if earlier is not None:
            for segment, (k_there, v_there, *sums) in earlier.store.visit_sums(earlier.visitors):
                seen, there = earlier.visitors[segment]
                parts = gradients(there(k_there, v_there), seen)
                earlier.store.store_sums(segment, _added(parts, sums))
            dk, dv = _added((dk, dv), earlier.store.take_sums(earlier.segment))
        whole = _join(total.result() for total in dq.values())
        return whole, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _seen_before(earlier: Earlier | None, attend: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """attend(), or what it gave when this segment was computed before, if there are others that it looks at again."""
    if earlier is None or not earlier.visitors:
        return attend()
    if not (seen := earlier.store.seen(earlier.segment)):
        seen = attend()
        earlier.store.keep_seen(earlier.segment, *seen)
    o, lse = seen
    return o, lse


def _attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, blocks: Blocks, way: Way, earlier: Earlier | None
) -> tuple[Tensor, Tensor]:
    totals: dict[int, Accumulator] = {}  # by the first of the heads

    def add(visits: Visits, blocks: Blocks) -> None:
        for visit in visits.forward():
            heads = _query_heads(visit, q, k)
            part = q[:, :, heads]
            total = totals.setdefault(heads.start, Accumulator(part, v.shape[-1]))
            attend(total, part, visit.k, visit.v, blocks[visit.rank], mask)

    if earlier is not None:
        for segment, kv in earlier.store.visit(earlier.visitors):
            seen, there = earlier.visitors[segment]
            add(there(*kv), seen)
    add(way(k, v), blocks)
    o, lse = (_join(parts) for parts in zip(*(total.result() for total in totals.values()), strict=True))
    return o, lse


def _added(parts: tuple[Tensor, ...], sums: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Two lists of tensors, added in place of the second's, which may be empty."""
    return tuple(total.add_(part) for part, total in zip(parts, sums, strict=True)) if sums else parts


def _query_heads(visit: Visit, q: Tensor, k: Tensor) -> slice:
    """Those that use the key/value heads of the visit."""
    group = q.shape[2] // k.shape[2]
    first, last, _ = visit.heads.indices(k.shape[2])
    return slice(first * group, last * group)


def _join(parts: Iterable[Tensor]) -> Tensor:
    """The heads' parts side by side."""
    first, *others = parts
    return torch.cat([first, *others], dim=2) if others else first
