"""The kernels of `scalar` for any GPU."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.scalar.backend import Grads, Saved
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

    def query_grads(self, x: LinearInputs, do: Tensor, saved: Saved, initial: InitialStates) -> Tensor:
        return self._query_scan(x, do, saved, initial)[0]

    def key_value_grads(
        self, x: LinearInputs, do: Tensor, saved: Saved, d_final: InitialStates
    ) -> tuple[Tensor, Tensor]:
        dk, dv, _ = self._key_value_scans(x, do, saved, d_final, None)
        return dk, dv

    def gradients(
        self, x: LinearInputs, do: Tensor, saved: Saved, initial: InitialStates, d_final: InitialStates
    ) -> Grads:
        dk, dv, writes = self._key_value_scans(x, do, saved, d_final, x.v)
        dq, reads, at_end = self._query_scan(x, do, saved, initial, partner=x.q, d_final=d_final)
        assert x.decay is not None and reads is not None and writes is not None and at_end is not None
        return Grads(dq, dk, dv, gate_grads(self.tiles, x.decay, reads, writes, at_end))

    def _query_scan(self, x: LinearInputs, do: Tensor, saved: Saved, initial: InitialStates, **sums: Any) -> Any:
        gates, largest = saved
        return chunk_scan(
            self.tiles, do, x.v, x.k, gates, largest, initial, self.scale, self.config, transposed=True, **sums
        )

    def _key_value_scans(
        self, x: LinearInputs, do: Tensor, saved: Saved, d_final: InitialStates, partner: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        gates, largest = saved
        shared = gates, largest, d_final, self.scale, self.config
        dv, writes, _ = chunk_scan(self.tiles, x.k, x.q, do, *shared, reverse=True, partner=partner)
        dk, _, _ = chunk_scan(self.tiles, x.v, do, x.q, *shared, reverse=True, transposed=True)
        return dk, dv, writes
