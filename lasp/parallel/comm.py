"""Every message between ranks. `group` is a ProcessGroup, or None for one rank alone; ranks are ranks of the group.

A call starts the transfer and returns a `Pending`; its `wait()` gives what has arrived. The tensors sent must not be
changed before that. A transfer that fails, or that others do not join in time, is a RuntimeError that names this rank,
the group and the transfer; on GPUs NCCL's watchdog says as much, and ends the process.
"""

from collections.abc import Callable, Generator
from datetime import timedelta
from functools import cache
from hashlib import sha1
from typing import Any, TypeVar
from unittest.mock import patch
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from lasp.kernels.pending import Pending
from lasp.parallel.waits import waits

Result = TypeVar("Result")
Group = dist.ProcessGroup | None

# torch 2.13 renamed these two and warns of the old names; 2.11 has only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def message_device(group: Group) -> torch.device:
    """The device on which this group's messages live."""
    if group is None or any(device.type == "cpu" for device in group._device_types):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def timeout(group: dist.ProcessGroup) -> float:
    """Seconds after which a message of this group has failed."""
    return group._get_backend(message_device(group)).options._timeout.total_seconds()


def split(group: Group, size: int) -> tuple[Group, Group]:
    """Groups of this rank with the others of its run of `size` consecutive ranks, and with those at its place in other
    runs; None for itself alone. Collective."""
    if group is None:
        return None, None
    ranks, place = dist.get_process_group_ranks(group), dist.get_rank(group)
    first = place // size * size
    members = ranks[first : first + size], ranks[place % size :: size]
    patience, name = timedelta(seconds=timeout(group)), gather_objects(uuid4().hex, group)[0]
    near, far = (None if len(own) == 1 else _new_group(own, name, patience) for own in members)
    return near, far


def _new_group(ranks: list[int], name: str, patience: timedelta) -> dist.ProcessGroup:
    """A group that its members alone make, who agree on a name.

    PyTorch would name it by how many groups this process has. That may differ between the members, if some are in
    groups that others are not in, and they would not find each other.
    """
    hashed = sha1(f"{name} {ranks}".encode(), usedforsecurity=False).hexdigest()
    with patch.object(distributed_c10d, "_hash_ranks_to_str", lambda ranks: hashed):
        return dist.new_group(ranks, patience, use_local_synchronization=True)


def gather_objects(x: Any, group: Group) -> list[Any]:
    """Everybody's x, in rank order; the host waits."""
    objects: list[Any] = [x] * size(group)
    if len(objects) > 1:
        _naming("gather_objects", group, lambda: dist.all_gather_object(objects, x, group=group))
    return objects


def broadcast(x: Tensor, group: Group) -> None:
    """Rank 0's x, in place."""
    if size(group) > 1:
        _naming(f"broadcast of {list(x.shape)}", group, lambda: dist.broadcast(x, group=group, group_src=0))


def all_gather(x: Tensor, group: Group) -> Pending[Tensor]:
    """[R, *x.shape]: everybody's x, in rank order."""
    return _gather(x, group, "all_gather")


def replicate(x: Tensor, group: Group, purpose: str = "replicate") -> Tensor:
    """As `all_gather`, at once: to make whole what the ranks hold in parts, rather than to compute with it."""
    return _gather(x, group, purpose).wait()


def all_reduce(x: Tensor, group: Group) -> Pending[Tensor]:
    """The sum of everybody's x."""
    result = x.clone(memory_format=torch.contiguous_format)
    if size(group) == 1:
        return Pending(lambda: result)

    def start() -> list:
        return [dist.all_reduce(result, group=group, async_op=True)]

    return _transfer("all_reduce", group, start, (result,), result)


def reduce_scatter(x: Tensor, group: Group) -> Pending[Tensor]:
    """x[r] of every rank goes to rank r; the sum of what arrived, x.shape[1:]."""
    if size(group) == 1:
        return Pending(lambda: x[0])
    x = x.contiguous()
    result = x.new_empty(x.shape[1:])

    def start() -> list:
        return [_reduce_scatter(result.flatten(), x.flatten(), group=group, async_op=True)]

    return _transfer("reduce_scatter", group, start, (x,), result)


