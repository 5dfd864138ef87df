"""The kernels of `scalar` for Hopper."""

from dataclasses import dataclass

from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.hopper.forward_scan import forward_scan
from lasp.kernels.triton.hopper.reverse_scan import reverse_scan
from lasp.kernels.triton.hopper.tile_states import tile_states
from lasp.kernels.triton.scalar.backend import KeyValueGrads, QueryGrads, Saved
from lasp.kernels.triton.scalar.gates import cumulate
from lasp.kernels.triton.shared.state_passing import InitialStates
from lasp.kernels.triton.shared.tiles import CHUNK


@dataclass(frozen=True)
class Hopper:
    """A `Backend`. It saves the cumulative gates."""

    tiles: Tiles
    scale: float

    def tile_states(self, k: Tensor, v: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor | None, Saved]:
        gates = cumulate(self.tiles, decay, v, CHUNK)
        return *tile_states(self.tiles, k, v, gates, backward=False, scale=1.0), (gates,)

    def tile_states_grad(self, q: Tensor, do: Tensor, saved: Saved) -> Tensor:
        return tile_states(self.tiles, q, do, saved[0], backward=True, scale=self.scale)[0]

    def outputs(self, q: Tensor, k: Tensor, v: Tensor, saved: Saved, initial: InitialStates) -> Tensor:
        return forward_scan(self.tiles, q, k, v, saved[0], initial, self.scale)[0]

    def query_grads(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, saved: Saved, initial: InitialStates, ends: Tensor | None
    ) -> QueryGrads:
        partner = None if ends is None else q
        return QueryGrads(
            *forward_scan(
                self.tiles, do, v, k, saved[0], initial, self.scale, transposed=True, partner=partner, ends=ends
            )
        )

    def key_value_grads(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, saved: Saved, d_final: InitialStates, ends: Tensor | None
    ) -> KeyValueGrads:
        return KeyValueGrads(*reverse_scan(self.tiles, q, k, v, do, saved[0], d_final, self.scale, ends))
