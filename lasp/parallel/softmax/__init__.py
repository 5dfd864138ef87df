"""Sequence-parallel softmax attention: a ring, an all-gather of keys and values, all-to-alls over heads, or both.

There is one scheme: `inner` consecutive ranks exchange heads for tokens (see `heads`), then keys and values visit the
queries of the other inner groups (see `visits`), which compute blocks that follow from layout, documents and window
alone (see `plan`). The ring and the all-gather are the case inner = 1; Ulysses is inner = all ranks, where nobody else
is left to visit. Outputs, log-sum-exps, dQ and the travelling dK, dV are summed in fp32 (fp64 for fp64 inputs).
"""

from functools import partial
from typing import NamedTuple, get_args

from torch import Tensor

from lasp.kernels import checks
from lasp.kernels.blocks import Mask
from lasp.kernels.keys import KeyStore
from lasp.names import SoftmaxName
from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.cost import Costs
from lasp.parallel.layout import Partition
from lasp.parallel.softmax.cost import Layer, choose, inner_size
from lasp.parallel.softmax.heads import Inner
from lasp.parallel.softmax.op import AttendVisits, Earlier, Way
from lasp.parallel.softmax.plan import Plan, coarsen, make_plan
from lasp.parallel.softmax.visits import GatheredVisits, RingVisits
from lasp.parallel.topology import topology

STRATEGIES: tuple[str, ...] = get_args(SoftmaxName)


class Before(NamedTuple):
    """What came before a segment: the keys in `store` of the segments `seen`.

    segment: the number of the one at hand. kept: whether its own are for later ones. partitions: of all segments.
    """

    store: KeyStore
    segment: int
    kept: bool
    seen: range
    partitions: list[Partition]


class SoftmaxStrategy:
    """One of STRATEGIES; "auto" picks one for each call by `cost.choose`. Made by all ranks at the same time."""

    def __init__(self, name: str, group: Group):
        self.name, self.group = name, group
        self.links = Costs().inside
        if name == "auto" and comm.message_device(group).type == "cuda":
            costs, node = topology(group)
            self.links = costs.links(comm.size(group), node)

    def check(self, q: Tensor, k: Tensor, partition: Partition) -> None:
        """Raises ValueError for heads that the strategy cannot split, or tokens that it cannot put together."""
        ranks = partition.layout.ranks
        if self.name in ("ulysses", "ulysses_ring"):
            expected = "another strategy for documents that are cut one by one"
            checks.require(partition.unit_by_unit, "softmax", repr(self.name), expected)
        if self.name == "ulysses":
            for name, x in (("q", q), ("k", k)):
                expected = f"a multiple of the {ranks} ranks, for softmax='ulysses'"
                checks.require(x.shape[2] % ranks == 0, name, f"{x.shape[2]} heads", expected)
        if self.name == "ulysses_ring":
            expected = f"a number with a factor in common with the {ranks} ranks, for softmax='ulysses_ring'"
            checks.require(ranks == 1 or inner_size(k.shape[2], ranks) > 1, "k", f"{k.shape[2]} heads", expected)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, partition: Partition, before: Before | None = None
    ) -> Tensor:
        """o [B, T_local, H, V] of this rank's queries over the whole sequence, or all of it up to a segment's end.

        The store of what came `before` gets the segment's own keys and values, if they are to be kept.
        """
        name, inner = self._choose(q, k, mask, partition if before is None else before.partitions[0])

        def way(plan: Plan) -> Way:
            if name == "all_gather":
                return partial(GatheredVisits, plan=plan, group=self.group)
            return partial(RingVisits, plan=plan, group=self.group, stride=inner)

        here = coarsen(partition, inner)
        exchange = None if inner == 1 else Inner(partition.layout, partition.rank, inner, self.group)
        if exchange is not None:
            q, k, v = exchange.to_tokens(q, k, v)
        earlier = None
        if before is not None:
            plans = {i: make_plan(here, mask, coarsen(before.partitions[i], inner)) for i in before.seen}
            visitors = {i: (plan.blocks, way(plan)) for i, plan in plans.items()}
            earlier = Earlier(before.store, before.segment, visitors)
            if before.kept and before.segment not in before.store:
                before.store.add(before.segment, k, v)
        plan = make_plan(here, mask)
        o = AttendVisits.apply(q, k, v, mask, plan.blocks, way(plan), earlier)
        return o if exchange is None else exchange.to_heads(o)[0]

    def _choose(self, q: Tensor, k: Tensor, mask: Mask, partition: Partition) -> tuple[str, int]:
        """The strategy, and how many ranks exchange heads. All segments of a sequence ask with its first partition."""
        name, ranks = self.name, partition.layout.ranks
        inner = inner_size(k.shape[2], ranks) if partition.unit_by_unit else 1
        if name == "auto":
            plans = {size: make_plan(coarsen(partition, size), mask) for size in {1, inner}}
            name = choose(Layer(q.shape[2], k.shape[2], k.shape[3], partition.local_tokens, ranks, plans), self.links)
        return name, 1 if name in ("ring", "all_gather") else inner
