"""Sequence-parallel linear attention and delta rule: what lies between the two halves of an op when ranks are many.

A rank's segments are its fragments. The states between units come from an exchange; within a unit only the first
fragment can continue a document and only the last can be continued, so one summary per unit is enough (math §5):

    incoming(fragment) = initial state of its document if it begins one, else what enters the unit
    S of a unit        = S of its last fragment (+ A · initial state, if that fragment begins a document)

and backward is the mirror image, with the final states' gradient in the place of the initial states.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lasp.kernels.recurrence import Kept
from lasp.kernels.segments import Segments
from lasp.kernels.summary import Summary, apply, apply_transposed
from lasp.parallel import comm
from lasp.parallel.comm import Group, Pending
from lasp.parallel.exchange import StateExchange
from lasp.parallel.layout import PADDING, Partition


class LocalSegments:
    """This rank's tokens as the kernels see them: B rows of fragments, cut out of `[B, T_local, ...]`."""

    def __init__(self, partition: Partition, batch: int):
        fragments, length = partition.local, partition.unit_length
        self.batch, self.tokens, self.units = batch, partition.local_tokens, len(partition.owned)
        self.whole_units = len(fragments) == self.units
        if self.whole_units:
            self.segments = Segments(batch * self.units, length)
        else:
            lengths = torch.tensor([0] + [len(fragment) for fragment in fragments] * batch, device="cpu")
            self.segments = Segments(1, batch * self.tokens, lengths.cumsum(0))

    def fold(self, x: Tensor) -> Tensor:
        """[B, T_local, ...] as the batch or the packed row that the segments describe; a view if x is contiguous."""
        return x.reshape(self.segments.batch, self.segments.tokens, *x.shape[2:])

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of `fold`."""
        return x.reshape(self.batch, self.tokens, *x.shape[2:])


@dataclass(frozen=True)
class Side:
    """Fragments of one rank as one direction sees them: forward, or (with begin and end exchanged) backward.

    A fragment is closed if its document begins in it (backward: ends in it), else what arrives at its unit enters it.
    """

    breaks: list[bool]  # for every unit of the sequence: it has a closed fragment, so that nothing passes through it
    exit: list[int]  # the fragment through which each local unit is left
    open_units: list[int]  # local units that something enters …
    open_fragments: list[int]  # … and the fragments it enters
    closed: list[int]  # fragments that start from a document's own state …
    closed_documents: list[int]
    through_units: list[int]  # local units left through a closed fragment …
    through_documents: list[int]  # … whose document's own state therefore leaves the unit, too

    @classmethod
    def of(cls, partition: Partition, entry: list[int], exit: list[int], edge: Literal["begins", "ends"]) -> "Side":
        fragments = partition.local
        is_closed = [getattr(fragment, edge) for fragment in fragments]
        closed = [i for i, f in enumerate(fragments) if is_closed[i] and f.document != PADDING]
        through = [j for j, i in enumerate(exit) if i in closed]
        open_units = [j for j, i in enumerate(entry) if not is_closed[i]]
        return cls(
            breaks=[any(getattr(fragment, edge) for fragment in unit) for unit in partition.units],
            exit=exit,
            open_units=open_units,
            open_fragments=[entry[j] for j in open_units],
            closed=closed,
            closed_documents=[fragments[i].document for i in closed],
            through_units=through,
            through_documents=[fragments[exit[j]].document for j in through],
        )


class AcrossUnits:
    """A `Boundary` (see lasp.kernels.recurrence) whose segments are the fragments of one rank."""

    wants_summary = True

    def __init__(self, partition: Partition, batch: int, group: Group, exchange: StateExchange):
        self.partition, self.group, self.exchange = partition, group, exchange
        self.forward = Side.of(partition, partition.first, partition.last, "begins")
        self.backward = Side.of(partition, partition.last, partition.first, "ends")
        self.fragments, self.documents = (batch, len(partition.local)), (batch, partition.documents)

    def enter(self, summary: Summary | None, initial_state: Tensor | None) -> Pending[tuple[Tensor, Kept]]:
        assert summary is not None
        transition = summary.transition
        own = self._leaving(self.forward, summary.state, transition, initial_state, apply)
        of_units = None if transition is None else self._of_units(transition, self.forward.exit)
        pending = self.exchange.forward(own, of_units, self.forward.breaks)

        def arrive(exchanged: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Kept]:
            units, kept = exchanged
            return self._entering(self.forward, units, initial_state), (transition, kept)

        return pending.then(arrive)

    def enter_grad(self, kept: Kept, d_summary: Tensor | None, d_final: Tensor | None) -> Pending[Tensor]:
        assert d_summary is not None
        own = self._leaving(self.backward, d_summary, kept[0], d_final, apply_transposed)
        pending = self.exchange.backward(own, kept[1], self.backward.breaks)
        return pending.then(lambda units: self._entering(self.backward, units, d_final))

    def leave(self, outgoing: Tensor, initial_state: Tensor | None) -> Tensor:
        return self._of_documents(self.backward, outgoing)

    def leave_grad(self, d_incoming: Tensor, d_final: Tensor | None) -> Tensor:
        return self._of_documents(self.forward, d_incoming)

    def _leaving(
        self, side: Side, states: Tensor, transition: Tensor | None, documents: Tensor | None, through
    ) -> Tensor:
        """[units of this rank, B, H, K, V]: what every unit contributes to those beyond it."""
        own = self._of_units(states, side.exit)
        if documents is not None and side.through_units:
            fragments = [side.exit[j] for j in side.through_units]
            a = None if transition is None else self._of_units(transition, fragments)
            start = documents.unflatten(0, self.documents)[:, side.through_documents].transpose(0, 1)
            own[side.through_units] += through(a, start)
        return own

    def _entering(self, side: Side, units: Tensor, documents: Tensor | None) -> Tensor:
        """[N, H, K, V]: what enters every fragment, given what enters every unit."""
        states = units.new_zeros(*self.fragments, *units.shape[2:])
        states[:, side.open_fragments] = units[side.open_units].transpose(0, 1)
        if documents is not None:
            states[:, side.closed] = documents.unflatten(0, self.documents)[:, side.closed_documents]
        return states.flatten(0, 1)

    def _of_units(self, x: Tensor, fragments: list[int]) -> Tensor:
        """[N, ...] -> [len(fragments), B, ...]."""
        return x.unflatten(0, self.fragments)[:, fragments].transpose(0, 1).contiguous()

    def _of_documents(self, side: Side, states: Tensor) -> Tensor:
        """[N, ...] -> [documents, ...] on every rank: that of the document's closed fragment, which one rank has."""
        result = states.new_zeros(*self.documents, *states.shape[1:])
        result[:, side.closed_documents] = states.unflatten(0, self.fragments)[:, side.closed]
        return comm.all_reduce(result.flatten(0, 1), self.group).wait()


