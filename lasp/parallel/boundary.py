"""Sequence parallelism of ops with a state: what lies between the two halves of an op when ranks are many.

A rank's segments are its fragments. The states between units come from an exchange; within a unit only the first
fragment can continue a document and only the last can be continued, so one summary per unit is enough (math §5):

    incoming(fragment) = initial state of its document if it begins one, else what enters the unit
    S of a unit        = S of its last fragment (+ A · initial state, if that fragment begins a document)

and backward is the mirror image, with the final states' gradient in the place of the initial states.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels import checks
from lasp.kernels.lasting import lasting
from lasp.kernels.parked import index_tensor
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Kept
from lasp.kernels.segments import Segments
from lasp.kernels.summary import Summary
from lasp.parallel import comm
from lasp.parallel.combine import Affine, Algebra, Breaks
from lasp.parallel.comm import Group
from lasp.parallel.exchange import StateExchange
from lasp.parallel.layout import PADDING, Partition

MakeAlgebra = Callable[[Breaks, bool], Algebra]  # of one direction: which units let nothing pass, whether backward


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


class Places:
    """Places along a dimension, as an index: a slice where they are evenly spaced, as those of a sequence that is not
    packed are; else a tensor, copied to each device once. So no call copies from the host."""

    def __init__(self, places: list[int]):
        self.count, self._places = len(places), places
        start, step = (places or [0])[0], places[1] - places[0] if len(places) > 1 else 1
        stop = start + step * len(places)
        even = step > 0 and list(range(start, stop, step)) == places
        self._slice = slice(start, stop, step) if even else None
        self._on: dict[torch.device, Tensor] = {}

    def are_all(self, count: int) -> bool:
        """Whether these are the places 0 to count - 1."""
        return self._slice == slice(0, count, 1)

    @lasting
    def on(self, device: torch.device) -> slice | Tensor:
        if self._slice is not None:
            return self._slice
        if device not in self._on:
            self._on[device] = index_tensor(self._places, device)
        return self._on[device]


@dataclass(frozen=True)
class Side:
    """Fragments of one rank as one direction sees them: forward, or (with begin and end exchanged) backward.

    A fragment is closed if its document begins in it (backward: ends in it), else what arrives at its unit enters it.
    """

    algebra: Algebra  # a unit with a closed fragment lets nothing pass
    exit: Places  # the fragment through which each local unit is left
    open_units: Places  # local units that something enters …
    open_fragments: Places  # … and the fragments it enters
    closed: Places  # fragments that start from a document's own state …
    closed_documents: Places
    through_units: Places  # local units left through a closed fragment …
    through_fragments: Places
    through_documents: Places  # … whose document's own state therefore leaves the unit, too
    as_it_arrives: bool  # units are fragments, and nothing reaches those that are closed

    @classmethod
    def of(cls, partition: Partition, algebra: MakeAlgebra, *, backward: bool) -> "Side":
        fragments, edge = partition.local, "ends" if backward else "begins"
        entry, exit = (partition.last, partition.first) if backward else (partition.first, partition.last)
        breaks = tuple(any(getattr(fragment, edge) for fragment in unit) for unit in partition.units)
        is_closed = [getattr(fragment, edge) for fragment in fragments]
        closed = [i for i, f in enumerate(fragments) if is_closed[i] and f.document != PADDING]
        through = [j for j, i in enumerate(exit) if i in closed]
        open_units = [j for j, i in enumerate(entry) if not is_closed[i]]
        outermost = partition.layout.units - 1 if backward else 0
        unreached = [unit == outermost for unit in partition.owned]
        return cls(
            algebra=algebra(breaks, backward),
            exit=Places(exit),
            open_units=Places(open_units),
            open_fragments=Places([entry[j] for j in open_units]),
            closed=Places(closed),
            closed_documents=Places([fragments[i].document for i in closed]),
            through_units=Places(through),
            through_fragments=Places([exit[j] for j in through]),
            through_documents=Places([fragments[exit[j]].document for j in through]),
            as_it_arrives=is_closed == unreached,
        )


class AcrossUnits:
    """A `Boundary` (see lasp.kernels.recurrence) whose segments are the fragments of one rank."""

    wants_summary = True

    def __init__(
        self,
        partition: Partition,
        batch: int,
        group: Group,
        exchange: StateExchange,
        algebra: MakeAlgebra = Affine,
    ):
        self.partition, self.group, self.exchange = partition, group, exchange
        self.forward, self.backward = (Side.of(partition, algebra, backward=back) for back in (False, True))
        affine = isinstance(self.forward.algebra, Affine)
        got = f"{type(exchange).__name__}, which sends affine states alone"
        checks.require(affine or not exchange.affine_only, "state_exchange", got, "'auto' or 'all_gather'")
        self.fragments, self.documents = (batch, len(partition.local)), (batch, partition.documents)

    def enter(self, summary: Summary | None, initial_state: Tensor | None) -> Pending[tuple[Tensor, Kept]]:
        assert summary is not None
        transition = summary.transition
        own = self._of_own_units(self.forward, summary.state, transition, initial_state)
        of_units = None if transition is None else self._of_units(transition, self.forward.exit)
        pending = self.exchange.forward(own, of_units, self.forward.algebra)

        def arrive(exchanged: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Kept]:
            units, kept = exchanged
            return self._of_own_fragments(self.forward, units, initial_state), (transition, kept)

        return pending.then(arrive)

    def enter_grad(self, kept: Kept, d_summary: Tensor | None, d_final: Tensor | None) -> Pending[Tensor]:
        assert d_summary is not None
        own = self._of_own_units(self.backward, d_summary, kept[0], d_final)
        pending = self.exchange.backward(own, kept[1], self.backward.algebra)
        return pending.then(lambda units: self._of_own_fragments(self.backward, units, d_final))

    def leave(self, outgoing: Tensor) -> Tensor:
        return self._of_documents(self.backward, outgoing)

    def leave_grad(self, d_incoming: Tensor) -> Tensor:
        return self._of_documents(self.forward, d_incoming)

    def _of_own_units(self, side: Side, states: Tensor, transition: Tensor | None, documents: Tensor | None) -> Tensor:
        """[units of this rank, B, H, K, V]: the summary (backward: D) of every unit, out of those of fragments."""
        own = self._of_units(states, side.exit)
        if documents is not None and side.through_units.count:
            a = None if transition is None else self._of_units(transition, side.through_fragments)
            start = self._at(documents, self.documents, side.through_documents).transpose(0, 1)
            own, units = own.clone(), side.through_units.on(own.device)
            own[units] = side.algebra.extend(own[units], a, start)
        return own

    def _of_own_fragments(self, side: Side, units: Tensor, documents: Tensor | None) -> Tensor:
        """[N, H, K, V]: what enters every fragment, given what enters every unit."""
        device = units.device
        if side.as_it_arrives:
            states = units.transpose(0, 1)
        else:
            states = units.new_zeros(*self.fragments, *units.shape[2:])
            states[:, side.open_fragments.on(device)] = units[side.open_units.on(device)].transpose(0, 1)
        if documents is not None and side.closed.count:
            states[:, side.closed.on(device)] = self._at(documents, self.documents, side.closed_documents)
        return states.flatten(0, 1)

    def _of_units(self, x: Tensor, fragments: Places) -> Tensor:
        """[N, ...] -> [len(fragments), B, ...]."""
        return self._at(x, self.fragments, fragments).transpose(0, 1).contiguous()

    @staticmethod
    def _at(x: Tensor, rows: tuple[int, int], places: Places) -> Tensor:
        """[N, ...] -> [B, len(places), ...], N being B rows of fragments or documents."""
        x = x.view(*rows, *x.shape[1:])
        return x if places.are_all(rows[1]) else x[:, places.on(x.device)]

    def _of_documents(self, side: Side, states: Tensor) -> Tensor:
        """[N, ...] -> [documents, ...] on every rank: that of the document's closed fragment, which one rank has."""
        result = states.new_zeros(*self.documents, *states.shape[1:])
        result[:, side.closed_documents.on(states.device)] = self._at(states, self.fragments, side.closed)
        return comm.all_reduce(result.flatten(0, 1), self.group).wait()


