"""The last tokens of a segment, for a convolution that goes on in the next one (math §6, §7).

A tail [B, width - 1, D] is whole on every rank, and so is its gradient. Every rank computes the same steps, with places
and weights of its own, so that backward sends its messages in one order everywhere.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.autocast import Function
from lasp.kernels.once_differentiable import once_differentiable
from lasp.kernels.parked import to_device
from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.layout import Partition


@dataclass(frozen=True)
class TailPlan:
    """Where the tail that enters a segment belongs, and where the one that leaves it comes from. w = width - 1.

    first: [units of this rank] each unit's first fragment.  into: [units, w] which token of the entering tail stands
    there before the unit; from_tail: whether one of its document does at all.  local: [w] this rank's token that stands
    there in the leaving tail; is_local: whether it has it and its document goes on.  again, is_again: the same for
    tokens of the entering tail, where a segment is shorter than w.
    """

    first: Tensor
    into: Tensor
    from_tail: Tensor
    local: Tensor
    is_local: Tensor
    again: Tensor
    is_again: Tensor

    @classmethod
    def of(cls, partition: Partition, width: int, device: torch.device) -> "TailPlan":
        w, length = width - 1, partition.unit_length
        before = [[unit * length - w + i for i in range(w)] for unit in partition.owned]
        back = [partition.local[index].position for index in partition.first]
        last = [partition.tokens - w + i for i in range(w)]
        start = partition.offsets[-2] - (partition.past if partition.documents == 1 else 0)  # of the last document
        units = [token // length for token in last]
        mine = [token >= max(start, 0) and unit in partition.owned for token, unit in zip(last, units, strict=True)]
        local = [
            partition.owned.index(unit) * length + token % length if own else 0
            for token, unit, own in zip(last, units, mine, strict=True)
        ]
        again = [start <= token < 0 and partition.rank == 0 for token in last]

        def tensor(rows: Any) -> Tensor:
            return to_device(torch.tensor(rows, device="cpu"), device)

        def place(token: int) -> int:
            """In the entering tail, which ends where the segment begins; any place for a token that is not there."""
            return max(0, min(token + w, w - 1))

        return cls(
            first=tensor(partition.first),
            into=tensor([[place(token) for token in row] for row in before]),
            from_tail=tensor(
                [[t < 0 and w - i <= far for i, t in enumerate(row)] for row, far in zip(before, back, strict=True)]
            )[..., None],
            local=tensor(local),
            is_local=tensor(mine)[:, None],
            again=tensor([place(token) for token in last]),
            is_again=tensor(again)[:, None],
        )


def enter(tail: Tensor, plan: TailPlan, group: Group) -> tuple[Tensor, Tensor]:
    """What the entering tail is to this rank's units, [B, units, w, D], and to the leaving tail, [B, w, D]."""
    tail = _Replicated.apply(tail, group)
    return tail[:, plan.into].where(plan.from_tail, 0), tail[:, plan.again].where(plan.is_again, 0)


def leave(x: Tensor, again: Tensor | None, plan: TailPlan, group: Group) -> tuple[Tensor, Tensor]:
    """x [B, T_local, D], to go on with, and the leaving tail.

    As with `lasp.parallel.halo.halo`, whose turn comes next: whoever goes on with the x that is returned writes its
    gradient for this alone.
    """
    x, last = _Last.apply(x, plan)
    return x, _Total.apply(last if again is None else last + again, group)


class _Last(Function):
    """x [B, T_local, D] -> x, this rank's part of the leaving tail."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: TailPlan) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.shape = plan, x.shape
        ctx.set_materialize_grads(False)
        return x.view_as(x), x[:, plan.local].where(plan.is_local, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, d: Tensor | None) -> tuple[Tensor | None, None]:
        if d is None:
            return dx, None
        dx = d.new_zeros(ctx.shape) if dx is None else dx
        rows = d.where(ctx.plan.is_local, 0).transpose(0, 1)
        dx.transpose(0, 1).index_put_((ctx.plan.local,), rows, accumulate=True)
        return dx, None


class _Replicated(Function):
    """Equal on all ranks, which use it differently: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return comm.all_reduce(d, ctx.group).wait(), None


class _Total(Function):
    """The sum over the ranks, on each, which use it alike: its gradient is that of every part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return comm.all_reduce(x, group).wait()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return d, None
