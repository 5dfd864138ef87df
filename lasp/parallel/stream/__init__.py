"""A sequence as a stream of segments, each of which is split over all ranks and goes on from the one before (math §7).

`Stream` is one batch: where segments begin, and which documents they cut. A `Segment` is the `Sequence` of one of them:
its operations take what came before, and give what it hands on. Whoever calls them keeps that in between, and in
backward, which goes from the last segment to the first, its gradient.
"""

from bisect import bisect_right
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import autocast, checks
from lasp.kernels.conv import check_conv, check_parts, convolve
from lasp.kernels.keys import KeyStore
from lasp.kernels.lasting import lasting
from lasp.kernels.parts import Parts, undivided, whole
from lasp.kernels.recurrence import Alone, Boundary
from lasp.kernels.softmax import Mask
from lasp.kernels.traced import apart
from lasp.parallel.agreement import agree, gradients, signature
from lasp.parallel.boundary import AcrossUnits
from lasp.parallel.layout import Partition
from lasp.parallel.sequence import Across, Sequence
from lasp.parallel.sequence_parallel import SequenceParallel
from lasp.parallel.softmax import Before
from lasp.parallel.stream import tails
from lasp.parallel.stream.states import CarriedAcrossUnits, CarriedAlone
from lasp.parallel.stream.tails import TailPlan


class Stream:
    """Sequences of `tokens` tokens, the same on every rank, in segments. Immutable.

    Args:
        parallel: how each segment is split.
        tokens: any number of at least 1.
        segment_tokens: of every segment but the last, which may be shorter; over all ranks.
        cu_seqlens: [N + 1] offsets of packed documents, as `SequenceParallel.sequence` takes them. Segments may cut
            them anywhere.

    Collective. Raises ValueError on every rank, if the arguments do not fit or differ between ranks.
    """

    def __init__(
        self, parallel: SequenceParallel, tokens: int, segment_tokens: int, cu_seqlens: Tensor | None = None
    ) -> None:
        units = parallel.layout.units

        def check() -> dict:
            for name, value in (("tokens", tokens), ("segment_tokens", segment_tokens)):
                checks.number(name, value, Integral, "at least 1")
                checks.require(value >= 1, name, value, "at least 1")
            expected = f"at least {units}, a token for each unit of layout {parallel.layout.name!r}"
            checks.require(segment_tokens >= units, "segment_tokens", segment_tokens, expected)
            checks.cu_seqlens(cu_seqlens, 1, tokens)
            offsets = None if cu_seqlens is None else cu_seqlens.tolist()
            return {"tokens": int(tokens), "segment_tokens": int(segment_tokens), "cu_seqlens": offsets}

        agree(parallel.group, check, call="Stream")
        self.parallel, self.tokens, self.segment_tokens = parallel, tokens, segment_tokens
        self.packed = cu_seqlens is not None
        edges = {0, tokens} if cu_seqlens is None else set(cu_seqlens.tolist())
        documents = sorted(edges)
        self.partitions = [self._partition(start, documents) for start in range(0, tokens, segment_tokens)]
        self.continues = [stop not in edges for _, stop in self.ranges]

    def __len__(self) -> int:
        return len(self.partitions)

    def __getitem__(self, number: int) -> "Segment":
        """The segment, made anew, so that what it caches goes with it."""
        return Segment(self, range(len(self))[number])

    def __iter__(self) -> Iterator["Segment"]:
        return (self[number] for number in range(len(self)))

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Where segments start and stop."""
        starts = range(0, self.tokens, self.segment_tokens)
        return [(start, min(start + self.segment_tokens, self.tokens)) for start in starts]

    @property
    def local_ranges(self) -> list[list[tuple[int, int]]]:
        """Of every segment the positions start, stop of this rank's units, which may lie behind it (padding)."""
        return [
            [(begin + start, begin + stop) for start, stop in partition.ranges]
            for (begin, _), partition in zip(self.ranges, self.partitions, strict=True)
        ]

    def shard(self, x: Tensor, dim: int = 1) -> list[Tensor]:
        """This rank's part of every segment of x, which has `tokens` elements along `dim`."""
        checks.require(x.shape[dim] == self.tokens, "x", f"{x.shape[dim]} tokens", f"{self.tokens}")
        return [self[i].shard(x.narrow(dim, start, stop - start), dim) for i, (start, stop) in enumerate(self.ranges)]

    def _partition(self, start: int, documents: list[int]) -> Partition:
        stop = min(start + self.segment_tokens, self.tokens)
        first, last = bisect_right(documents, start), bisect_right(documents, stop - 1)
        offsets = [0, *(edge - start for edge in documents[first:last]), stop - start]
        past, parallel = start - documents[first - 1], self.parallel
        return Partition(parallel.layout, parallel.rank, offsets, parallel.aligned, past=past)


