"""What came before the tokens at hand: the one notion of it that generation and segments of a stream share.

Each op of a layer has a slot, in the order in which the layer calls them. It finds there what it goes on from (nothing,
at first), and leaves there what goes on from it: the state of linear attention or the delta rule (its slots, of the
log-linear ones), the last inputs of a convolution, keys and values. Gradients flow through it, or are carried by hand
(`lasp.models.carried`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lasp.models.sequence import SupportsSum

Layer = Callable[[Tensor, Any], Any]
Slots = list[Any]


class Past(ABC):
    """What came before, for all layers. slots: slots[layer][i] is the i-th op's."""

    def __init__(self) -> None:
        self.slots: dict[int, Slots] = {}

    def bind(self, layer: Layer, index: int) -> Layer:
        """The layer with that index, called as it is; its ops go on from their slots, and leave theirs there.

        When called again, to recompute activations, its ops begin where they began, and leave nothing.
        """
        before, attach = tuple(self.slots.get(index, ())), self.attacher(index)

        def call(x: Tensor, seq: Any) -> Any:
            slots = list(before)
            if not again:
                self.slots[index] = slots
                again.append(True)
            return layer(x, attach(seq, slots))

        again: list[bool] = []
        return call

    @abstractmethod
    def attacher(self, index: int) -> Callable[[Any, Slots], Any]:
        """What makes, of the batch's `seq`, the `seq` of one call of the layer, whose ops use these slots."""

    def whole(self, seq: Any) -> SupportsSum:
        """What sums over the whole sequence, of which `seq` may be a part."""
        return seq

    @abstractmethod
    def advance(self, seq: Any) -> None:
        """All layers have seen the tokens of `seq`."""


class OpsWithPast(ABC):
    """The ops of one call of one layer, each with its slot.

    ops: `lasp.kernels`, or a sequence, whose functions of states these are.
    """

    def __init__(self, slots: Slots, ops: Any):
        self._slots, self._next, self._ops = slots, 0, ops

    def linear_attention(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, *, scale: float | None = None
    ) -> tuple[Tensor, None]:
        def op(state):
            return self._ops.linear_attention(q, k, v, decay, scale=scale, **self._continuing(state))

        return self._step(op), None

    def delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None = None, *, scale: float | None = None
    ) -> tuple[Tensor, None]:
        def op(state):
            return self._ops.delta_rule(q, k, v, beta, decay, scale=scale, **self._continuing(state))

        return self._step(op), None

    def delta_product(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None = None, *, scale: float | None = None
    ) -> tuple[Tensor, None]:
        def op(state):
            return self._ops.delta_product(q, k, v, beta, decay, scale=scale, **self._continuing(state))

        return self._step(op), None

    def log_linear_attention(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, level_scales: Tensor, *, scale: float | None = None
    ) -> tuple[Tensor, None]:
        x = {"q": q, "k": k, "v": v, "decay": decay, "level_scales": level_scales}
        return self._step(lambda past: self._go_on(past, x, scale)), None

    def log_linear_delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, level_scales: Tensor, *,
        scale: float | None = None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        x = {"q": q, "k": k, "v": v, "beta": beta, "decay": decay, "level_scales": level_scales}
        return self._step(lambda past: self._go_on(past, x, scale)), None

    @abstractmethod
    def _go_on(self, past: Any, tensors: Mapping[str, Tensor | None], scale: float | None) -> tuple[Tensor, Any]:
        """Log-linear attention, or with a beta the delta rule, and the past for the next call."""

    @abstractmethod
    def _continuing(self, state: Tensor | None) -> dict[str, Any]:
        """The arguments by which an op goes on from a state and gives the next one."""

    def _step(self, op: Callable[[Any], tuple[Any, Any]]) -> Any:
        """Runs op(past) -> (output, past for the next call) on the layer's next slot; the first past is None."""
        if self._next == len(self._slots):
            self._slots.append(None)
        output, self._slots[self._next] = op(self._slots[self._next])
        self._next += 1
        return output
