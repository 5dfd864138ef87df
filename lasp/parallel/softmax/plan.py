"""Which blocks a rank computes when another's keys and values visit it. Pure arithmetic, the same on every rank."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from lasp.kernels.blocks import Block, Mask, join, string
from lasp.parallel.layout import PADDING, Layout, Partition


@dataclass(frozen=True)
class Plan:
    """steps: how many ranks back the keys are that some rank sees, ascending from 0. blocks: by the keys' rank."""

    ranks: int
    rank: int
    steps: list[int]
    blocks: dict[int, list[Block]]


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one document in a rank's local order."""

    document: int
    position: int
    rows: slice


@lru_cache(maxsize=64)
def make_plan(partition: Partition, mask: Mask) -> Plan:
    ranks, rank = partition.layout.ranks, partition.rank
    runs = [runs_of(partition, other) for other in range(ranks)]
    blocks = {other: blocks_between(runs[rank], runs[other], mask) for other in range(ranks)}
    steps = [
        step
        for step in range(ranks)
        if step == 0 or any(blocks_between(runs[other], runs[other - step], mask) for other in range(ranks))
    ]
    return Plan(ranks, rank, steps, blocks)


@lru_cache(maxsize=64)
def coarsen(partition: Partition, inner: int) -> Partition:
    """The partition among ranks // inner groups of `inner` consecutive ranks: the same layout, of longer units."""
    layout = Layout(partition.layout.name, partition.layout.ranks // inner)
    length = inner * partition.unit_length
    return Partition(layout, partition.rank // inner, partition.offsets, unit_length=length)


def runs_of(partition: Partition, rank: int) -> list[Run]:
    """A rank's runs without padding, neighbours in the sequence joined."""
    fragments = partition.of(rank)
    stops = accumulate(len(fragment) for fragment in fragments)
    runs: list[Run] = []
    for f, stop in zip(fragments, stops, strict=True):
        if f.document == PADDING or not len(f):
            continue
        last = runs[-1] if runs else None
        if last and last.document == f.document and last.position + last.rows.stop - last.rows.start == f.position:
            runs[-1] = Run(f.document, last.position, slice(last.rows.start, stop))
        else:
            runs.append(Run(f.document, f.position, slice(stop - len(f), stop)))
    return runs


def blocks_between(queries: list[Run], keys: list[Run], mask: Mask) -> list[Block]:
    """What one rank's queries see of another's keys, in as few blocks as kernels allow."""
    seen: list[Block] = []
    by_document: dict[int, list[Run]] = {}
    for key in keys:
        by_document.setdefault(key.document, []).append(key)
    for document in dict.fromkeys(query.document for query in queries):
        pairs = [(q, k) for q in queries if q.document == document for k in by_document.get(document, ())]
        blocks = [mask.block(q.rows, k.rows, q.position - k.position) for q, k in pairs]
        seen += join([block for block in blocks if block is not None])
    return string(seen)