class Segment(Sequence):
    """One of a stream. Local tensors are those of `Sequence`, but states are [B, H, K, V]: the initial one is that of
    the first document, the final one that of the last; tails likewise [B, width - 1, D].

    past: how many tokens of its first document came before; first: the number of the segment in which it began.
    continues: whether the last document does in the next segment.
    """

    def __init__(self, stream: Stream, number: int):
        super().__init__(stream.parallel, stream.partitions[number], stream.packed)
        self.stream, self.number = stream, number
        self.past, self.continues = self.partition.past, stream.continues[number]
        self.first = self._seen(None).start
        self._identity += f", segment {number} after {self.past} tokens" + ", goes on" * self.continues
        self._tails: dict[int, TailPlan] = {}

    @apart
    def softmax_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True,
        window: int | None = None, keys: KeyStore | None = None,
    ) -> Tensor:  # fmt: skip
        """As in `Sequence`, causal, over all that the first document had before, too.

        keys: what earlier segments left in this layer, and where this one leaves its own; one for all segments.
        """
        q, k, v = autocast.cast(q, k, v)
        goes_on = self.past > 0 or self.continues

        def check() -> dict:
            checks.require(causal, "causal", causal, "True in a segment: it knows no tokens that follow")
            checks.require(keys is not None or not goes_on, "keys", None, "a KeyStore: a document goes on")
            facts = self._check_softmax(q, k, v, scale, causal, window)
            if keys is not None:
                missing = [number for number in self._seen(window) if number not in keys]
                expected = "what all segments left that are seen"
                checks.require(not missing, "keys", f"nothing of segments {missing}", expected)
            return facts

        agreed = self._agree("softmax_attention", check)
        recurring = self.stream.partitions[0].unit_length if self.packed else 1
        mask = Mask(checks.softmax_scale(scale, q.shape[-1]), True, window, recurring=recurring)
        before = None
        if keys is not None and goes_on:
            before = Before(keys, self.number, self.continues, self._seen(window), self.stream.partitions)
        return agreed.in_backward(self.parallel.softmax.attend(q, k, v, mask, self.partition, before))

    @apart
    def causal_conv1d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As in `Sequence`, where no document goes on from before."""
        return self.convolve(x, weight, bias)[0]

    @apart
    def short_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts) -> tuple[Tensor, ...]:
        """As in `Sequence`, where no document goes on from before."""
        return self.convolve(x, weight, bias, parts=parts)[0]

    @apart
    def convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        initial_tail: Tensor | None = None,
        parts: Parts | None = None,
    ) -> tuple[Any, Tensor | None]:
        """`causal_conv1d`, or with parts `short_conv`, that goes on from a tail: its result, and the tail for the next
        segment, if any.

        initial_tail: [B, width - 1, D], what the segment before returned; None if no document goes on from there.
        """

        def tail_shape() -> tuple[int, ...]:
            return x.shape[0], weight.shape[1] - 1, x.shape[-1]

        def check() -> dict:
            check_conv(x, weight, bias)
            if parts is not None:
                check_parts(x, parts)
            self._check_tokens(x)
            self._require_past("initial_tail", initial_tail)
            if initial_tail is not None:
                checks.tensor("initial_tail", initial_tail)
                checks.shape("initial_tail", initial_tail, tail_shape(), "[B, width - 1, D]")
            facts = signature(x=x, weight=weight, bias=bias, initial_tail=initial_tail)
            return facts | gradients(x) | gradients(initial_tail, of="initial_tail")

        agreed = self._agree("causal_conv1d" if parts is None else "short_conv", check)
        local, width, group = self._local(x.shape[0]), weight.shape[1], self.parallel.group
        tail, entering, again = None, None, None
        last = x.new_zeros(tail_shape()) if self.continues else None
        if width > 1:
            plan = self._tail_plan(width, x.device)
            if initial_tail is not None:
                entering, again = tails.enter(initial_tail.to(x.dtype), plan, group)
            if self.continues:
                x, last = tails.leave(x, again, plan, group)
            x, tail = self._tail(x, width)
            if entering is not None:
                rows = tail.unflatten(0, (x.shape[0], -1))
                tail = rows.index_add(1, plan.first, entering).flatten(0, 1)
            agreed.in_backward(tail)
        silu, how = parts is not None, parts or undivided(x)
        results = tuple(local.unfold(y) for y in convolve(local.fold(x), weight, bias, tail, local.segments, silu, how))
        return whole(results) if parts is None else results, last

    def _boundary(self, batch: int, across: Across) -> Boundary:
        checks.require(across is AcrossUnits, "causal", False, "True in a segment: it knows no tokens that follow")
        return super()._boundary(batch, CarriedAcrossUnits)

    def _alone(self) -> Boundary | None:
        if self.partition.layout.units > 1:
            return None
        return CarriedAlone(self.partition) if self.packed else Alone()

    def _documents_with_states(self) -> tuple[list[int], list[int]]:
        return [0], [self.partition.documents - 1]

    def _require_past(self, name: str, past: object | None) -> None:
        expected = f"what the segment before left: {self.past} tokens came before"
        checks.require(past is not None or self.past == 0, name, None, expected)

    def _seen(self, window: int | None) -> range:
        """The earlier segments of which something may be seen."""
        back = self.past if window is None else min(self.past, window - 1)
        start = self.number * self.stream.segment_tokens - back
        return range(start // self.stream.segment_tokens, self.number)

    @lasting
    def _tail_plan(self, width: int, device: torch.device) -> TailPlan:
        if width not in self._tails:
            self._tails[width] = TailPlan.of(self.partition, width, device)
        return self._tails[width]


__all__ = ["Segment", "Stream"]
