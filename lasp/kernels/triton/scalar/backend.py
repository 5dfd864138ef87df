"""What linear attention without gates or with scalar ones asks of its kernels (see scalar.op).

Two answer: `portable` everywhere, `hopper.scalar` for the commonest heads on Hopper. Which, is chosen once a call.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.shared.state_passing import InitialStates

Saved = tuple[Tensor | None, ...]  # what a backend keeps of the gates


class QueryGrads(NamedTuple):
    """dq [B, T, H, K] for every value head; with a learned gate also q · dq [blocks, B, T, H] in partial sums."""

    dq: Tensor
    q_dq: Tensor | None


class KeyValueGrads(NamedTuple):
    """dk, dv [B, T, H, K or V]; with a learned gate also v · dv [blocks, B, T, H] and <X, dX> at the tiles' ends
    [blocks, M, H], in partial sums."""

    dk: Tensor
    dv: Tensor
    v_dv: Tensor | None
    at_end: Tensor | None


class Backend(Protocol):
    """The steps of one call. The scale and the launches are the backend's own."""

    @property
    def tiles(self) -> Tiles: ...

    def tile_states(self, k: Tensor, v: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor | None, Saved]:
        """S [M, H, K, V] and log A [M, H] of every tile in fp32, and what the other steps read of the gates."""

    def tile_states_grad(self, q: Tensor, do: Tensor, saved: Saved) -> Tensor:
        """D [M, H, K, V] of every tile."""

    def outputs(self, q: Tensor, k: Tensor, v: Tensor, saved: Saved, initial: InitialStates) -> Tensor:
        """o [B, T, H, V], given the states that the tiles start from."""

    def query_grads(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, saved: Saved, initial: InitialStates, ends: Tensor | None
    ) -> QueryGrads:
        """A forward scan. `ends` [M, H, K, V] asks for what a gate's gradient needs: it is filled with the states at
        the tiles' ends."""

    def key_value_grads(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, saved: Saved, d_final: InitialStates, ends: Tensor | None
    ) -> KeyValueGrads:
        """A reverse scan, given the gradients of the states that the tiles end with."""
