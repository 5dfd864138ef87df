"""The algebra of log-linear attention's slots between units (math §4). Pure, no communication.

    X -> A route(X) + S        D -> routeᵀ(Aᵀ G) + D        of a unit: see lasp.kernels.fenwick

Positions alone say which slots are there and where they go, and these are known on the host. So only what can differ
from zero is sent: forward the slots of a unit's own tokens, one where its length is a power of two that divides its
position; backward those of the tokens before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lasp.kernels.fenwick import moved, moved_back, routes
from lasp.kernels.parked import index_tensor
from lasp.kernels.summary import apply, apply_transposed
from lasp.parallel.layout import PADDING, Fragment, Partition

Slots = dict[int, Tensor]  # those that are not zero, each [B, H, K, V]


@dataclass(frozen=True)
class Fenwick:
    """One direction of one sequence.

    before, after: where in its document the fragment begins and ends through which each unit is left (forward its last,
    backward its first); 0 for padding. breaks: whether nothing passes through, since a document starts (backward: ends)
    in the unit.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    breaks: tuple[bool, ...]
    backward: bool

    @classmethod
    def of(cls, partition: Partition, seen: Sequence[int], *, backward: bool) -> "Fenwick":
        """seen: what every document has had before this sequence."""

        def positions(fragment: Fragment) -> tuple[int, int]:
            before = position(partition, seen, fragment)
            return before, before + (0 if fragment.document == PADDING else len(fragment))

        before, after = zip(*(positions(unit[0 if backward else -1]) for unit in partition.units), strict=True)
        edge = "ends" if backward else "begins"
        return cls(
            before=before,
            after=after,
            breaks=tuple(any(getattr(fragment, edge) for fragment in unit) for unit in partition.units),
            backward=backward,
        )

    def sent(self, unit: int) -> list[int]:
        """The slots of a unit's S (backward: of its D); of all that its document has had, if this starts in it."""
        p, e = self.before[unit], self.after[unit]
        if self.backward:
            return _bits(p)
        if self.breaks[unit]:
            return _bits(e)
        return [j for j in _bits(e) if _start(e, j) + (1 << j) > p]

    def pack(self, states: Tensor, units: Sequence[int]) -> Tensor:
        """[len(units), B, J, H, K, V] -> [len(units), B, slots sent, H, K, V], for all units as many."""
        most = max(len(self.sent(unit)) for unit in range(len(self.breaks)))
        packed = states.new_zeros(*states.shape[:2], most, *states.shape[3:])
        for row, of_unit, unit in zip(packed, states, units, strict=True):
            for place, j in enumerate(self.sent(unit)):
                row[:, place] = of_unit[:, j]
        return packed

    @staticmethod
    def factors_of(transitions: Tensor | None, states: Tensor) -> Tensor | None:
        """What `combine` is given of transitions [units, B, 1, H] or [units, B, 1, H, K, K]: a copy, which keeps no
        message alive."""
        return None if transitions is None else transitions[:, :, 0].contiguous()

    def combine(self, packed: Sequence[Tensor], factors: Sequence[Tensor] | None, units: Sequence[int]) -> Tensor:
        """[len(units), B, J, H, K, V]: what enters (backward: the gradient of what leaves) the given units, out of what
        all units have packed, in their order."""
        order = range(len(packed))[:: -1 if self.backward else 1]
        slots: Slots = {}
        found: dict[int, Slots] = {}
        for unit in order:
            if unit in units:
                found[unit] = slots
            slots = self._passed(slots, None if factors is None else factors[unit], unit)
            for j, state in zip(self.sent(unit), packed[unit].unbind(1), strict=False):
                slots[j] = slots[j] + state if j in slots else state
        most = max((j + 1 for unit in units for j in found[unit]), default=0)
        like = packed[0]
        result = like.new_zeros(len(units), like.shape[0], most, *like.shape[2:])
        for row, unit in zip(result, units, strict=True):
            for j, state in found[unit].items():
                row[:, j] = state
        return result

    def extend(self, state: Tensor, transition: Tensor | None, start: Tensor, units: Sequence[int]) -> Tensor:
        """[len(units), B, J, ...]: what leaves each unit's fragment (backward: the gradient of what enters it) where
        `start` enters instead of nothing, its own contribution being `state`."""
        p, e = (index_tensor([edge[unit] for unit in units], state.device) for edge in (self.before, self.after))
        route = routes(p, e, state.shape[2]).repeat_interleave(state.shape[1], 0)
        if self.backward:
            passed = moved_back(apply_transposed(transition, start).flatten(0, 1), route)
        else:
            passed = apply(transition, moved(start.flatten(0, 1), route).view(start.shape)).flatten(0, 1)
        return state + passed.view(state.shape)

    def _passed(self, slots: Slots, factor: Tensor | None, unit: int) -> Slots:
        """A route(X), or routeᵀ(Aᵀ G)."""
        if self.breaks[unit]:
            return {}
        p, e, through = self.before[unit], self.after[unit], apply_transposed if self.backward else apply
        passed: Slots = {}
        for i in _bits(p):
            j = (e ^ _start(p, i)).bit_length() - 1
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


def _bits(n: int) -> list[int]:
    return [j for j in range(n.bit_length()) if n >> j & 1]


def _start(n: int, slot: int) -> int:
    """The first position that a slot of n tokens holds."""
    return n >> slot + 1 << slot + 1
