"""Log-linear attention's gradients between units where gates are scalars (math §4). Pure, no communication.

Every rank works out what the queries of its units want of all S, and a reduce-scatter brings each its own:

    dS_{c'} = Σ_{c > c'} e^{Σ_{c' < w < c} a_w} D_c^{(level)}

A unit's log decay a_u stands between S and queries on either side of it. Where S is in one slot with the unit's own
tokens, the unit finds its part itself. What passes it by in a slot i of its own is read from this slot by later units,
up to the one whose tokens it becomes one with:

    da_u = Σ_{w > u, i before u} <D_w^(i), X_w^(i)> + <G_w, e^{a_w} X_w^(i)>        the latter where w is that unit

So units tell these few numbers, and nobody has to keep what arrived forward. No two large sums are subtracted.
"""

import torch
from torch import Tensor

from lasp.kernels.lasting import kept
from lasp.kernels.parked import to_device
from lasp.parallel.fenwick import Fenwick, Place, slot_of, start


class Spread:
    """Of one rank, in whose messages D and X (`backward.places`) and S (`forward.places`) lie.

    seen: of every own unit, for each S of all ranks' messages, which of the rank's D's says what is wanted of it.
    between: [units, S, U] whether a unit lies between. merged: for each X, which of the rank's S it becomes one with.
    passed: [units, X of all ranks] whether it passes the unit by.
    """

    def __init__(self, forward: Fenwick, backward: Fenwick, rank: int, device: torch.device):
        self.forward, self.backward, self.first = forward, backward, _first(forward)
        own, wanting = forward.owned[rank], backward.places[rank]
        sent = [_padded(places, forward.size) for places in forward.places]
        of_all = [place for places in sent for place in places]
        self.seen = [[_index(wanting, self._seen(place, unit)) for place in of_all] for unit in own]
        source = torch.tensor([place[0] if place else 0 for place in of_all], device="cpu")[:, None]
        units = torch.arange(len(forward.before), device="cpu")
        between = torch.stack([(source < units) & (units < unit) for unit in own])
        self.merged = [_index(forward.places[rank], self._merged(*place)) for place in wanting]
        read = [place for places in backward.places for place in _padded(places, backward.size)]
        passed = [[self._passes(place, unit) for place in read] for unit in own]
        self.between = to_device(between[..., None, None], device)
        self.passed = to_device(torch.tensor(passed, dtype=torch.bool, device="cpu"), device)[..., None, None]
        self.units_of_reads = [unit for unit, _ in wanting]

    def wanted(self, d: Tensor, a: Tensor) -> Tensor:
        """[R, size, B, H, K, V]: what this rank wants of everybody's S. d: its D. a: [U, B, H]."""
        rows = [
            _picked(d, seen) * (between * a).sum(1).exp()[..., None, None]
            for seen, between in zip(self.seen, self.between, strict=True)
        ]
        return sum(rows[1:], rows[0]).unflatten(0, (len(self.forward.owned), -1))

    def through(self, d: Tensor, g: Tensor, x: Tensor, a: Tensor) -> Tensor:
        """[size, B, H]: of every X what passes through the gates before the unit. g: the gradients of the rank's S."""
        told = (d * x).sum((-1, -2))
        for row, unit, slot, merged in zip(told, self.units_of_reads, x, self.merged, strict=False):
            if merged is not None:
                row += a[unit].exp() * (g[merged] * slot).sum((-1, -2))
        return told

    def gates(self, told: Tensor) -> Tensor:
        """[units of the rank, B, H]: the gradients of their log decays, as far as they do not find them themselves;
        told: [R, size, B, H]."""
        return (self.passed * told.flatten(0, 1)).sum(1)

    def _seen(self, place: Place | None, unit: int) -> Place | None:
        """The slot of a unit's past that an S is part of, if it is in its past."""
        if place is None or not self.first[unit] <= place[0] < unit:
            return None
        return unit, slot_of(self.backward.before[unit], start(self.forward.after[place[0]], place[1]))

    def _merged(self, unit: int, slot: int) -> Place | None:
        """The slot with the unit's own tokens that a slot of its past becomes part of, if it does."""
        if self.forward.breaks[unit] or self.backward.breaks[unit]:
            return None
        to = slot_of(self.forward.after[unit], start(self.forward.before[unit], slot))
        return (unit, to) if to in self.forward.sent(unit) else None

    def _passes(self, place: Place | None, unit: int) -> bool:
        """Whether all that is in this slot of a later unit's past came before a unit, and passed it by."""
        if place is None:
            return False
        reader, slot = place
        ends = start(self.backward.before[reader], slot) + (1 << slot)
        through = not (self.forward.breaks[unit] or self.backward.breaks[unit])
        return through and self.first[reader] <= unit < reader and ends <= self.forward.before[unit]


@kept(16)
def spread(forward: Fenwick, backward: Fenwick, rank: int, device: torch.device) -> Spread:
    return Spread(forward, backward, rank, device)


def _first(forward: Fenwick) -> list[int]:
    """Of every unit the first of those whose document it goes on with, which are the units up to it; itself if none."""
    first: list[int] = []
    for unit, is_open in enumerate(forward.open):
        before = unit - 1
        first.append(unit if not is_open else before if forward.breaks[before] else first[before])
    return first


def _padded(places: list[Place], size: int) -> list[Place | None]:
    return [*places] + [None] * (size - len(places))


def _index(places: list[Place], place: Place | None) -> int | None:
    return None if place is None else places.index(place)


def _picked(x: Tensor, places: list[int | None]) -> Tensor:
    """Those of the rows, zero for None."""
    zero = x.new_zeros(x.shape[1:])
    return torch.stack([zero if place is None else x[place] for place in places])
