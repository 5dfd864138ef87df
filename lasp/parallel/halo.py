"""The tokens before a unit, for convolutions along the sequence (math §6).

A unit needs the width - 1 tokens before it. Who holds them follows from the layout alone, also where units are shorter
than that and the halo spans several of them; one all-to-all moves them all, and its mirror image moves their gradient.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.autocast import Function
from lasp.kernels.once import once
from lasp.kernels.once_differentiable import once_differentiable
from lasp.kernels.parked import index_tensor
from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.layout import Partition


@dataclass(frozen=True)
class HaloPlan:
    """What this rank sends (local token positions, in order of destination) and where what it receives belongs.

    send_counts, receive_counts: tokens per rank. slots: for each received token, unit * (width - 1) + place.
    """

    send: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    slots: Tensor
    group: Group

    @classmethod
    def of(cls, partition: Partition, width: int, group: Group, device: torch.device) -> "HaloPlan":
        layout, length = partition.layout, partition.unit_length
        sends: list[list[int]] = [[] for _ in range(layout.ranks)]
        slots: list[list[int]] = [[] for _ in range(layout.ranks)]
        for target in range(layout.ranks):
            for index, unit in enumerate(layout.owned(target)):
                for place in range(width - 1):
                    token = unit * length - (width - 1) + place
                    source = layout.owner(token // length) if token >= 0 else None
                    if source is not None and source == partition.rank:
                        where = layout.owned(source).index(token // length)
                        sends[target].append(where * length + token % length)
                    if source is not None and target == partition.rank:
                        slots[source].append(index * (width - 1) + place)
        return cls(
            send=index_tensor(list(chain(*sends)), device),
            send_counts=[len(tokens) for tokens in sends],
            receive_counts=[len(places) for places in slots],
            slots=index_tensor(list(chain(*slots)), device),
            group=group,
        )


def halo(x: Tensor, plan: HaloPlan, units: int, width: int) -> tuple[Tensor, Tensor]:
    """x [B, T_local, D], and the tokens before each of its units, [B, units, width - 1, D], zero before the sequence.

    Who goes on with the x that is returned, and writes its gradient for this alone, spares backward a sum over all
    tokens: to that gradient the few tokens' that come back are added in place.
    """
    x, arrived = _Halo.apply(x, plan)
    tail = x.new_zeros(units * (width - 1), x.shape[0], x.shape[2]).index_copy(0, plan.slots, arrived)
    return x, tail.unflatten(0, (units, width - 1)).movedim(2, 0)


def fragment_tails(x: Tensor, plan: HaloPlan, partition: Partition, width: int) -> tuple[Tensor, Tensor]:
    """x, to go on with, and [N, width - 1, D] for every fragment: what precedes it within its document."""
    x, before = halo(x, plan, len(partition.owned), width)
    tails = x.new_zeros(x.shape[0], len(partition.local), *before.shape[2:])
    place = torch.arange(width - 1, 0, -1, device=x.device)  # distance before the unit
    for unit, index in enumerate(partition.first):
        same_document = place <= partition.local[index].position
        tails[:, index] = before[:, unit] * same_document[:, None]
    return x, tails.flatten(0, 1)


class _Halo(Function):
    """x [B, T_local, D] -> x, the tokens received [received, B, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: HaloPlan) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.shape = plan, x.shape
        ctx.set_materialize_grads(False)

        def exchange() -> Tensor:
            message = x[:, plan.send].transpose(0, 1)
            return comm.all_to_all(message, plan.send_counts, plan.receive_counts, plan.group).wait()

        return x.view_as(x), once(exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, d: Tensor) -> tuple[Tensor, None]:
        plan: HaloPlan = ctx.plan
        back = comm.all_to_all(d, plan.receive_counts, plan.send_counts, plan.group).wait()
        dx = d.new_zeros(ctx.shape) if dx is None else dx
        dx.transpose(0, 1).index_put_((plan.send,), back, accumulate=True)  # several units may have read a token
        return dx, None
