"""Sequence-parallel softmax attention: by a ring, by an all-gather of keys and values, or by an all-to-all over heads.

In the first two the queries stay where they are and keys and values visit; what of a visit is computed is a list of
pairs of fragments of the same document (see `lasp.kernels.softmax`), whatever the layout, the documents and the window.
Outputs, log-sum-exps, dQ and the travelling dK, dV are accumulated in fp32 (fp64 for fp64 inputs).
"""

from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels import checks
from lasp.kernels.softmax import Accumulator, Mask, Pair, accumulation_dtype, attend, attend_grad, attend_packed
from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.layout import PADDING, Partition


class SoftmaxStrategy(Protocol):
    def check(self, q: Tensor, k: Tensor, ranks: int) -> None:
        """Raises ValueError for heads that the strategy cannot serve."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, partition: Partition, group: Group) -> Tensor:
        """o [B, T_local, H, V] of this rank's queries over the whole sequence."""


class Visiting:
    """Ring and all-gather: every rank's keys and values visit this rank's queries."""

    def __init__(self, visits: Any):
        self.visits = visits

    def check(self, q: Tensor, k: Tensor, ranks: int) -> None:
        pass

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, partition: Partition, group: Group) -> Tensor:
        return _Visits.apply(q, k, v, mask, partition, group, self.visits)


class Ulysses:
    """DeepSpeed-Ulysses (arXiv:2309.14509): all-to-alls exchange a share of the tokens for a share of the heads."""

    def check(self, q: Tensor, k: Tensor, ranks: int) -> None:
        for name, x in (("q", q), ("k", k)):
            expected = f"a multiple of the {ranks} ranks, for softmax='ulysses'"
            checks.require(x.shape[2] % ranks == 0, name, f"{x.shape[2]} heads", expected)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, partition: Partition, group: Group) -> Tensor:
        q, k, v = (_Redistribute.apply(x, partition, group, True) for x in (q, k, v))
        o, _ = attend_packed(q, k, v, partition.offsets, mask)
        return _Redistribute.apply(o, partition, group, False)


def choose_strategy(name: str) -> SoftmaxStrategy:
    strategies: dict[str, SoftmaxStrategy] = {
        "auto": Visiting(RingVisits),
        "ring": Visiting(RingVisits),
        "all_gather": Visiting(GatheredVisits),
        "ulysses": Ulysses(),
    }
    if name not in strategies:
        raise ValueError(f"softmax: got {name!r}, expected one of {', '.join(strategies)}")
    return strategies[name]


class RingVisits:
    """Keys and values go round, the next ones on their way while these are used; gradients go round with them."""

    def __init__(self, k: Tensor, v: Tensor, group: Group):
        self.k, self.v, self.group = k, v, group
        self.rank, self.ranks = comm.rank(group), comm.size(group)

    def forward(self):
        """Yields (rank whose they are, k, v) for every rank."""
        here: tuple[Tensor, ...] = (self.k, self.v)
        for step in range(self.ranks):
            coming = comm.shift(here, self.group) if step < self.ranks - 1 else None
            yield (self.rank - step) % self.ranks, *here
            here = coming.wait() if coming is not None else here

    def backward(self):
        """Likewise, with sums dk, dv to add to; `gradients` has the finished ones afterwards."""
        here: tuple[Tensor, ...] = (self.k, self.v)
        travelling = None
        for step in range(self.ranks):
            coming = comm.shift(here, self.group) if step < self.ranks - 1 else None
            sums = tuple(torch.zeros_like(x, dtype=accumulation_dtype(x)) for x in here)
            yield (self.rank - step) % self.ranks, *here, *sums
            if travelling is not None:
                sums = tuple(a + b for a, b in zip(sums, travelling.wait(), strict=True))
            travelling = comm.shift(sums, self.group)
            here = coming.wait() if coming is not None else here
        assert travelling is not None
        self.gradients = travelling.wait()


class GatheredVisits:
    """LASP-2H (arXiv:2502.07563): keys and values are gathered at once, a reduce-scatter sums their gradients."""

    def __init__(self, k: Tensor, v: Tensor, group: Group):
        self.group = group
        k_pending, v_pending = comm.all_gather(k, group), comm.all_gather(v, group)
        self.k, self.v = k_pending.wait(), v_pending.wait()

    def forward(self):
        for rank in range(len(self.k)):
            yield rank, self.k[rank], self.v[rank]

    def backward(self):
        dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x)) for x in (self.k, self.v))
        for rank in range(len(self.k)):
            yield rank, self.k[rank], self.v[rank], dk[rank], dv[rank]
        pending = comm.reduce_scatter(dk, self.group), comm.reduce_scatter(dv, self.group)
        self.gradients = tuple(p.wait() for p in pending)


