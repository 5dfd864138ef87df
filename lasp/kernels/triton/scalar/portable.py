"""The kernels of `scalar` for any GPU."""

from dataclasses import dataclass

from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.scalar.backend import KeyValueGrads, QueryGrads, Saved
from lasp.kernels.triton.scalar.chunk_scan import chunk_scan
from lasp.kernels.triton.scalar.config import ScalarConfig
from lasp.kernels.triton.scalar.gates import cumulate
from lasp.kernels.triton.scalar.tile_states import tile_states
from lasp.kernels.triton.shared.state_passing import InitialStates


@dataclass(frozen=True)
class Portable:
    """A `Backend`. It saves the cumulative gates and the tiles' largest decays of a chunk."""

    tiles: Tiles
    scale: float
    config: ScalarConfig

    def tile_states(self, k: Tensor, v: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor | None, Saved]:
        gates = cumulate(self.tiles, decay, v, self.config.chunk)
        states, transitions, largest = tile_states(self.tiles, k, v, gates, self.config)
        return states, transitions, (gates, largest)

    def tile_states_grad(self, q: Tensor, do: Tensor, saved: Saved) -> Tensor:
        return tile_states(self.tiles, q, do, saved[0], self.config, backward=True, scale=self.scale)[0]

    def outputs(self, q: Tensor, k: Tensor, v: Tensor, saved: Saved, initial: InitialStates) -> Tensor:
        gates, largest = saved
        return chunk_scan(self.tiles, q, k, v, gates, largest, initial, self.scale, self.config)[0]

    def query_grads(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, saved: Saved, initial: InitialStates, ends: Tensor | None
    ) -> QueryGrads:
        (gates, largest), partner = saved, None if ends is None else q
        dq, q_dq, _ = chunk_scan(
            self.tiles, do, v, k, gates, largest, initial, self.scale, self.config,
            transposed=True, partner=partner, ends=ends,
        )  # fmt: skip
        return QueryGrads(dq, q_dq)

    def key_value_grads(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, saved: Saved, d_final: InitialStates, ends: Tensor | None
    ) -> KeyValueGrads:
        gates, largest = saved
        shared = gates, largest, d_final, self.scale, self.config
        partner = None if ends is None else v
        dv, v_dv, at_end = chunk_scan(self.tiles, k, q, do, *shared, reverse=True, partner=partner, ends=ends)
        dk, _, _ = chunk_scan(self.tiles, v, do, q, *shared, reverse=True, transposed=True)
        return KeyValueGrads(dk, dv, v_dv, at_end)
