"""What the segments of a stream hand on to each other, and the gradients that go the other way (math §7).

States and tails are kept as each segment was entered with them, keys and values once for all segments. A segment that
is computed again with a graph takes the first as leaves: backward then starts from its loss and from what it hands on,
with the gradients of the leaves of the next one. Gradients of keys and values are summed by their store.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from lasp.kernels.keys import KeyStore
from lasp.kernels.parked import Parked, fetch_ahead
from lasp.models.past import OpsWithPast, Past, Slots

Gradients = dict[int, list[Tensor | None]]  # of what a segment was entered with, by layer and slot
Stores = defaultdict[tuple[int, int], KeyStore]  # by layer and op


class Carried:
    """For one pass over the segments of a stream, forward, and one back. on_host: it waits in the host's memory."""

    def __init__(self, on_host: bool = False):
        self.on_host = on_host
        self.stores: Stores = defaultdict(lambda: KeyStore(on_host))
        self._entered: list[dict[int, list[Parked | None]]] = [{}]

    def keep(self, past: "SegmentPast") -> None:
        """What the last segment so far leaves is what the next one is entered with."""
        kept = {
            layer: [None if x is None else Parked(x, self.on_host) for x in slots]
            for layer, slots in past.slots.items()
        }
        self._entered.append(kept)

    def forget_before(self, segment: int) -> None:
        """Nobody will go back, and the segments to come see no keys of those before this one."""
        del self._entered[:-1]
        for store in self.stores.values():
            store.forget_before(segment)

    def forward(self) -> "SegmentPast":
        """For the segment after those kept so far, without gradients."""
        ((_, tensors),) = fetch_ahead([(None, _flat(self._entered[-1]))])
        return SegmentPast(self._slots(-1, tensors), self.stores)

    def backward(self) -> Iterator["SegmentPast"]:
        """For all segments, from the last to the first, with gradients; what is behind is forgotten."""
        numbers = reversed(range(len(self._entered)))
        for number, tensors in fetch_ahead((number, _flat(self._entered[number])) for number in numbers):
            yield SegmentPast(self._slots(number, [x.detach().requires_grad_() for x in tensors]), self.stores)
            del self._entered[number]

    def _slots(self, number: int, tensors: Iterable[Tensor]) -> dict[int, Slots]:
        rest = iter(tensors)
        return {
            layer: [None if parked is None else next(rest) for parked in slots]
            for layer, slots in self._entered[number].items()
        }


def _flat(slots: dict[int, list[Parked | None]]) -> list[Parked]:
    return [parked for of_layer in slots.values() for parked in of_layer if parked is not None]


class SegmentPast(Past):
    """The past of one segment.

    slots: of an op with a state the state [B, H, K, V], of a convolution the tail [B, width - 1, D]; None where no
    document goes on from the segment before, and for softmax attention, which has its store.
    """

    def __init__(self, slots: dict[int, Slots], stores: Stores):
        super().__init__()
        self.slots, self.stores = slots, stores
        self.entered = {layer: list(of_layer) for layer, of_layer in slots.items()}

    def attacher(self, index: int) -> Callable[[Any, Slots], "SegmentOps"]:
        return lambda seq, slots: SegmentOps(seq, slots, lambda op: self.stores[index, op])

    def advance(self, seq: Any) -> None:
        """The stream knows where its segments stand."""

    def handed_on(self, gradients: Gradients) -> tuple[list[Tensor], list[Tensor]]:
        """What the segment hands on, and its gradients, given those of what the next one was entered with."""
        pairs = [
            (x, d)
            for layer, of_layer in gradients.items()
            for x, d in zip(self.slots[layer], of_layer, strict=True)
            if d is not None and x.requires_grad
        ]
        return [x for x, _ in pairs], [d for _, d in pairs]

    def gradients(self) -> Gradients:
        """After backward: of what the segment was entered with."""
        return {layer: [None if x is None else x.grad for x in slots] for layer, slots in self.entered.items()}


class SegmentOps(OpsWithPast):
    """The ops of a segment, as `lasp.parallel` makes it, in one call of one layer.

    store: what keeps the keys of the layer's op with that number.
    """

    def __init__(self, seq: Any, slots: Slots, store: Callable[[int], KeyStore]):
        super().__init__(slots, seq.linear_attention, seq.delta_rule)
        self.positions, self.valid = seq.positions, seq.valid
        self._seq, self._store = seq, store

    def sum(self, x: Tensor) -> Tensor:
        return self._seq.sum(x)

    def _continuing(self, state: Tensor | None) -> dict[str, Any]:
        return {"initial_state": state, "output_final_state": self._seq.continues}

    def softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        store = self._store(self._next)
        return self._step(lambda _: (self._seq.softmax_attention(q, k, v, scale=scale, keys=store), None))

    def causal_conv1d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._step(lambda tail: self._seq.convolve(x, weight, bias, tail))
