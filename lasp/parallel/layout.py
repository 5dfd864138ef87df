"""Who holds which tokens: units, ownership, and the pieces of packed documents. Pure arithmetic, no communication.

The sequence is cut into U units of equal length (the last ones may be padding). Rank r of R holds, in ascending order,

    contiguous   U = R     unit r
    zigzag       U = 2 R   units r and 2R - 1 - r, so that causal softmax attention costs every rank the same

A `Fragment` is a piece of one document inside one unit. Fragments are what the kernels see as segments.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, wraps
from itertools import pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args

from lasp.names import LayoutName

LAYOUTS: tuple[str, ...] = get_args(LayoutName)
PADDING = -1  # the document number of padding
Others = ParamSpec("Others")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Layout:
    """The assignment of units to ranks."""

    name: str
    ranks: int

    def __post_init__(self) -> None:
        if self.name not in LAYOUTS:
            raise ValueError(f"layout: got {self.name!r}, expected one of {', '.join(LAYOUTS)}")

    @property
    def units(self) -> int:
        return self.ranks * self.units_per_rank

    @property
    def units_per_rank(self) -> int:
        return 1 if self.name == "contiguous" else 2

    def owned(self, rank: int) -> tuple[int, ...]:
        """The units of a rank, ascending."""
        return (rank,) if self.name == "contiguous" else (rank, self.units - 1 - rank)

    def owner(self, unit: int) -> int:
        return unit if self.name == "contiguous" else min(unit, self.units - 1 - unit)

    @cached_property
    def rank_order(self) -> list[int]:
        """Position of unit 0, 1, … in the concatenation of all ranks' units in rank order."""
        gathered = [unit for rank in range(self.ranks) for unit in self.owned(rank)]
        return sorted(range(self.units), key=gathered.__getitem__)


@dataclass(frozen=True)
class Fragment:
    """Tokens start … stop - 1 of the sequence, all of one document and one unit."""

    start: int
    stop: int
    document: int  # PADDING if there is none
    position: int  # of the first token within its document
    begins: bool  # the document starts here
    ends: bool  # the document ends here

    def __len__(self) -> int:
        return self.stop - self.start


class Partition:
    """One batch's tokens, cut into units and fragments, as one rank sees them.

    offsets: where documents start, from 0 to `tokens` (as cu_seqlens). aligned: units of a power-of-two length, if
    there are several.
    unit_length: that of every unit, if it is not to be the shortest possible. past: how many tokens of the first
    document came before, where the sequence is a segment of a longer one.
    """

    unit_by_unit = True  # the local order

    def __init__(
        self,
        layout: Layout,
        rank: int,
        offsets: list[int],
        aligned: bool = False,
        unit_length: int | None = None,
        past: int = 0,
    ):
        self.layout, self.rank, self.offsets, self.past = layout, rank, offsets, past
        self.tokens, self.documents = offsets[-1], len(offsets) - 1
        self.kept: dict[Hashable, Any] = {}
        length = -(-self.tokens // layout.units)
        self.unit_length = unit_length or (1 << (length - 1).bit_length() if aligned and layout.units > 1 else length)
        self.owned = layout.owned(rank)
        self.local_tokens = self.unit_length * len(self.owned)

    @cached_property
    def units(self) -> list[list[Fragment]]:
        """The fragments of every unit, in order; padding is a fragment of its own."""
        units: list[list[Fragment]] = [[] for _ in range(self.layout.units)]
        length, last = self.unit_length, self.layout.units - 1
        for document, (start, stop) in enumerate(pairwise(self.offsets)):
            first = min(start // length, last)  # an empty document may lie behind the last token
            past = 0 if document else self.past
            for unit in range(first, max(first, (stop - 1) // length) + 1):
                a, b = max(start, unit * length), min(stop, (unit + 1) * length)
                units[unit].append(Fragment(a, b, document, a - start + past, a == start, b == stop))
        for unit in range(self.tokens // length, last + 1):
            a, b = max(self.tokens, unit * length), (unit + 1) * length
            if a < b:
                units[unit].append(Fragment(a, b, PADDING, 0, True, True))
        return units

    @cached_property
    def local(self) -> list[Fragment]:
        """This rank's fragments in local order."""
        return self.of(self.rank)

    def of(self, rank: int) -> list[Fragment]:
        """A rank's fragments, in its local order."""
        return [fragment for unit in self.layout.owned(rank) for fragment in self.units[unit]]

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """Global positions start, stop of each of this rank's units; they may lie beyond `tokens` (padding)."""
        return [(unit * self.unit_length, (unit + 1) * self.unit_length) for unit in self.owned]

    @cached_property
    def first(self) -> list[int]:
        """Index, among the local fragments, of the first one of each local unit."""
        return [index - len(self.units[unit]) + 1 for index, unit in zip(self.last, self.owned, strict=True)]

    @cached_property
    def last(self) -> list[int]:
        """Index, among the local fragments, of the last one of each local unit."""
        counts = [len(self.units[unit]) for unit in self.owned]
        return [sum(counts[: i + 1]) - 1 for i in range(len(counts))]


def kept_with_partition(
    make: Callable[Concatenate[Partition, Others], Result],
) -> Callable[Concatenate[Partition, Others], Result]:
    """`make`, whose results are kept as long as the partition, of which every packed batch has its own."""

    @wraps(make)
    def call(partition: Partition, *others: Others.args, **named: Others.kwargs) -> Result:
        key = make, others, *named.items()
        if key not in partition.kept:
            partition.kept[key] = make(partition, *others, **named)
        return partition.kept[key]

    return call
