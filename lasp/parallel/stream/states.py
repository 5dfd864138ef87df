"""States between the segments of a stream: a `Boundary` of a segment has one state for each row, not for each document.

Only the first document of a segment can have a past, and only the last one a future. So the initial state is the first
one's and the final state the last one's, [B, H, K, V] each; all documents between begin at zero and leave nothing.
"""

from dataclasses import replace
from typing import Literal

from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Kept
from lasp.kernels.summary import Summary
from lasp.parallel.boundary import AcrossUnits, Places, Side
from lasp.parallel.comm import Group
from lasp.parallel.exchange import StateExchange
from lasp.parallel.layout import Partition


class CarriedAcrossUnits(AcrossUnits):
    """Between the units of many ranks: the stream's state is that before the segment's first unit."""

    def __init__(self, partition: Partition, batch: int, group: Group, exchange: StateExchange):
        super().__init__(partition, batch, group, exchange)
        last = partition.documents - 1
        self.forward = _carrying(self.forward, partition, partition.last, 0, "begins")
        self.backward = _carrying(self.backward, partition, partition.first, last, "ends")
        self.documents = (batch, 1)


def _carrying(
    side: Side, partition: Partition, exit: list[int], document: int, edge: Literal["begins", "ends"]
) -> Side:
    """The side, were this document the only one with a state of its own."""
    closed = [i for i, f in enumerate(partition.local) if f.document == document and getattr(f, edge)]
    through = [j for j, i in enumerate(exit) if i in closed]
    return replace(
        side,
        closed=Places(closed),
        closed_documents=Places([0] * len(closed)),
        through_units=Places(through),
        through_fragments=Places([exit[j] for j in through]),
        through_documents=Places([0] * len(through)),
    )


class CarriedAlone:
    """One rank and one unit, whose segments are the documents of a packed batch."""

    wants_summary = False

    def __init__(self, partition: Partition):
        self.documents = partition.documents

    def enter(self, summary: Summary | None, initial_state: Tensor | None) -> Pending[tuple[Tensor | None, Kept]]:
        incoming = self._of_one(initial_state, 0)
        return Pending(lambda: (incoming, ()))

    def leave(self, outgoing: Tensor) -> Tensor:
        return outgoing[-1:].clone()  # a view would keep all documents' states alive

    def enter_grad(self, kept: Kept, d_summary: Tensor | None, d_final: Tensor | None) -> Pending[Tensor | None]:
        d_outgoing = self._of_one(d_final, self.documents - 1)
        return Pending(lambda: d_outgoing)

    def leave_grad(self, d_incoming: Tensor) -> Tensor:
        return d_incoming[:1].clone()

    def _of_one(self, state: Tensor | None, document: int) -> Tensor | None:
        """[documents, H, K, V], zero but for this document's."""
        if state is None or self.documents == 1:
            return state
        states = state.new_zeros(self.documents, *state.shape[1:])
        states[document] = state[0]
        return states
