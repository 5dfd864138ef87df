"""Packed batches of which every document is cut into units for itself, as Megatron-Core does with its thd format.

`Sequence` cuts the packed stream, whatever its documents. Here unit c is the c-th part of every document, so that D
documents travel like a batch of D sequences, in messages D times as large. A rank holds its units of the first
document, then its units of the second, and so on.
"""

from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import checks
from lasp.kernels.autocast import Function
from lasp.kernels.parked import index_tensor
from lasp.kernels.traced import traced
from lasp.parallel import comm, shapes
from lasp.parallel.agreement import agree
from lasp.parallel.halo import halo
from lasp.parallel.layout import Fragment, Layout, Partition
from lasp.parallel.sequence import Sequence
from lasp.parallel.sequence_parallel import SequenceParallel


class DocumentPartition(Partition):
    """Units of one fragment per document; none is padding."""

    unit_by_unit = False

    @cached_property
    def units(self) -> list[list[Fragment]]:
        """The fragments of every unit, in the order of documents."""
        return [[self._fragment(d, unit) for d in range(self.documents)] for unit in range(self.layout.units)]

    def of(self, rank: int) -> list[Fragment]:
        """A rank's fragments, in its local order: document by document."""
        return [self._fragment(d, unit) for d in range(self.documents) for unit in self.layout.owned(rank)]

    def _fragment(self, document: int, unit: int) -> Fragment:
        start, stop = self.offsets[document : document + 2]
        length = (stop - start) // self.layout.units
        position = unit * length
        first = start + position
        return Fragment(first, first + length, document, position, unit == 0, unit == self.layout.units - 1)


class DocumentSequence(Sequence):
    """One packed batch, cut document by document; local tensors are [1, T_local, ...].

    Args:
        parallel: of more than one unit.
        cu_seqlens: [N + 1] int32 or int64 offsets of the documents, the same on every rank. Empty documents count for
            nothing.

    Raises:
        ValueError: on every rank, for offsets that are none, or documents whose length is not a multiple of the number
            of units.
    """

    def __init__(self, parallel: SequenceParallel, cu_seqlens: Tensor):
        layout = parallel.layout

        def check() -> object:
            checks.tensor("cu_seqlens", cu_seqlens)
            offsets = cu_seqlens.tolist()
            checks.cu_seqlens(cu_seqlens, 1, offsets[-1])
            for start, stop in pairwise(offsets):
                expected = f"a multiple of the {layout.units} units of {parallel.size} ranks"
                checks.require((stop - start) % layout.units == 0, "document length", stop - start, expected)
            return offsets

        agree(parallel.group, check, call="DocumentSequence")
        offsets = sorted(set(cu_seqlens.tolist()))
        super().__init__(parallel, DocumentPartition(layout, parallel.rank, offsets), packed=True)

    @traced(shapes.shard)
    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of x, which has all tokens along `dim`; differentiable."""
        checks.require(x.shape[dim] == self.partition.tokens, "x", f"{x.shape[dim]} tokens", f"{self.partition.tokens}")
        return x.index_select(dim, self._tokens_of(self.parallel.rank, x.device))

    def _unshard(self, local: Tensor, dim: int) -> Tensor:
        return _Unshard.apply(local, self, dim)

    def _rows(self, batch: int) -> tuple[Partition, int]:
        assert batch == 1
        return self._one_document(1), self.partition.documents

    def _tail(self, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        shortest = min(len(fragment) for fragment in self.partition.local)
        expected = f"at least {width - 1}, for a convolution of width {width}"
        checks.require(shortest >= width - 1, "a document's tokens per unit", shortest, expected)
        stops = index_tensor(list(accumulate(map(len, self.partition.local))), x.device)
        ends = stops[:, None] - torch.arange(width - 1, 0, -1, device=x.device)
        units = len(self.partition.owned)
        last = x[0, ends.view(-1)].unflatten(0, (-1, units * (width - 1)))  # [documents, units · (width - 1), D]
        plan = self.parallel.halo_plan(self._one_document(width - 1), width, x.device)
        _, before = halo(last, plan, units, width)
        return x, before.flatten(0, 1)

    def _one_document(self, unit_length: int) -> Partition:
        """Every document's partition, were its units of that length."""
        layout: Layout = self.partition.layout
        return Partition(layout, self.parallel.rank, [0, layout.units * unit_length])

    def _tokens_of(self, rank: int, device: torch.device) -> Tensor:
        """[T_local] where a rank's tokens stand in the batch."""
        return torch.cat([torch.arange(f.start, f.stop, device=device) for f in self.partition.of(rank)])


class _Unshard(Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sequence: DocumentSequence, dim: int) -> Tensor:
        ctx.sequence, ctx.dim = sequence, dim
        rows = comm.replicate(local.movedim(dim, 0), sequence.parallel.group).flatten(0, 1)
        places = torch.cat([sequence._tokens_of(rank, local.device) for rank in range(sequence.parallel.size)])
        return torch.empty_like(rows).index_copy(0, places, rows).movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        return ctx.sequence.shard(d, ctx.dim), None, None
