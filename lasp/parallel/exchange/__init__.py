"""How units' states reach the ranks that need them. Every exchange has one signature, `StateExchange`."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.names import ExchangeName
from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.cost import Link, Message, blocks, candidates
from lasp.parallel.exchange.all_gather import AllGather
from lasp.parallel.exchange.auto import Auto
from lasp.parallel.exchange.hierarchical import Hierarchical
from lasp.parallel.exchange.scan import Scan
from lasp.parallel.exchange.symmetric_memory import SymmetricMemory, symmetric_memory
from lasp.parallel.layout import Layout
from lasp.parallel.topology import topology


class StateExchange(Protocol):
    """Moves states between the units of a layout.

    states, d: [units of this rank, B, H, K, V]; transitions likewise, or None (see `lasp.kernels.summary`);
    algebra: the `Algebra` of the states, in that direction. What arrives is the caller's to change.
    affine_only: whether it must be `Affine`.
    """

    affine_only: bool

    def forward(
        self, states: Tensor, transitions: Tensor | None, algebra: Any
    ) -> Pending[tuple[Tensor, Tensor | None]]:
        """The states that enter this rank's units, and the transitions that `backward` will need."""

    def backward(self, d: Tensor, transitions: Tensor | None, algebra: Any) -> Pending[Tensor]:
        """The gradients of the states that leave this rank's units."""


def _ring(layout: Layout, group: Group) -> StateExchange:
    return Scan(layout, group, blocks=lambda size: 1)


def _scan(layout: Layout, group: Group) -> StateExchange:
    costs, node = topology(group)
    return Scan(layout, group, _blocks(costs.links(layout.ranks, node).message, layout.ranks, layout.units_per_rank))


def _hierarchical(layout: Layout, group: Group) -> StateExchange:
    costs, node = topology(group)
    across = _blocks(costs.across.message, layout.ranks // node, layout.units_per_rank)
    return Hierarchical(layout, group, node, across)


def _blocks(link: Link, ranks: int, ways: int) -> Callable[[int], int]:
    return lambda size: blocks(link, Message(size * ways, ways=ways), ranks)


def _auto(layout: Layout, group: Group) -> StateExchange:
    """On GPUs whichever of the candidates costs least; on CPUs the all-gather."""
    if comm.message_device(group).type == "cpu":
        return AllGather(layout, group)
    costs, node = topology(group)
    names = candidates(costs, layout.ranks, node)
    exchanges: dict[str, StateExchange] = {name: EXCHANGES[name](layout, group) for name in names}
    if not isinstance(exchanges.get("symmetric_memory"), SymmetricMemory):
        exchanges.pop("symmetric_memory", None)
    return Auto(exchanges, costs, layout.ranks, node)


EXCHANGES: dict[ExchangeName, Callable[[Layout, Group], StateExchange]] = {
    "auto": _auto,
    "all_gather": AllGather,
    "ring": _ring,
    "scan": _scan,
    "hierarchical": _hierarchical,
    "symmetric_memory": symmetric_memory,
}


def make_exchange(name: ExchangeName, layout: Layout, group: Group) -> StateExchange:
    """Of EXCHANGES. Collective: every rank of the group makes the same exchange at the same time."""
    return EXCHANGES[name](layout, group)
