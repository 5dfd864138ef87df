"""What linear attention without gates or with scalar ones asks of its kernels (see scalar.op).

Two answer: `portable` everywhere, `hopper.scalar` for the commonest heads on Hopper. Which, is chosen once a call.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.shared.state_passing import InitialStates

Saved = tuple[Tensor | None, ...]  # what a backend keeps of the gates


class QueryGrads(NamedTuple):
    """dq [B, T, H, K] for every value head, or [B, T, H / 2, K] of pairs of neighbours, and the decay's gradient, if it
    is learned."""

    dq: Tensor
    d_decay: Tensor | None


class KeyValueGrads(NamedTuple):
    """dk (as dq), dv [B, T, H, V] and, if the decay is learned, what `query_grads` needs to know for its gradient."""

    dk: Tensor
    dv: Tensor
    known: Any


class Backend(Protocol):
    """The steps of one call. The scale and the launches are the backend's own."""

    @property
    def tiles(self) -> Tiles: ...

    def tile_states(self, k: Tensor, v: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor | None, Saved]:
        """S [M, H, K, V] and log A [M, H] of every tile in fp32, and what the other steps read of the gates."""

    def tile_states_grad(self, q: Tensor, do: Tensor, saved: Saved) -> Tensor:
        """D [M, H, K, V] of every tile."""

    def outputs(self, x: LinearInputs, saved: Saved, initial: InitialStates) -> Tensor:
        """o [B, T, H, V], given the states that the tiles start from."""

    def key_value_grads(self, x: LinearInputs, do: Tensor, saved: Saved, d_final: InitialStates) -> KeyValueGrads:
        """A reverse scan, given the gradients of the states that the tiles end with."""

    def query_grads(
        self, x: LinearInputs, do: Tensor, saved: Saved, initial: InitialStates, known: Any = None
    ) -> QueryGrads:
        """A forward scan, after the reverse one if the decay is learned."""