class AcrossDocuments(AcrossUnits):
    """causal=False: every fragment reads the sum over its whole document, so that what enters it is all the rest.

    Only documents that lie in several units are summed over ranks, with one all-reduce.
    """

    def enter(self, summary: Summary | None, initial_state: Tensor | None) -> Pending[tuple[Tensor, Kept]]:
        assert summary is not None
        return self._others(summary.state, initial_state).then(lambda incoming: (incoming, ()))

    def enter_grad(self, kept: Kept, d_summary: Tensor | None, d_final: Tensor | None) -> Pending[Tensor]:
        assert d_summary is not None
        return self._others(d_summary, d_final)

    def _others(self, states: Tensor, documents: Tensor | None) -> Pending[Tensor]:
        """The sum of the other fragments' states of the same document, and of the document's own."""
        states = states.unflatten(0, self.fragments)
        local, length = self.partition.local, self.partition.unit_length
        edges = self.partition.offsets
        spanning = [d for d in range(self.partition.documents) if edges[d] // length != (edges[d + 1] - 1) // length]
        place = {document: i for i, document in enumerate(spanning)}
        shared = [i for i, fragment in enumerate(local) if fragment.document in place]
        where = torch.tensor([place[local[i].document] for i in shared], dtype=torch.long, device=states.device)
        sums = states.new_zeros(states.shape[0], len(spanning), *states.shape[2:]).index_add(
            1, where, states[:, shared]
        )

        def arrive(total: Tensor) -> Tensor:
            others = torch.zeros_like(states)
            others[:, shared] = total[:, where] - states[:, shared]
            if documents is not None:
                real = [i for i, fragment in enumerate(local) if fragment.document != PADDING]
                others[:, real] += documents.unflatten(0, self.documents)[:, [local[i].document for i in real]]
            return others.flatten(0, 1)

        return comm.all_reduce(sums, self.group).then(arrive)
