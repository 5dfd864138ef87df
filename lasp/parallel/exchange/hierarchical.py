"""For many nodes: inside each an all-gather, across nodes a scan.

The units that a node's ranks hold are runs of neighbours (zigzag: two), and each run sums itself up as one unit would.
So nodes are to runs what ranks are to units: the layout is the same one level up, and what enters a run comes from a
scan among the ranks that have the same place in their nodes. Each of them carries its share of the state's columns, so
that a node's network cards work together. What enters a rank's units then follows from what enters their run.
"""

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.kernels.summary import compose
from lasp.parallel import comm
from lasp.parallel.combine import Affine
from lasp.parallel.comm import Group
from lasp.parallel.exchange.scan import Scan
from lasp.parallel.layout import Layout


class Hierarchical:
    """node: how many consecutive ranks share a machine, of which all have as many. blocks: as of `Scan`, across nodes.

    Collective: it makes groups of its own. Backward sends gradients alone, the node's transitions having been kept.
    """

    affine_only = True

    def __init__(self, layout: Layout, group: Group, node: int, blocks: Callable[[int], int]):
        self.layout, self.node, self.rank = layout, node, comm.rank(group)
        self.neighbours, peers = comm.split(group, node)
        runs = Layout(layout.name, layout.ranks // node)
        self.scan = Scan(runs, peers, blocks)
        self.inside = Layout(layout.name, node).rank_order  # of the node's units, the runs one after the other
        self.runs = runs.owned(self.rank // node)

    def forward(
        self, states: Tensor, transitions: Tensor | None, algebra: Affine
    ) -> Pending[tuple[Tensor, Tensor | None]]:
        kept: list[Tensor | None] = []

        def steps() -> Generator[None, None, Tensor]:
            gathered, *rest = yield from self._gather(*(x for x in (states, transitions) if x is not None))
            kept.append(rest[0] if rest else None)
            return (yield from self._walk(gathered, kept[0], algebra))

        return comm.start(steps(), states, transitions).then(lambda arrived: (arrived, kept[0]))

    def backward(self, d: Tensor, transitions: Tensor | None, algebra: Affine) -> Pending[Tensor]:
        def steps() -> Generator[None, None, Tensor]:
            (gathered,) = yield from self._gather(d)
            return (yield from self._walk(gathered, transitions, algebra))

        return comm.start(steps(), d, transitions)

    def _gather(self, *xs: Tensor) -> Generator[None, None, list[Tensor]]:
        """[units of a rank, ...] -> [units of the node, ...], run by run; all under way at the same time."""
        coming = [comm.all_gather(x, self.neighbours) for x in xs]
        yield
        return [pending.wait().flatten(0, 1)[self.inside] for pending in coming]

    def _walk(self, gathered: Tensor, transitions: Tensor | None, algebra: Affine) -> Generator[None, None, Tensor]:
        """What arrives at each local unit, given what the node's sum up to, run by run."""
        factors = algebra.factors_of(transitions, gathered)
        of_runs = None
        if transitions is not None:
            runs = zip(transitions.split(self.node), gathered.split(self.node), strict=True)
            of_runs = torch.stack([compose(a, s) for a, s in runs])

        def passed(run: int, x: Tensor | None, until: int | None = None) -> Tensor:
            """x, or nothing, behind the units of a local run, up to (backward: down to) but not through `until`."""
            units = self._units(self.runs[run])
            for unit in units[::-1] if algebra.backward else units:
                if unit == until:
                    break
                row = run * self.node + unit - units.start
                factor = None if factors is None else factors[row]
                state = gathered[row]
                x = state if x is None else algebra.pass_unit(x, state, factor, unit)
            assert x is not None
            return x

        summaries = torch.stack([passed(run, None) for run in range(len(self.runs))])
        closed = tuple(any(algebra.breaks[unit] for unit in self._units(run)) for run in range(self.scan.layout.units))
        entering = yield from self._across(summaries, of_runs, Affine(closed, algebra.backward))
        owned = self.layout.owned(self.rank)
        return torch.stack([passed(run, x, unit) for run, (x, unit) in enumerate(zip(entering, owned, strict=True))])

    def _units(self, run: int) -> range:
        return range(run * self.node, (run + 1) * self.node)

    def _across(self, summaries: Tensor, transitions: Tensor | None, algebra: Affine) -> Generator[None, None, Tensor]:
        """What enters each run: every rank of the node scans its share of the columns, if they can be shared evenly."""
        columns = summaries.shape[-1]
        if columns % self.node:
            return (yield from self.scan.walk(summaries, transitions, algebra))
        share = columns // self.node
        mine = summaries[..., self.rank % self.node * share :][..., :share].contiguous()
        arrived = yield from self.scan.walk(mine, transitions, algebra)
        coming = comm.all_gather(arrived, self.neighbours)
        yield
        return torch.cat(coming.wait().unbind(), dim=-1)
