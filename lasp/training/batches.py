"""What a rank reads of the contexts of a step: its units of each, in a batch or segment by segment."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lasp.data import Context, Joined, labelled_places, local_batch
from lasp.kernels.parked import to_device
from lasp.parallel import Sequence, SequenceParallel, Stream
from lasp.parallel.agreement import agree
from lasp.training.runtime import World
from lasp.training.streaming import Segments, StreamedBatch

Split = TypeVar("Split")
Read = TypeVar("Read")


@dataclass(frozen=True)
class Batch:
    """One context as a rank sees it: tokens and labels of its own units, int64 [B, T_local], and what links them.

    A context of equally long documents is a batch of them, B = 1 otherwise. scored: int64 [N], which of the labels,
    flattened, are not -100, if those are fewer than half.
    """

    tokens: Tensor
    labels: Tensor
    seq: Sequence

    @classmethod
    def read(cls, context: Context, seq: Sequence) -> "Batch":
        """Of a context, of which this rank reads its own units alone; all of it if it is a batch of rows."""
        if (length := context.row_length) is None:
            return cls(*local_batch(context, seq.partition.ranges), seq)
        tokens, labels = context.tokens(0, context.length), context.labels(0, context.length)
        return cls(seq.shard(tokens.view(-1, length)), seq.shard(labels.view(-1, length)), seq)

    @cached_property
    def scored(self) -> Tensor | None:
        return labelled_places(self.labels)

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """What the model takes, on its device."""
        scored = None if self.scored is None else to_device(self.scored, device)
        tokens, labels = to_device(self.tokens, device), to_device(self.labels, device)
        return {"tokens": tokens, "seq": self.seq, "labels": labels, "scored": scored}


def share(contexts: list[Context], world: World) -> list[Context]:
    """The contexts of this rank's data-parallel group."""
    group, groups = world.mesh["dp"].get_local_rank(), world.mesh["dp"].size()
    return contexts[group::groups]


def join(contexts: list[Context], at_once: int) -> list[Context]:
    """So many of the contexts as one each; the last one of fewer."""
    if at_once == 1:
        return contexts
    return [Joined(contexts[first : first + at_once]) for first in range(0, len(contexts), at_once)]


def read_batches(contexts: list[Context], sp: SequenceParallel, world: World) -> list[Batch]:
    """This rank's units of some contexts, the same ones on all ranks of its group; on the CPU.

    Raises ValueError on every rank if one of them reads a token that is not in the vocabulary.
    """

    def split(context: Context) -> Sequence:
        if context.row_length is not None:
            return sp.agreed_sequence(context.row_length)
        return sp.agreed_sequence(context.length, context.cu_seqlens)

    return _read([split(context) for context in contexts], contexts, Batch.read, world)


def read_streams(
    contexts: list[Context], sp: SequenceParallel, world: World, segments: Segments
) -> list[StreamedBatch]:
    """The same, segment by segment."""
    streams = [Stream(sp, context.length, segments.tokens, context.cu_seqlens) for context in contexts]
    read = partial(StreamedBatch.read, on_host=segments.on_host, graphs=segments.graphs)
    return _read(streams, contexts, read, world)


def _read(
    splits: list[Split], contexts: list[Context], read: Callable[[Context, Split], Read], world: World
) -> list[Read]:
    batches: list[Read] = []

    def read_all() -> None:
        batches.extend(read(context, split) for context, split in zip(contexts, splits, strict=True))

    agree(world.hosts, read_all)
    return batches
