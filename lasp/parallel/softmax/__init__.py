"""Sequence-parallel softmax attention: a ring, an all-gather of keys and values, all-to-alls over heads, or both.

There is one scheme: `inner` consecutive ranks exchange heads for tokens (see `heads`), then keys and values visit the
queries of the other inner groups (see `visits`), which compute blocks that follow from layout, documents and window
alone (see `plan`). The ring and the all-gather are the case inner = 1; Ulysses is inner = all ranks, where nobody else
is left to visit. Outputs, log-sum-exps, dQ and the travelling dK, dV are summed in fp32 (fp64 for fp64 inputs).
"""

from functools import partial
from typing import get_args

import torch
from torch import Tensor

from lasp.kernels import checks
from lasp.kernels.blocks import Mask
from lasp.names import SoftmaxName
from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.cost import Costs
from lasp.parallel.layout import Partition
from lasp.parallel.softmax.cost import Layer, choose, inner_size
from lasp.parallel.softmax.heads import Inner
from lasp.parallel.softmax.op import AttendVisits, Way
from lasp.parallel.softmax.plan import coarsen, make_plan
from lasp.parallel.softmax.visits import GatheredVisits, RingVisits
from lasp.parallel.topology import topology

STRATEGIES: tuple[str, ...] = get_args(SoftmaxName)


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

    @torch.compiler.disable  # messages have no place in a graph
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, partition: Partition) -> Tensor:
        """o [B, T_local, H, V] of this rank's queries over the whole sequence."""
        name, group, ranks = self.name, self.group, partition.layout.ranks
        inner = inner_size(k.shape[2], ranks) if partition.unit_by_unit else 1
        if name == "auto":
            plans = {size: make_plan(coarsen(partition, size), mask) for size in {1, inner}}
            name = choose(Layer(q.shape[2], k.shape[2], k.shape[3], partition.local_tokens, ranks, plans), self.links)
        if name in ("ring", "all_gather"):
            inner = 1
        plan = make_plan(coarsen(partition, inner), mask)
        way: Way = partial(RingVisits, plan=plan, group=group, stride=inner)
        if name == "all_gather":
            way = partial(GatheredVisits, plan=plan, group=group)
        if inner == 1:
            return AttendVisits.apply(q, k, v, mask, plan.blocks, way)
        exchange = Inner(partition.layout, partition.rank, inner, group)
        q, k, v = exchange.to_tokens(q, k, v)
        return exchange.to_heads(AttendVisits.apply(q, k, v, mask, plan.blocks, way))[0]
