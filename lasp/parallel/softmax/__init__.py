"""Sequence-parallel softmax attention: a ring, an all-gather of keys and values, all-to-alls over heads, or both.

There is one scheme: `inner` consecutive ranks exchange heads for tokens (see `heads`), then keys and values visit the
queries of the other inner groups (see `visits`), which compute blocks that follow from layout, documents and window
alone (see `plan`). The ring and the all-gather are the case inner = 1; Ulysses is inner = all ranks, where nobody else
is left to visit. Outputs, log-sum-exps, dQ and the travelling dK, dV are summed in fp32 (fp64 for fp64 inputs).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels import checks
from lasp.kernels.blocks import Mask
from lasp.kernels.softmax import Accumulator, Sum, attend, attend_grad
from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.cost import Costs
from lasp.parallel.layout import Partition
from lasp.parallel.softmax.cost import Layer, choose, inner_size
from lasp.parallel.softmax.heads import Inner
from lasp.parallel.softmax.plan import Plan, coarsen, make_plan
from lasp.parallel.softmax.visits import GatheredVisits, RingVisits, Visit
from lasp.parallel.topology import topology

STRATEGIES = ("auto", "ring", "all_gather", "ulysses", "ulysses_ring")


class SoftmaxStrategy:
    """One of STRATEGIES; "auto" picks one for each call by `cost.choose`. Made by all ranks at the same time."""

    def __init__(self, name: str, group: Group):
        checks.require(name in STRATEGIES, "softmax", repr(name), f"one of {', '.join(STRATEGIES)}")
        self.name, self.group = name, group
        costs, one_node = (
            topology(group) if name == "auto" and comm.message_device(group).type == "cuda" else (Costs(), True)
        )
        self.links = costs.inside if one_node else costs.across

    def check(self, q: Tensor, k: Tensor, ranks: int) -> None:
        """Raises ValueError for heads that the strategy cannot split."""
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
        if name == "auto":
            balanced = partition.layout.name == "zigzag"
            sizes = q.shape[2], k.shape[2], q.shape[3], partition.local_tokens, ranks
            name = choose(Layer(*sizes, mask.causal, mask.window, balanced), self.links)
        inner = {"ulysses": ranks, "ulysses_ring": inner_size(k.shape[2], ranks)}.get(name, 1)
        visits = GatheredVisits if name == "all_gather" else RingVisits
        if inner == 1:
            return _Visits.apply(q, k, v, mask, make_plan(partition, mask), group, inner, visits)
        exchange = Inner(partition.layout, partition.rank, inner, group)
        q, k, v = exchange.to_tokens(q, k, v)
        o = _Visits.apply(q, k, v, mask, make_plan(coarsen(partition, inner), mask), group, inner, visits)
        return exchange.to_heads(o)[0]


class _Visits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, plan: Plan, group: Group, inner: int, way: Any):
        totals: dict[int, Accumulator] = {}  # by the first of the heads
        for visit in way(k, v, plan, group, inner).forward():
            heads = _query_heads(visit, q, k)
            part = q[:, :, heads]
            total = totals.setdefault(heads.start, Accumulator(part, v.shape[-1]))
            attend(total, part, visit.k, visit.v, plan.blocks[visit.rank], mask)
        o, lse = (_join(parts) for parts in zip(*(total.result() for total in totals.values()), strict=True))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.mask, ctx.plan, ctx.group, ctx.inner, ctx.way = mask, plan, group, inner, way
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor):
        q, k, v, o, lse = ctx.saved_tensors
        dq: dict[int, Sum] = {}
        visits = ctx.way(k, v, ctx.plan, ctx.group, ctx.inner)
        for visit in visits.backward():
            heads = _query_heads(visit, q, k)
            do_h, q_h, o_h, lse_h = (x[:, :, heads] for x in (do, q, o, lse))
            sums = (dq.setdefault(heads.start, Sum(q_h)), Sum(visit.k, visit.dk), Sum(visit.v, visit.dv))
            attend_grad(do_h, q_h, visit.k, visit.v, o_h, lse_h, sums, ctx.plan.blocks[visit.rank], ctx.mask)
        dk, dv = visits.gradients
        whole = _join(total.result() for total in dq.values())
        return whole, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def _query_heads(visit: Visit, q: Tensor, k: Tensor) -> slice:
    """Those that use the key/value heads of the visit."""
    group = q.shape[2] // k.shape[2]
    first, last, _ = visit.heads.indices(k.shape[2])
    return slice(first * group, last * group)


def _join(parts: Iterable[Tensor]) -> Tensor:
    """The heads' parts side by side."""
    first, *others = parts
    return torch.cat([first, *others], dim=2) if others else first
