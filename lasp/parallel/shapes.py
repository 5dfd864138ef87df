"""Empty tensors like what the operations of a `Sequence` return, for graphs (lasp.kernels.traced): their arguments by
name, of which `self` stands for the sequence."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lasp.kernels.dtypes import accumulation_dtype
from lasp.kernels.linear import like_results
from lasp.kernels.log_linear import with_slots
from lasp.kernels.traced import real

if TYPE_CHECKING:
    from lasp.parallel.sequence import Sequence


def positions(self: Any) -> list[Tensor]:
    sequence: Sequence = real(self)
    return [torch.empty(sequence.partition.local_tokens, dtype=torch.long, device=sequence.parallel.device)]


def valid(self: Any) -> list[Tensor]:
    return [x.bool() for x in positions(self)]


def shard(self: Any, x: Tensor, dim: int) -> list[Tensor]:
    return _with_tokens(x, dim, real(self).partition.local_tokens)


def unshard(self: Any, local: Tensor, dim: int) -> list[Tensor]:
    return _with_tokens(local, dim, real(self).partition.tokens)


def recurrence(self: Any, k: Tensor, v: Tensor, output_final_state: bool, **others: object) -> list[Tensor]:
    return like_results(v, k.shape[-1], _states(self, v.shape[0]) if output_final_state else None)


def product(**given: Any) -> list[Tensor]:
    return recurrence(**given | {"v": given["v"].select(2, 0)})


def log_linear(**given: Any) -> list[Tensor]:
    return with_slots(recurrence(**given))


def mean(loss_sum: Tensor, **others: object) -> list[Tensor]:
    return [loss_sum.new_empty((), dtype=accumulation_dtype(loss_sum))]


def _states(self: Any, batch: int) -> int | torch.SymInt:
    """How many there are; in packed batches, which differ in it, that is not known."""
    sequence: Sequence = real(self)
    return torch.library.get_ctx().new_dynamic_size() if sequence.packed else sequence._states(batch)


def _with_tokens(x: Tensor, dim: int, tokens: int) -> list[Tensor]:
    shape = list(x.shape)
    shape[dim] = tokens
    return [x.new_empty(shape)]
