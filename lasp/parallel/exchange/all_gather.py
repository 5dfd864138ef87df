"""LASP-2 (arXiv:2502.07563): one all-gather of the states, then every rank combines what precedes its units."""

import torch
from torch import Tensor

from lasp.parallel import comm
from lasp.parallel.combine import entering_states, leaving_gradients
from lasp.parallel.comm import Group, Pending
from lasp.parallel.layout import Layout


class AllGather:
    """States and transitions travel in one message; backward sends D alone, the transitions having been kept."""

    def __init__(self, layout: Layout, group: Group):
        self.layout, self.group = layout, group
        self.owned = list(layout.owned(comm.rank(group)))

    def forward(
        self, states: Tensor, transitions: Tensor | None, breaks: list[bool]
    ) -> Pending[tuple[Tensor, Tensor | None]]:
        shapes = [states.shape[1:]] if transitions is None else [states.shape[1:], transitions.shape[1:]]
        sizes = [shape.numel() for shape in shapes]
        parts = [states] if transitions is None else [states, transitions]
        message = torch.cat([part.flatten(1) for part in parts], dim=1)

        def combine(gathered: Tensor) -> tuple[Tensor, Tensor | None]:
            units = self._in_unit_order(gathered).split(sizes, dim=1)
            all_states, *rest = (u.unflatten(1, shape) for u, shape in zip(units, shapes, strict=True))
            all_transitions = rest[0] if rest else None
            return entering_states(all_states, all_transitions, breaks)[self.owned], all_transitions

        return comm.all_gather(message, self.group).then(combine)

    def backward(self, d: Tensor, transitions: Tensor | None, breaks: list[bool]) -> Pending[Tensor]:
        def combine(gathered: Tensor) -> Tensor:
            return leaving_gradients(self._in_unit_order(gathered), transitions, breaks)[self.owned]

        return comm.all_gather(d, self.group).then(combine)

    def _in_unit_order(self, gathered: Tensor) -> Tensor:
        """[R, units per rank, ...] -> [U, ...]."""
        return gathered.flatten(0, 1)[self.layout.rank_order]