def all_to_all(x: Tensor, send: list[int], receive: list[int], group: Group) -> Pending[Tensor]:
    """send[r] rows of x, in order, go to rank r; what arrived, receive[r] rows from rank r, in order."""
    if size(group) == 1:
        return Pending(lambda: x)
    x = x.contiguous()
    result = x.new_empty(sum(receive), *x.shape[1:])

    def start() -> list:
        return [dist.all_to_all_single(result, x, receive, send, group=group, async_op=True)]

    return _transfer("all_to_all", group, start, (x,), result)


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
    return _transfer("shift", group, lambda: dist.batch_isend_irecv(messages), tensors, results)


def send_receive(
    sent: tuple[Tensor, int] | None, received: tuple[Tensor, int] | None, group: Group
) -> Pending[Tensor | None]:
    """At once: a tensor to a rank, and a tensor of the shape and dtype of the second from a rank."""
    messages, outgoing, result = [], None, None
    if sent is not None:
        outgoing = sent[0].contiguous()
        messages.append(dist.P2POp(dist.isend, outgoing, group=group, group_peer=sent[1]))
    if received is not None:
        result = torch.empty_like(received[0], memory_format=torch.contiguous_format)
        messages.append(dist.P2POp(dist.irecv, result, group=group, group_peer=received[1]))
    # Batched, even if single: NCCL runs unbatched messages of one group one after the other.
    return _transfer("send_receive", group, lambda: dist.batch_isend_irecv(messages), (outgoing, result), result)


def start(steps: Generator[None, None, Result], *used: Tensor | None) -> Pending[Result]:
    """Several messages and what happens between them, as one transfer; `steps` yields before each wait.

    On a GPU all of it is put on a stream of its own. On a CPU it runs up to its first wait, and from there on when its
    result is waited for. `used`: tensors that it reads.
    """
    device = next(x.device for x in used if x is not None)
    if device.type != "cuda":
        try:
            next(steps)
        except StopIteration as stop:
            result = stop.value
            return Pending(lambda: result)
        return Pending(lambda: _run(steps))
    return on_stream(lambda: _run(steps), *used)


def on_stream(work: Callable[[], Result], *used: Tensor | None) -> Pending[Result]:
    """Runs `work` now, on a stream beside the current one. `used`: tensors of the GPU that it reads.

    What it allocates belongs to that stream, and may be reused there only after the current stream's work so far,
    since every use of the stream begins with waiting for that.
    """
    device = next(x.device for x in used if x is not None)
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        result = work()
    done = side.record_event()

    def finish() -> Result:
        torch.cuda.current_stream(device).wait_event(done)
        _ = used  # alive until here
        return result

    return Pending(finish)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _run(steps: Generator[None, None, Result]) -> Result:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def _gather(x: Tensor, group: Group, operation: str) -> Pending[Tensor]:
    if size(group) == 1:
        return Pending(lambda: x[None])
    x = x.contiguous()
    result = x.new_empty(size(group), *x.shape)

    def start() -> list:
        return [_all_gather(result.flatten(), x.flatten(), group=group, async_op=True)]

    return _transfer(operation, group, start, (x,), result)


def _transfer(
    operation: str, group: Group, start: Callable[[], list], sent: tuple[Tensor | None, ...], result: Result
) -> Pending[Result]:
    """`start` begins it, and returns what is to be waited for."""
    works = _naming(operation, group, start)

    def finish() -> Result:
        _naming(operation, group, lambda: [work.wait() for work in works], *sent)
        return result

    return Pending(finish)


def _naming(operation: str, group: Group, step: Callable[[], Result], *tensors: Tensor | None) -> Result:
    """Takes a step of an operation on these tensors; an error says so."""
    try:
        return waits.during(step, message_device(group))
    except RuntimeError as error:
        assert group is not None
        of = "".join(f" {x.dtype} {list(x.shape)}" for x in tensors if x is not None)
        where = f"rank {rank(group)} of group {group.group_desc!r}, ranks {dist.get_process_group_ranks(group)}"
        raise RuntimeError(f"{where} of the world: {operation}{of}: {error}") from error
