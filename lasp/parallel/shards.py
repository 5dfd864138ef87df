"""A rank's part of a sequence: of a whole tensor, and the whole of all parts; what its tokens are. And of DTensors."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lasp.kernels.autocast import Function
from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.layout import PADDING, Partition


def positions(partition: Partition, device: torch.device) -> Tensor:
    """[T_local] int64: each token's position within its document; 0 for padding."""
    starts = [(f.position, f.position + len(f), f.document != PADDING) for f in partition.local]
    return torch.cat([torch.arange(start, stop, device=device) * real for start, stop, real in starts])


def valid(partition: Partition, device: torch.device) -> Tensor:
    """[T_local] bool: False for padding."""
    return torch.cat([torch.full((len(f),), f.document != PADDING, device=device) for f in partition.local])


def part_of(x: Tensor, partition: Partition, dim: int) -> Tensor:
    """This rank's units of x, which may end before the last of them; padded with zeros."""
    parts = []
    for start, stop in partition.ranges:
        start, end = min(start, x.shape[dim]), min(stop, x.shape[dim])
        parts.append(x.narrow(dim, start, end - start))
    missing = partition.local_tokens - sum(part.shape[dim] for part in parts)
    if missing:
        shape = list(x.shape)
        shape[dim] = missing
        parts.append(x.new_zeros(shape))
    return torch.cat(parts, dim)


def local_part(x: Tensor) -> Tensor:
    """What of a DTensor lies on this rank; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


class Unshard(Function):
    """The whole on every rank, without padding; its gradient must be equal on all of them."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, partition: Partition, group: Group, dim: int) -> Tensor:
        ctx.partition, ctx.dim = partition, dim
        units = comm.replicate(local.movedim(dim, 0), group).flatten(0, 1)
        units = units.unflatten(0, (partition.layout.units, partition.unit_length))[partition.layout.rank_order]
        return units.flatten(0, 1)[: partition.tokens].movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None, None]:
        return part_of(d, ctx.partition, ctx.dim), None, None, None
