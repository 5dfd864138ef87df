"""Keys and values that visit other ranks' queries, and their gradients' way home.

Both ways start the next transfer before the present visitors are used, on the transport's own stream; `Pending` holds
the tensors sent until they have left.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lasp.kernels.softmax import zeros_like
from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.softmax.cost import GATHERS
from lasp.parallel.softmax.plan import Plan


class Visit(NamedTuple):
    """Another rank's k, v [B, T_local, heads, K or V], and in backward where their gradients are summed."""

    rank: int
    heads: slice
    k: Tensor
    v: Tensor
    dk: Tensor | None = None
    dv: Tensor | None = None


class Visits(Protocol):
    """Everybody's keys and values, in an order of the way's own, with `backward` to take their gradients home."""

    gradients: tuple[Tensor, ...]  # dk, dv of this rank's own, in the accumulation dtype, once `backward` has ended

    def forward(self) -> Iterator[Visit]: ...

    def backward(self) -> Iterator[Visit]: ...


class RingVisits:
    """Ring attention (arXiv:2310.01889): keys and values go from rank to rank, past those where nobody sees them.

    `stride`: the ring consists of every stride-th rank of the group.
    """

    def __init__(self, k: Tensor, v: Tensor, plan: Plan, group: Group, stride: int):
        self.here: tuple[Tensor, ...] = (k, v)
        self.plan, self.group, self.stride = plan, group, stride
        self.gradients: tuple[Tensor, ...] = ()

    def forward(self) -> Iterator[Visit]:
        yield from (visit for visit, _ in self._travel())

    def backward(self) -> Iterator[Visit]:
        travelling = None
        for visit, hop in self._travel():
            sums = zeros_like(visit.k), zeros_like(visit.v)
            yield visit._replace(dk=sums[0], dv=sums[1])
            if travelling is not None:
                for total, part in zip(sums, travelling.wait(), strict=True):
                    total += part
            travelling = comm.shift(sums, self.group, hop * self.stride)
        assert travelling is not None
        self.gradients = travelling.wait()

    def _travel(self) -> Iterator[tuple[Visit, int]]:
        """The visits, each with the way to the next one, or home after the last."""
        ranks, steps = self.plan.ranks, self.plan.steps
        here = self.here
        for step, following in zip(steps, [*steps[1:], ranks], strict=True):
            hop = following - step
            coming = comm.shift(here, self.group, hop * self.stride) if following < ranks else None
            k, v = here
            yield Visit((self.plan.rank - step) % ranks, slice(None), k, v), hop
            if coming is not None:
                here = coming.wait()


class GatheredVisits:
    """LASP-2H (arXiv:2502.07563): all-gathers of keys and values, reduce-scatters of their gradients.

    A share of the heads at a time, and the next one on its way, so that memory stays bounded.
    """

    def __init__(self, k: Tensor, v: Tensor, plan: Plan, group: Group):
        self.k, self.v, self.plan, self.group = k, v, plan, group
        share = -(-k.shape[2] // GATHERS)
        self.parts = [slice(h, min(h + share, k.shape[2])) for h in range(0, k.shape[2], share)]
        self.gradients: tuple[Tensor, ...] = ()

    def forward(self) -> Iterator[Visit]:
        for part, k, v in self._gathered():
            for rank in range(self.plan.ranks):
                yield Visit(rank, part, k[rank], v[rank])

    def backward(self) -> Iterator[Visit]:
        leaving, arrived = None, []
        for part, k, v in self._gathered():
            dk, dv = zeros_like(k), zeros_like(v)
            for rank in range(self.plan.ranks):
                yield Visit(rank, part, k[rank], v[rank], dk[rank], dv[rank])
            if leaving is not None:
                arrived.append([pending.wait() for pending in leaving])
            leaving = [comm.reduce_scatter(d, self.group) for d in (dk, dv)]
        assert leaving is not None
        arrived.append([pending.wait() for pending in leaving])
        self.gradients = tuple(torch.cat(shares, dim=2) for shares in zip(*arrived, strict=True))

    def _gathered(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """k, v [R, B, T_local, heads, K or V] of one part of the heads after the other."""
        coming = self._start(self.parts[0])
        for index, part in enumerate(self.parts):
            k, v = (pending.wait() for pending in coming)
            if index + 1 < len(self.parts):
                coming = self._start(self.parts[index + 1])
            yield part, k, v

    def _start(self, part: slice) -> list[comm.Pending[Tensor]]:
        return [comm.all_gather(x[:, :, part], self.group) for x in (self.k, self.v)]
