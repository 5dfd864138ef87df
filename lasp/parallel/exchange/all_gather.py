"""LASP-2 (arXiv:2502.07563): one all-gather of the states, then every rank combines what precedes its units."""

import torch
from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.parallel import comm
from lasp.parallel.combine import Algebra
from lasp.parallel.comm import Group
from lasp.parallel.layout import Layout


class AllGather:
    """States and transitions travel in one message; backward sends D alone, all units' factors having been kept."""

    affine_only = False

    def __init__(self, layout: Layout, group: Group):
        self.layout, self.group = layout, group
        self.owned = layout.owned(comm.rank(group))

    def forward(
        self, states: Tensor, transitions: Tensor | None, algebra: Algebra
    ) -> Pending[tuple[Tensor, Tensor | None]]:
        def arrive(gathered: Tensor) -> tuple[Tensor, Tensor | None]:
            rows, factors = gathered.flatten(0, 1), None
            if transitions is not None:
                of_states, of_transitions = rows.split([states[0].numel(), transitions[0].numel()], dim=1)
                rows = of_states.unflatten(1, states.shape[1:])
                factors = algebra.factors_of(of_transitions.unflatten(1, transitions.shape[1:]), rows)
            return self._combine(rows, factors, algebra), factors

        message = states if transitions is None else torch.cat([states.flatten(1), transitions.flatten(1)], dim=1)
        return comm.all_gather(message, self.group).then(arrive)

    def backward(self, d: Tensor, factors: Tensor | None, algebra: Algebra) -> Pending[Tensor]:
        gathered = comm.all_gather(d, self.group)
        return gathered.then(lambda d: self._combine(d.flatten(0, 1), factors, algebra))

    def _combine(self, states: Tensor, factors: Tensor | None, algebra: Algebra) -> Tensor:
        of_units = None if factors is None else self._by_unit(factors)
        return algebra.combine(self._by_unit(states), of_units, self.owned)

    def _by_unit(self, x: Tensor) -> list[Tensor]:
        """The rows of x, which are in the order of ranks."""
        rows = x.unbind()
        return [rows[place] for place in self.layout.rank_order]
