"""LASP-2 (arXiv:2502.07563): one all-gather of the states, then every rank combines what precedes its units."""

import torch
from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.parallel import comm
from lasp.parallel.combine import Breaks, combine
from lasp.parallel.comm import Group
from lasp.parallel.layout import Layout


class AllGather:
    """States and transitions travel in one message; backward sends D alone, the transitions having been kept."""

    def __init__(self, layout: Layout, group: Group):
        self.layout, self.group = layout, group
        self.owned = list(layout.owned(comm.rank(group)))

    def forward(
        self, states: Tensor, transitions: Tensor | None, breaks: Breaks
    ) -> Pending[tuple[Tensor, Tensor | None]]:
        shapes = [states.shape[1:]] if transitions is None else [states.shape[1:], transitions.shape[1:]]
        sizes = [shape.numel() for shape in shapes]
        parts = [states] if transitions is None else [states, transitions]
        message = torch.cat([part.flatten(1) for part in parts], dim=1)

        def arrive(gathered: Tensor) -> tuple[Tensor, Tensor | None]:
            parts = [
                self._in_unit_order(part.unflatten(2, shape))
                for part, shape in zip(gathered.split(sizes, dim=2), shapes, strict=True)
            ]
            all_transitions = parts[1].contiguous() if transitions is not None else None
            return combine(parts[0], all_transitions, breaks, self.owned, backward=False), all_transitions

        return comm.all_gather(message, self.group).then(arrive)

    def backward(self, d: Tensor, transitions: Tensor | None, breaks: Breaks) -> Pending[Tensor]:
        def arrive(gathered: Tensor) -> Tensor:
            in_order = self._in_unit_order(gathered)
            return combine(in_order, transitions, breaks, self.owned, backward=True)

        return comm.all_gather(d, self.group).then(arrive)

    def _in_unit_order(self, gathered: Tensor) -> Tensor:
        """[R, units per rank, ...] -> [U, ...]."""
        if self.layout.units_per_rank == 1:
            return gathered[:, 0]
        return torch.cat([gathered[:, 0], gathered[:, 1].flip(0)])