class AcrossDocuments(AcrossUnits):
    """causal=False: every fragment reads the sum over its whole document, so that what enters it is all the rest.

    Only documents that lie in several units are summed over ranks, with one all-reduce. They are added unit by unit,
    each having at most one fragment of a document, so that the order of the sum is fixed.
    """

    def __init__(self, partition: Partition, batch: int, group: Group, exchange: StateExchange):
        super().__init__(partition, batch, group, exchange)
        edges, length, local = partition.offsets, partition.unit_length, partition.local
        spanning = [d for d in range(partition.documents) if edges[d] // length != (edges[d + 1] - 1) // length]
        place = {document: i for i, document in enumerate(spanning)}
        real = [i for i, fragment in enumerate(local) if fragment.document != PADDING]
        self.spanning, self.shared = len(spanning), []
        for first, last in zip(partition.first, partition.last, strict=True):
            shared = [i for i in range(first, last + 1) if local[i].document in place]
            self.shared.append((Places(shared), Places([place[local[i].document] for i in shared])))
        self.real, self.of_real = Places(real), Places([local[i].document for i in real])

    def enter(self, summary: Summary | None, initial_state: Tensor | None) -> Pending[tuple[Tensor, Kept]]:
        assert summary is not None
        return self._others(summary.state, initial_state).then(lambda incoming: (incoming, ()))

    def enter_grad(self, kept: Kept, d_summary: Tensor | None, d_final: Tensor | None) -> Pending[Tensor]:
        assert d_summary is not None
        return self._others(d_summary, d_final)

    def _others(self, states: Tensor, documents: Tensor | None) -> Pending[Tensor]:
        """The sum of the other fragments' states of the same document, and of the document's own."""
        states, device = states.unflatten(0, self.fragments), states.device
        sums = states.new_zeros(states.shape[0], self.spanning, *states.shape[2:])
        for shared, place in self.shared:
            sums[:, place.on(device)] += states[:, shared.on(device)]

        def arrive(total: Tensor) -> Tensor:
            others = torch.zeros_like(states)
            for shared, place in self.shared:
                here = shared.on(device)
                others[:, here] = total[:, place.on(device)] - states[:, here]
            if documents is not None:
                others[:, self.real.on(device)] += self._at(documents, self.documents, self.of_real)
            return others.flatten(0, 1)

        return comm.all_reduce(sums, self.group).then(arrive)