def pairs_between(partition: Partition, rank: int, mask: Mask) -> list[Pair]:
    """What of this rank's queries sees what of another's keys, as pairs of fragments in the two ranks' local order."""
    keys = _placed(partition, rank)
    pairs = []
    for queries, q_rows in _placed(partition, partition.rank):
        for key, k_rows in keys:
            offset = queries.position - key.position
            if queries.document == key.document and mask.sees_any(offset, len(queries), len(key)):
                pairs.append(Pair(q_rows, k_rows, offset))
    return pairs


def _placed(partition: Partition, rank: int):
    """A rank's fragments with their rows in its local order; neither padding nor empty documents."""
    fragments = partition.of(rank)
    stops = accumulate(len(fragment) for fragment in fragments)
    placed = [(f, slice(stop - len(f), stop)) for f, stop in zip(fragments, stops, strict=True)]
    return [(f, rows) for f, rows in placed if f.document != PADDING and len(f)]


class _Visits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, partition: Partition, group: Group, visits: Any):
        total = Accumulator(q, v.shape[-1])
        for rank, k_here, v_here in visits(k, v, group).forward():
            attend(total, q, k_here, v_here, pairs_between(partition, rank, mask), mask)
        o = total.o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, total.lse)
        ctx.mask, ctx.partition, ctx.group, ctx.visits = mask, partition, group, visits
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor):
        q, k, v, o, lse = ctx.saved_tensors
        dq = torch.zeros_like(q, dtype=accumulation_dtype(q))
        visits = ctx.visits(k, v, ctx.group)
        for rank, k_here, v_here, dk, dv in visits.backward():
            pairs = pairs_between(ctx.partition, rank, ctx.mask)
            attend_grad(do, q, k_here, v_here, o, lse, (dq, dk, dv), pairs, ctx.mask)
        dk, dv = visits.gradients
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


class _Redistribute(torch.autograd.Function):
    """[B, T_local, H, D] -> [B, tokens, H / R, D], all tokens in global order and a share of the heads; or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, partition: Partition, group: Group, to_tokens: bool) -> Tensor:
        ctx.partition, ctx.group, ctx.to_tokens = partition, group, to_tokens
        return (_heads_to_tokens if to_tokens else _tokens_to_heads)(x, partition, group)

    @staticmethod
    def backward(ctx: Any, d: Tensor):
        back = _tokens_to_heads if ctx.to_tokens else _heads_to_tokens
        return back(d, ctx.partition, ctx.group), None, None, None


def _heads_to_tokens(x: Tensor, partition: Partition, group: Group) -> Tensor:
    ranks, layout = partition.layout.ranks, partition.layout
    by_rank = x.unflatten(2, (ranks, -1)).movedim(2, 0)  # [R, B, T_local, H / R, D]
    arrived = comm.all_to_all(by_rank, [1] * ranks, [1] * ranks, group).wait()
    units = arrived.unflatten(2, (layout.units_per_rank, -1)).movedim(2, 1).flatten(0, 1)
    whole = units[layout.rank_order].movedim(0, 1).flatten(1, 2)
    return whole[:, : partition.tokens]


def _tokens_to_heads(x: Tensor, partition: Partition, group: Group) -> Tensor:
    ranks, layout = partition.layout.ranks, partition.layout
    padding = layout.units * partition.unit_length - partition.tokens
    whole = torch.cat([x, x.new_zeros(x.shape[0], padding, *x.shape[2:])], dim=1)
    units = whole.unflatten(1, (layout.units, -1)).movedim(1, 0)
    by_rank = units[[unit for rank in range(ranks) for unit in layout.owned(rank)]].unflatten(0, (ranks, -1))
    by_rank = by_rank.movedim(1, 2).flatten(2, 3)  # [R, B, T_local, H / R, D]
    arrived = comm.all_to_all(by_rank, [1] * ranks, [1] * ranks, group).wait()
    return arrived.movedim(0, 2).flatten(2, 3)
