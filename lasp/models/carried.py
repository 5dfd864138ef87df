"""What the segments of a stream hand on to each other, and the gradients that go the other way (math §7).

States and tails are kept as each segment was entered with them, keys and values once for all segments. A segment that
is computed again with a graph takes the first as leaves: backward then starts from its loss and from what it hands on,
with the gradients of the leaves of the next one. Gradients of keys and values are summed by their store.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from lasp.kernels.keys import KeyStore
from lasp.kernels.parked import Parked, fetch_ahead
from lasp.kernels.parts import Parts
from lasp.models.past import OpsWithPast, Past, Slots

Gradients = list[Tensor | None]  # of the tensors that a segment was entered with
Stores = defaultdict[tuple[int, int], KeyStore]  # by layer and op


class Carried:
    """For one pass over the segments of a stream, forward, and one back. on_host: it waits in the host's memory."""

    def __init__(self, on_host: bool = False):
        self.on_host = on_host
        self.stores: Stores = defaultdict(lambda: KeyStore(on_host))
        self._entered: list[tuple[list[Any], TreeSpec]] = [tree_flatten({})]
        self._graphs: list[SegmentPast] = []
        self._summed: set[int] = set()
        self._total: Tensor | int = 0

    def keep(self, past: "SegmentPast") -> None:
        """What the last segment so far leaves is what the next one is entered with."""
        left, spec = tree_flatten(past.slots)
        self._entered.append(([Parked(x, self.on_host) if isinstance(x, Tensor) else x for x in left], spec))

    def forget_before(self, segment: int) -> None:
        """Nobody will go back, and the segments to come see no keys of those before this one."""
        del self._entered[:-1]
        for store in self.stores.values():
            store.forget_before(segment)

    def add_up(self, number: int, sum_of_segment: Callable[[], Tensor]) -> Tensor:
        """The sum over the segments so far; over all of them, when one is computed again. Each counts once."""
        if number not in self._summed:
            self._summed.add(number)
            self._total = self._total + sum_of_segment()
        return torch.as_tensor(self._total)

    def forward(self, with_graph: bool = False) -> "SegmentPast":
        """For the segment after those kept so far. with_graph: with gradients; so are all that follow, then."""
        past = next(self._fetch([len(self._entered) - 1]))
        if with_graph:
            self._graphs.append(past.with_gradients())
        return past

    def backward(self) -> Iterator["SegmentPast"]:
        """For all segments, from the last to the first, with gradients; what is behind is forgotten."""
        while self._graphs:
            yield self._graphs.pop()
            del self._entered[-1]
        for past in self._fetch(range(len(self._entered) - 1, -1, -1)):
            yield past.with_gradients()
            del self._entered[-1]

    def _fetch(self, numbers: Iterable[int]) -> Iterator["SegmentPast"]:
        for number, fetched in fetch_ahead((number, self._parked(number)) for number in numbers):
            (left, spec), tensors = self._entered[number], iter(fetched)
            entered = [next(tensors).detach() if isinstance(x, Parked) else x for x in left]
            yield SegmentPast(entered, spec, self, number)

    def _parked(self, number: int) -> list[Parked]:
        return [x for x in self._entered[number][0] if isinstance(x, Parked)]


class SegmentPast(Past):
    """The past of one segment.

    slots: of an op with a state the state, [B, H, K, V] each tensor, of a convolution the tail [B, width - 1, D]; None
    where no document goes on from the segment before, and for softmax attention, which has its store.
    entered: what was in them at first, in a row.
    """

    def __init__(self, entered: list[Any], spec: TreeSpec, carried: Carried, number: int):
        super().__init__()
        self.entered, self.slots = entered, tree_unflatten(entered, spec)
        self._carried, self._number = carried, number

    def with_gradients(self) -> "SegmentPast":
        """Itself, to be differentiated in what the segment is entered with."""
        for x in self.entered:
            if isinstance(x, Tensor) and x.is_floating_point():
                x.requires_grad_()
        return self

    def attacher(self, index: int) -> Callable[[Any, Slots], "SegmentOps"]:
        return lambda seq, slots: SegmentOps(seq, slots, lambda op: self._carried.stores[index, op])

    def whole(self, seq: Any) -> "Summing":
        return Summing(self._carried, self._number, seq)

    def advance(self, seq: Any) -> None:
        """The stream knows where its segments stand."""

    def handed_on(self, gradients: Gradients) -> tuple[list[Tensor], list[Tensor]]:
        """What the segment hands on, and its gradients, given those of what the next one was entered with."""
        left = tree_leaves(self.slots) if gradients else []
        pairs = [(x, d) for x, d in zip(left, gradients, strict=True) if d is not None and x.requires_grad]
        return [x for x, _ in pairs], [d for _, d in pairs]

    def gradients(self) -> Gradients:
        """After backward: of what the segment was entered with."""
        return [x.grad if isinstance(x, Tensor) else None for x in self.entered]


class Summing(NamedTuple):
    """Over all segments, once all have been computed; without messages, if this one is computed again."""

    carried: Carried
    number: int
    seq: Any

    def sum(self, x: Tensor) -> Tensor:
        return self.carried.add_up(self.number, lambda: self.seq.sum(x))


class SegmentOps(OpsWithPast):
    """The ops of a segment, as `lasp.parallel` makes it, in one call of one layer.

    store: what keeps the keys of the layer's op with that number.
    """

    def __init__(self, seq: Any, slots: Slots, store: Callable[[int], KeyStore]):
        super().__init__(slots, seq)
        self.positions, self.valid = seq.positions, seq.valid
        self._seq, self._store = seq, store

    def sum(self, x: Tensor) -> Tensor:
        return self._seq.sum(x)

    def _go_on(self, past: Any, tensors: Mapping[str, Tensor | None], scale: float | None) -> tuple[Tensor, Any]:
        op = self._seq.log_linear_delta_rule if "beta" in tensors else self._seq.log_linear_attention
        return op(**tensors, scale=scale, **self._continuing(past))

    def _continuing(self, state: Any) -> dict[str, Any]:
        return {"initial_state": state, "output_final_state": self._seq.continues}

    def softmax_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        store = self._store(self._next)
        attention = partial(self._seq.softmax_attention, q, k, v, scale=scale, window=window, keys=store)
        return self._step(lambda _: (attention(), None))

    def causal_conv1d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._step(lambda tail: self._seq.convolve(x, weight, bias, tail))

    def short_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts) -> tuple[Tensor, ...]:
        return self._step(lambda tail: self._seq.convolve(x, weight, bias, tail, parts))
