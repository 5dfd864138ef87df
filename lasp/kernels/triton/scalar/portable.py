"""The kernels of `scalar` for any GPU."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.scalar.backend import KeyValueGrads, QueryGrads, Saved
from lasp.kernels.triton.scalar.chunk_scan import chunk_scan
from lasp.kernels.triton.scalar.config import ScalarConfig
from lasp.kernels.triton.scalar.gates import cumulate, gate_grads
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

    def outputs(self, x: LinearInputs, saved: Saved, initial: InitialStates) -> Tensor:
        gates, largest = saved
        return chunk_scan(self.tiles, x.q, x.k, x.v, gates, largest, initial, self.scale, self.config)[0]

    def key_value_grads(self, x: LinearInputs, do: Tensor, saved: Saved, d_final: InitialStates) -> KeyValueGrads:
        gates, largest = saved
        shared, partner = (gates, largest, d_final, self.scale, self.config), x.v if x.decay_class.learned else None
        dv, writes, _ = chunk_scan(self.tiles, x.k, x.q, do, *shared, reverse=True, partner=partner)
        dk, _, _ = chunk_scan(self.tiles, x.v, do, x.q, *shared, reverse=True, transposed=True)
        return KeyValueGrads(dk, dv, (writes, d_final))

    def query_grads(
        self, x: LinearInputs, do: Tensor, saved: Saved, initial: InitialStates, known: Any = None
    ) -> QueryGrads:
        gates, largest = saved
        shared = gates, largest, initial, self.scale, self.config
        if known is None:
            return QueryGrads(chunk_scan(self.tiles, do, x.v, x.k, *shared, transposed=True)[0], None)
        writes, d_final = known
        dq, reads, at_end = chunk_scan(self.tiles, do, x.v, x.k, *shared, transposed=True, partner=x.q, d_final=d_final)
        assert x.decay is not None and reads is not None and at_end is not None
        return QueryGrads(dq, gate_grads(self.tiles, x.decay, reads, writes, at_end))
