"""What linear attention without gates or with scalar ones asks of its kernels (see scalar.op).

Three answer: `portable` everywhere, `chunkwise` for large heads in half precision, `hopper.scalar` for the commonest
ones on Hopper. Which, is chosen once a call.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.shared.state_passing import InitialStates

Saved = tuple[Tensor | None, ...]  # what a backend keeps of the gates


class Grads(NamedTuple):
    """dq and dk [B, T, h, K], h the q/k heads, the value heads, or pairs of these; dv [B, T, H, V] and the decay's."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    d_decay: Tensor


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

    def query_grads(self, x: LinearInputs, do: Tensor, saved: Saved, initial: InitialStates) -> Tensor:
        """dq, by a forward scan."""

    def key_value_grads(
        self, x: LinearInputs, do: Tensor, saved: Saved, d_final: InitialStates
    ) -> tuple[Tensor, Tensor]:
        """dk and dv, by a reverse scan, given the gradients of the states that the tiles end with."""

    def gradients(
        self, x: LinearInputs, do: Tensor, saved: Saved, initial: InitialStates, d_final: InitialStates
    ) -> Grads:
        """All of them, if the decay is learned: its gradient needs both states."""
