"""DeepSpeed-Ulysses (arXiv:2309.14509): all-to-alls exchange a share of the heads for more of the tokens.

They work within groups of consecutive ranks; being all-to-alls of the whole group with nothing for the others, they
need no process groups of their own.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lasp.kernels.autocast import Function
from lasp.kernels.once_differentiable import once_differentiable
from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.layout import Layout


@dataclass(frozen=True)
class Inner:
    """The `size` consecutive ranks of the group that exchange heads for tokens, this rank among them."""

    layout: Layout
    rank: int
    size: int
    group: Group

    @property
    def members(self) -> range:
        first = self.rank - self.rank % self.size
        return range(first, first + self.size)

    @property
    def counts(self) -> list[int]:
        return [int(rank in self.members) for rank in range(self.layout.ranks)]

    @property
    def order(self) -> list[int]:
        """Place of each of the members' units, ascending, in the concatenation of what the members hold."""
        units = [unit for rank in self.members for unit in self.layout.owned(rank)]
        return sorted(range(len(units)), key=units.__getitem__)

    def to_tokens(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[B, T_local, H, D] -> [B, size · T_local, H / size, D], the members' units ascending; differentiable."""
        return _Redistribute.apply(self, True, *tensors)

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The inverse."""
        return _Redistribute.apply(self, False, *tensors)


class _Redistribute(Function):
    @staticmethod
    def forward(ctx: Any, inner: Inner, to_tokens: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.inner, ctx.to_tokens = inner, to_tokens
        return _redistribute(inner, to_tokens, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        return None, None, *_redistribute(ctx.inner, not ctx.to_tokens, grads)


def _redistribute(inner: Inner, to_tokens: bool, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All transfers are under way before the first is waited for."""
    start = _heads_to_tokens if to_tokens else _tokens_to_heads
    under_way = [start(x, inner) for x in tensors]
    return tuple(pending.wait() for pending in under_way)


def _heads_to_tokens(x: Tensor, inner: Inner) -> comm.Pending[Tensor]:
    def arrange(arrived: Tensor) -> Tensor:
        units = arrived.unflatten(2, (inner.layout.units_per_rank, -1)).movedim(2, 1).flatten(0, 1)
        return units[inner.order].movedim(0, 1).flatten(1, 2)

    by_rank = x.unflatten(2, (inner.size, -1)).movedim(2, 0)  # [size, B, T_local, H / size, D]
    return comm.all_to_all(by_rank, inner.counts, inner.counts, inner.group).then(arrange)


def _tokens_to_heads(x: Tensor, inner: Inner) -> comm.Pending[Tensor]:
    order = inner.order
    units = x.unflatten(1, (len(order), -1)).movedim(1, 0)
    held = units[sorted(range(len(order)), key=order.__getitem__)].unflatten(0, (inner.size, -1))
    by_rank = held.movedim(1, 2).flatten(2, 3)  # [size, B, T_local, H / size, D]
    arriving = comm.all_to_all(by_rank, inner.counts, inner.counts, inner.group)
    return arriving.then(lambda arrived: arrived.movedim(0, 2).flatten(2, 3))
