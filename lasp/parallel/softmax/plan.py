"""Which blocks a rank computes when another's keys and values visit it. Pure arithmetic, the same on every rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, product

from lasp.kernels.blocks import Block, Mask, join, string
from lasp.parallel.layout import PADDING, Layout, Partition, kept_with_partition


@dataclass(frozen=True)
class Plan:
    """What a rank does in a ring, and what all do.

    steps: how many ranks back the keys are that some rank sees, ascending from 0. blocks: by the keys' rank.
    busiest: pairs of a query and a key that it sees, on the rank that has most of them.
    """

    ranks: int
    rank: int
    steps: list[int]
    blocks: dict[int, list[Block]]
    busiest: int


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one document in a rank's local order; the first is at this position of the document."""

    position: int
    rows: slice


@kept_with_partition
def make_plan(partition: Partition, mask: Mask, earlier: Partition | None = None) -> Plan:
    """earlier: the keys' segment, if it is not the queries' own but one before, whose last document goes on here."""
    ranks, rank = partition.layout.ranks, partition.rank
    queries = [runs_of(partition, other) for other in range(ranks)]
    keys = queries
    if earlier is not None:
        keys = [{0: runs_of(earlier, other).get(earlier.documents - 1, [])} for other in range(ranks)]
    blocks = {other: blocks_between(queries[rank], keys[other], mask) for other in range(ranks)}
    steps = [
        step
        for step in range(ranks)
        if step == 0 or any(sees_any(queries[other], keys[other - step], mask) for other in range(ranks))
    ]
    return Plan(ranks, rank, steps, blocks, max(pairs(partition, other, mask) for other in range(ranks)))


def coarsen(partition: Partition, inner: int) -> Partition:
    """The partition among ranks // inner groups of `inner` consecutive ranks: the same layout, of longer units."""
    return partition if inner == 1 else _coarser(partition, inner)


@kept_with_partition
def _coarser(partition: Partition, inner: int) -> Partition:
    layout = Layout(partition.layout.name, partition.layout.ranks // inner)
    length = inner * partition.unit_length
    return Partition(layout, partition.rank // inner, partition.offsets, unit_length=length, past=partition.past)


Runs = dict[int, list[Run]]  # by document, in local order


def runs_of(partition: Partition, rank: int) -> Runs:
    """A rank's runs without padding, neighbours in the sequence joined."""
    fragments = partition.of(rank)
    stops = accumulate(len(fragment) for fragment in fragments)
    runs: Runs = {}
    for f, stop in zip(fragments, stops, strict=True):
        if f.document == PADDING or not len(f):
            continue
        same = runs.setdefault(f.document, [])
        if same and same[-1].position + same[-1].rows.stop - same[-1].rows.start == f.position:
            last = same.pop()
            same.append(Run(last.position, slice(last.rows.start, stop)))
        else:
            same.append(Run(f.position, slice(stop - len(f), stop)))
    return runs


def blocks_between(queries: Runs, keys: Runs, mask: Mask) -> list[Block]:
    """What one rank's queries see of another's keys, in as few blocks as kernels allow."""
    return string([block for document in queries for block in join(list(_seen(queries, keys, document, mask)))])


def sees_any(queries: Runs, keys: Runs, mask: Mask) -> bool:
    """Whether there are such blocks."""
    return any(True for document in queries.keys() & keys.keys() for _ in _seen(queries, keys, document, mask))


def pairs(partition: Partition, rank: int, mask: Mask) -> int:
    """How many keys the queries of a rank see, all together."""

    def backwards(start: int, stop: int) -> int:
        """The sum of min(p + 1, window) over positions p."""
        limit = stop if mask.window is None else min(max(start, mask.window), stop)
        return (limit * (limit + 1) - start * (start + 1)) // 2 + (stop - limit) * (mask.window or 0)

    total = 0
    for f in partition.of(rank):
        if f.document != PADDING:
            start, stop = f.position, f.position + len(f)
            total += backwards(start, stop)
            if not mask.causal:
                length = partition.offsets[f.document + 1] - partition.offsets[f.document]
                total += backwards(length - stop, length - start) - len(f)
    return total


def _seen(queries: Runs, keys: Runs, document: int, mask: Mask) -> Iterator[Block]:
    for q, k in product(queries[document], keys.get(document, ())):
        block = mask.block(q.rows, k.rows, q.position - k.position)
        if block is not None:
            yield block
