"""The algebra of log-linear attention's slots between units (math §4). Pure, no communication.

    X -> A route(X) + S        D -> routeᵀ(Aᵀ G) + D        of a unit: see lasp.kernels.fenwick

Positions alone say which slots are there and where they go, and these are known on the host. So only what can differ
from zero is sent: forward the slots of a unit's own tokens, one where its length is a power of two that divides its
position; backward, where A is a matrix, those of the tokens before it (where it is a scalar: lasp.parallel.spread).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lasp.kernels.fenwick import moved, moved_back, routes_on
from lasp.kernels.summary import apply, apply_transposed
from lasp.parallel.layout import PADDING, Fragment, Partition

Slots = dict[int, Tensor]  # those that are not zero, each [B, H, K, V]
Place = tuple[int, int]  # a unit and one of its slots


@dataclass(frozen=True)
class Fenwick:
    """One direction of one sequence.

    before, after: where in its document the fragment begins and ends through which each unit is left (forward its last,
    backward its first); 0 for padding. breaks: whether nothing passes through, since a document starts (backward: ends)
    in the unit. open: whether something enters it. owned: every rank's units.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    breaks: tuple[bool, ...]
    open: tuple[bool, ...]
    owned: tuple[tuple[int, ...], ...]
    backward: bool

    @classmethod
    def of(cls, partition: Partition, seen: Sequence[int], *, backward: bool) -> "Fenwick":
        """seen: what every document has had before this sequence."""

        def positions(fragment: Fragment) -> tuple[int, int]:
            before = position(partition, seen, fragment)
            return before, before + (0 if fragment.document == PADDING else len(fragment))

        edge, entry, exit = ("ends", -1, 0) if backward else ("begins", 0, -1)
        before, after = zip(*(positions(unit[exit]) for unit in partition.units), strict=True)
        return cls(
            before=before,
            after=after,
            breaks=tuple(any(getattr(fragment, edge) for fragment in unit) for unit in partition.units),
            open=tuple(not getattr(unit[entry], edge) for unit in partition.units),
            owned=tuple(partition.layout.owned(rank) for rank in range(partition.layout.ranks)),
            backward=backward,
        )

    def sent(self, unit: int) -> list[int]:
        """The slots of a unit's S (backward: of its D); of all that its document has had, if this starts in it."""
        p, e = self.before[unit], self.after[unit]
        if self.backward:
            return bits(p)
        if self.breaks[unit]:
            return bits(e)
        return [j for j in bits(e) if start(e, j) + (1 << j) > p]

    @cached_property
    def places(self) -> list[list[Place]]:
        """What lies in every rank's message."""
        return [[(unit, j) for unit in units for j in self.sent(unit)] for units in self.owned]

    @cached_property
    def size(self) -> int:
        """Of the messages, which are equally long."""
        return max(map(len, self.places))

    def pack(self, states: Sequence[Tensor], rank: int) -> Tensor:
        """[size, B, H, K, V], given [B, J, H, K, V] of each of the rank's units."""
        like = states[0]
        packed = like.new_zeros(self.size, like.shape[0], *like.shape[2:])
        for row, (unit, j) in zip(packed, self.places[rank], strict=False):
            row.copy_(states[self.owned[rank].index(unit)][:, j])
        return packed

    def unpacked(self, message: Tensor, rank: int) -> list[Slots]:
        """The inverse: of each of the rank's units what a message holds."""
        slots: dict[int, Slots] = {unit: {} for unit in self.owned[rank]}
        for state, (unit, j) in zip(message, self.places[rank], strict=False):
            slots[unit][j] = state
        return list(slots.values())

    def combine(self, messages: Tensor, factors: Tensor, units: Sequence[int]) -> list[Slots]:
        """What enters (backward: the gradient of what leaves) each of some units, out of what all ranks have packed
        [R, size, ...] and all units' transitions [U, B, H] or [U, B, H, K, K]."""
        sent: dict[int, Slots] = {}
        for rank, message in enumerate(messages):
            sent |= zip(self.owned[rank], self.unpacked(message, rank), strict=True)
        slots: Slots = {}
        found: dict[int, Slots] = {}
        for unit in range(len(factors))[:: -1 if self.backward else 1]:
            if unit in units:
                found[unit] = slots
            slots = self._passed(slots, factors[unit], unit)
            for j, state in sent[unit].items():
                slots[j] = slots[j] + state if j in slots else state
        return [found[unit] for unit in units]

    def extend(self, state: Tensor, transition: Tensor, start: Tensor, unit: int) -> Tensor:
        """[B, J, H, K, V]: what leaves a unit's fragment (backward: the gradient of what enters it) where `start`
        enters instead of nothing, its own contribution being `state`."""
        edges = (self.before[unit],), (self.after[unit],)
        route = routes_on(*edges, state.shape[1], state.dtype, state.device).expand(len(state), -1, -1)
        if self.backward:
            return state + moved_back(apply_transposed(transition, start), route)
        return state + apply(transition, moved(start, route))

    def _passed(self, slots: Slots, factor: Tensor, unit: int) -> Slots:
        """A route(X), or routeᵀ(Aᵀ G)."""
        if self.breaks[unit]:
            return {}
        p, e, through = self.before[unit], self.after[unit], apply_transposed if self.backward else apply
        passed: Slots = {}
        for i in bits(p):
            j = slot_of(e, start(p, i))
            source, target = (j, i) if self.backward else (i, j)
            if source in slots:
                x = through(factor, slots[source])
                passed[target] = passed[target] + x if target in passed else x
        return passed


def position(partition: Partition, seen: Sequence[int], fragment: Fragment) -> int:
    """Where a fragment begins in its document, which has had so many tokens before the sequence; 0 for padding."""
    if fragment.document == PADDING:
        return 0
    return fragment.position + seen[fragment.document] - (0 if fragment.document else partition.past)


def bits(n: int) -> list[int]:
    return [j for j in range(n.bit_length()) if n >> j & 1]


def start(n: int, slot: int) -> int:
    """The first position that a slot of n tokens holds."""
    return n >> slot + 1 << slot + 1


def slot_of(n: int, position: int) -> int:
    """Of n tokens, the one that holds a position."""
    return (n ^ position).bit_length() - 1
