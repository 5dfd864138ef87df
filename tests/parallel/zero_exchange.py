"""The mutation that every multi-rank test must notice: numbers that arrive from other ranks are zeros.

The messages travel as ever. Integers (counts, checks of the input) and `comm.replicate`, which makes results whole for
a test to look at, are left alone.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from lasp.parallel import comm
from lasp.parallel.comm import Group, Pending
from lasp.parallel.exchange.symmetric_memory import SymmetricMemory


def zero_exchange() -> None:
    """Replaces the functions of `comm` in this process."""
    real = SimpleNamespace(**vars(comm))

    def all_gather(x: Tensor, group: Group) -> Pending[Tensor]:
        own = real.rank(group)
        return real.all_gather(x, group).then(lambda rows: _zero_except(rows, own, own + 1))

    def all_reduce(x: Tensor, group: Group) -> Pending[Tensor]:
        return real.all_reduce(x, group).then(lambda total: x.clone() if x.is_floating_point() else total)

    def reduce_scatter(x: Tensor, group: Group) -> Pending[Tensor]:
        own = x[real.rank(group)]
        return real.reduce_scatter(x, group).then(lambda total: own.clone() if x.is_floating_point() else total)

    def all_to_all(x: Tensor, send: list[int], receive: list[int], group: Group) -> Pending[Tensor]:
        own = real.rank(group)
        first, last = sum(receive[:own]), sum(receive[: own + 1])
        return real.all_to_all(x, send, receive, group).then(lambda rows: _zero_except(rows, first, last))

    def shift(tensors: tuple[Tensor, ...], group: Group, distance: int = 1) -> Pending[tuple[Tensor, ...]]:
        arriving = real.shift(tensors, group, distance)
        return (
            arriving
            if distance % real.size(group) == 0
            else arriving.then(lambda ts: tuple(_zero_except(t, 0, 0) for t in ts))
        )

    def send_receive(sent, received, group: Group) -> Pending[Tensor | None]:
        arriving = real.send_receive(sent, received, group)
        return arriving.then(lambda t: None if t is None else _zero_except(t, 0, 0))

    for replacement in (all_gather, all_reduce, reduce_scatter, all_to_all, shift, send_receive):
        assert hasattr(comm, replacement.__name__)
        setattr(comm, replacement.__name__, replacement)
    _zero_symmetric_memory()


def _zero_symmetric_memory() -> None:
    real = SymmetricMemory._exchange

    def exchange(self, *args, **options) -> Pending[Tensor]:
        return real(self, *args, **options).then(torch.zeros_like)

    SymmetricMemory._exchange = exchange


def _zero_except(rows: Tensor, first: int, last: int) -> Tensor:
    """Only rows first to last survive, where the tensor holds floating-point numbers."""
    if not rows.is_floating_point():
        return rows
    kept = torch.zeros_like(rows)
    kept[first:last] = rows[first:last]
    return kept
