"""Counts the bytes that a rank sends, whatever calls torch.distributed, in forward or backward."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Within it, `sent` adds up the bytes of collectives over all of the world's ranks.

    Who gathers sends to every other rank; what stays on a rank does not count, nor do integers, with which ranks agree
    on what they are about to do. Memory that peers read is not seen. Use it under
    `torch.compiler.set_stance("force_eager")`: what PyTorch is to compile and meets under a dispatch mode, it leaves
    uncompiled from then on, for every shape that it has not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self.sent += _sent(func._opname, args)
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: tuple) -> int:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if name == "alltoall_base_":
        size, rows = _bytes([args[1]]), args[4]
        stays = rows[rank] / max(sum(rows), 1) if rows else 1 / ranks
        return round(size * (1 - stays))
    if name == "_allgather_base_":
        return _bytes([args[1]]) * (ranks - 1)
    if name == "allreduce_":
        return 2 * _bytes(args[0]) * (ranks - 1) // ranks
    if name == "send":
        return _bytes(args[0])
    if name in ("recv_", "barrier"):
        return 0
    raise NotImplementedError(f"the bytes of c10d::{name}")


def _bytes(tensors: list[Tensor]) -> int:
    return sum(x.nbytes for x in tensors if x.is_floating_point())
