"""LASP-1 (arXiv:2404.02882): the running state goes from unit to unit. Serial, and simple."""

import torch
from torch import Tensor

from lasp.parallel import comm
from lasp.parallel.combine import pass_unit, pass_unit_back
from lasp.parallel.comm import Group, Pending
from lasp.parallel.layout import Layout


class Ring:
    """Each rank waits for the state before its unit, applies the unit to it and sends it on; no transition is sent."""

    def __init__(self, layout: Layout, group: Group):
        self.layout, self.group, self.rank = layout, group, comm.rank(group)

    def forward(
        self, states: Tensor, transitions: Tensor | None, breaks: list[bool]
    ) -> Pending[tuple[Tensor, Tensor | None]]:
        def relay() -> tuple[Tensor, Tensor | None]:
            return self._relay(states, transitions, breaks, pass_unit, step=1), transitions

        return Pending(relay)

    def backward(self, d: Tensor, transitions: Tensor | None, breaks: list[bool]) -> Pending[Tensor]:
        return Pending(lambda: self._relay(d, transitions, breaks, pass_unit_back, step=-1))

    def _relay(self, states: Tensor, transitions: Tensor | None, breaks: list[bool], through, step: int) -> Tensor:
        """What arrives at each local unit when the state walks over all units, up (step 1) or down (-1)."""
        arriving, running = torch.empty_like(states), torch.zeros_like(states[0])
        sent = []
        for index, unit in list(enumerate(self.layout.owned(self.rank)))[::step]:
            source, target = self._owner(unit - step), self._owner(unit + step)
            if source is None:
                running = torch.zeros_like(states[0])
            elif source != self.rank:
                running = comm.receive(states[0], source, self.group).wait()
            arriving[index] = running
            running = through(running, states[index], None if transitions is None else transitions[index], breaks[unit])
            if target is not None and target != self.rank:
                sent.append(comm.send(running, target, self.group))
        for message in sent:
            message.wait()
        return arriving

    def _owner(self, unit: int) -> int | None:
        return self.layout.owner(unit) if 0 <= unit < self.layout.units else None
