"""How units' states reach the ranks that need them. Every exchange has one signature, `StateExchange`."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.parallel.comm import Group
from lasp.parallel.exchange.all_gather import AllGather
from lasp.parallel.exchange.scan import Scan
from lasp.parallel.layout import Layout


class StateExchange(Protocol):
    """Moves states between the units of a layout.

    states, d: [units of this rank, B, H, K, V]; transitions likewise, or None (see `lasp.kernels.summary`);
    breaks: for every unit of the sequence, whether it lets nothing pass in that direction.
    """

    def forward(
        self, states: Tensor, transitions: Tensor | None, breaks: list[bool]
    ) -> Pending[tuple[Tensor, Tensor | None]]:
        """The states that enter this rank's units, and the transitions that `backward` will need."""

    def backward(self, d: Tensor, transitions: Tensor | None, breaks: list[bool]) -> Pending[Tensor]:
        """The gradients of the states that leave this rank's units."""


EXCHANGES: dict[str, Callable[[Layout, Group], StateExchange]] = {
    "all_gather": AllGather,
    "ring": lambda layout, group: Scan(layout, group, blocks=lambda size: 1),
    "scan": lambda layout, group: Scan(layout, group, blocks=lambda size: 3),
}


def make_exchange(name: str, layout: Layout, group: Group) -> StateExchange:
    if name == "auto":
        name = "all_gather"
    if name not in EXCHANGES:
        raise ValueError(f"state_exchange: got {name!r}, expected 'auto' or one of {', '.join(EXCHANGES)}")
    return EXCHANGES[name](layout, group)
