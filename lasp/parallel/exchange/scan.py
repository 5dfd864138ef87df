"""The running state walks from unit to unit: ZeCO's All-Scan (arXiv:2507.01004), or in one piece LASP-1's ring
(arXiv:2404.02882). No transition is sent.

A rank takes the state before its unit, applies the unit to it and hands it on. In P blocks this is a pipeline: block b
is at rank r while block b + 1 is at rank r - 1, and W ranks take W + P - 2 steps of 1/P of the state. The blocks are
rows of the state where the transition is diagonal, and columns where it is a matrix, which mixes the rows.

Zigzag: the state walks up over the ranks and back; a rank finishes the way up before it begins the way down. Its step j
sends block j and receives block j + 1. That ends when its own step j - 1 has ended, and when step j + 1 of rank r - 1
and step j - 1 of rank r + 1 have begun: steps before those have ended, for which 2 j + r is smaller. So nobody waits in
a circle, even if no message is buffered and a rank's messages run strictly in their order, as NCCL's do.
"""

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.parallel import comm
from lasp.parallel.combine import Affine
from lasp.parallel.comm import Group
from lasp.parallel.layout import Layout


class Scan:
    """blocks: how many blocks a state of so many bytes travels in (at most one for each row or column)."""

    affine_only = True

    def __init__(self, layout: Layout, group: Group, blocks: Callable[[int], int]):
        self.layout, self.group, self.rank, self.blocks = layout, group, comm.rank(group), blocks

    def forward(
        self, states: Tensor, transitions: Tensor | None, algebra: Affine
    ) -> Pending[tuple[Tensor, Tensor | None]]:
        steps = self.walk(states, transitions, algebra)
        return comm.start(steps, states, transitions).then(lambda arrived: (arrived, transitions))

    def backward(self, d: Tensor, transitions: Tensor | None, algebra: Affine) -> Pending[Tensor]:
        return comm.start(self.walk(d, transitions, algebra), d, transitions)

    def walk(self, states: Tensor, transitions: Tensor | None, algebra: Affine) -> Generator[None, None, Tensor]:
        """What arrives at each local unit when the state walks over all units, upwards or, in backward, downwards; see
        `comm.start`."""
        step, factors = -1 if algebra.backward else 1, algebra.factors_of(transitions, states)
        arrived, sent = torch.empty_like(states), []
        left: list[Tensor] = []  # the blocks as they left the unit before, if this rank has that, too
        for index, unit in list(enumerate(self.layout.owned(self.rank)))[::step]:
            source, target = self._owner(unit - step), self._owner(unit + step)
            factor = None if factors is None else factors[index]
            ways, blocks, places = self._cut(factor, states[index], arrived[index])
            before, left, coming = left, [], None
            remote = None if source == self.rank else source
            if remote is not None:
                coming = comm.send_receive(None, (blocks[0], remote), self.group)
            for b, (way, block, place) in enumerate(zip(ways, blocks, places, strict=True)):
                if coming is not None:
                    yield
                    place.copy_(coming.wait())
                elif source is None:
                    place.zero_()
                else:
                    place.copy_(before[b])
                left.append(algebra.pass_unit(place, block, way, unit))
                leaving = None if target is None or target == self.rank else (left[b], target)
                if remote is not None and b + 1 < len(blocks):
                    following = (blocks[b + 1], remote)
                    coming = comm.send_receive(leaving, following, self.group)
                elif leaving:
                    sent.append(comm.send_receive(leaving, None, self.group))
        for message in sent:
            yield
            message.wait()
        return arrived

    def _cut(self, factor: Tensor | None, *states: Tensor) -> list[tuple]:
        """Blocks of the transition's factor and of each state, as many of all."""
        by_matrix = factor is not None and factor.shape[-1] > 1
        dim = -1 if by_matrix else -2
        count = self.blocks(states[0].numel() * states[0].element_size())
        cut = [state.chunk(count, dim) for state in states]
        if factor is None or by_matrix or factor.shape[-2] == 1:
            return [(factor,) * len(cut[0]), *cut]
        return [factor.chunk(count, -2), *cut]

    def _owner(self, unit: int) -> int | None:
        return self.layout.owner(unit) if 0 <= unit < self.layout.units else None
