"""Every message between ranks. `group` is a ProcessGroup, or None for one rank alone; ranks are ranks of the group.

A call starts the transfer and returns a `Pending`; its `wait()` gives what has arrived. The tensors sent must not be
changed before that.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
Mapped = TypeVar("Mapped")
Group = dist.ProcessGroup | None

# torch 2.13 renamed these two and warns of the old names; 2.11 has only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(Generic[Result]):
    """A transfer under way. `wait()` may be called once."""

    def __init__(self, finish: Callable[[], Result]):
        self._finish: Callable[[], Result] | None = finish

    def wait(self) -> Result:
        if self._finish is None:
            raise RuntimeError("wait() was called twice on one transfer")
        finish, self._finish = self._finish, None
        return finish()

    def then(self, function: Callable[[Result], Mapped]) -> "Pending[Mapped]":
        """The same transfer, with its result passed through `function` on arrival."""
        return Pending(lambda: function(self.wait()))


def size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def all_gather(x: Tensor, group: Group) -> Pending[Tensor]:
    """[R, *x.shape]: everybody's x, in rank order."""
    return _gather(x, group)


def replicate(x: Tensor, group: Group) -> Tensor:
    """As `all_gather`, at once: to make whole what the ranks hold in parts, rather than to compute with it."""
    return _gather(x, group).wait()


def all_reduce(x: Tensor, group: Group) -> Pending[Tensor]:
    """The sum of everybody's x."""
    result = x.clone(memory_format=torch.contiguous_format)
    if size(group) == 1:
        return Pending(lambda: result)
    return _after([dist.all_reduce(result, group=group, async_op=True)], (), result)


def reduce_scatter(x: Tensor, group: Group) -> Pending[Tensor]:
    """x[r] of every rank goes to rank r; the sum of what arrived, x.shape[1:]."""
    if size(group) == 1:
        return Pending(lambda: x[0])
    x = x.contiguous()
    result = x.new_empty(x.shape[1:])
    return _after([_reduce_scatter(result.flatten(), x.flatten(), group=group, async_op=True)], (x,), result)


def all_to_all(x: Tensor, send: list[int], receive: list[int], group: Group) -> Pending[Tensor]:
    """send[r] rows of x, in order, go to rank r; what arrived, receive[r] rows from rank r, in order."""
    if size(group) == 1:
        return Pending(lambda: x)
    x = x.contiguous()
    result = x.new_empty(sum(receive), *x.shape[1:])
    work = dist.all_to_all_single(result, x, receive, send, group=group, async_op=True)
    return _after([work], (x,), result)


def shift(tensors: tuple[Tensor, ...], group: Group, distance: int = 1) -> Pending[tuple[Tensor, ...]]:
    """A ring: the tensors go to the rank `distance` further on, and those of the rank as far back arrive."""
    ranks = size(group)
    if distance % ranks == 0:
        return Pending(lambda: tensors)
    tensors = tuple(t.contiguous() for t in tensors)
    results = tuple(torch.empty_like(t) for t in tensors)
    after, before = (rank(group) + distance) % ranks, (rank(group) - distance) % ranks
    messages = [dist.P2POp(dist.isend, t, group=group, group_peer=after) for t in tensors]
    messages += [dist.P2POp(dist.irecv, t, group=group, group_peer=before) for t in results]
    return _after(dist.batch_isend_irecv(messages), tensors, results)


def send(x: Tensor, to: int, group: Group) -> Pending[None]:
    x = x.contiguous()
    # Batched, though single: NCCL runs unbatched messages of one group one after the other.
    return _after(dist.batch_isend_irecv([dist.P2POp(dist.isend, x, group=group, group_peer=to)]), (x,), None)


def receive(like: Tensor, source: int, group: Group) -> Pending[Tensor]:
    """A tensor of the shape and dtype of `like`."""
    result = torch.empty_like(like, memory_format=torch.contiguous_format)
    message = dist.P2POp(dist.irecv, result, group=group, group_peer=source)
    return _after(dist.batch_isend_irecv([message]), (), result)


def _gather(x: Tensor, group: Group) -> Pending[Tensor]:
    if size(group) == 1:
        return Pending(lambda: x[None])
    x = x.contiguous()
    result = x.new_empty(size(group), *x.shape)
    return _after([_all_gather(result.flatten(), x.flatten(), group=group, async_op=True)], (x,), result)


def _after(works: list, sent: tuple[Tensor, ...], result: Result) -> Pending[Result]:
    def finish() -> Result:
        for work in works:
            work.wait()
        _ = sent  # alive until here
        return result

    return Pending(finish)
