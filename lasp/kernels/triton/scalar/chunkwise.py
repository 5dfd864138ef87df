"""The kernels of `scalar` for heads too large for a scan to hold their state: states of all chunks are written, and
each chunk is read for itself."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import is_roomy
from lasp.kernels.triton.scalar.backend import Grads, Saved
from lasp.kernels.triton.scalar.chunk_reads import STEP, chunk_gradients, chunk_reads
from lasp.kernels.triton.scalar.chunk_states import ChunkStates, chunk_states
from lasp.kernels.triton.scalar.config import ScalarConfig
from lasp.kernels.triton.scalar.gates import chunk_gate_grads, cumulate
from lasp.kernels.triton.scalar.tile_states import tile_states
from lasp.kernels.triton.shared.state_passing import InitialStates
from lasp.kernels.triton.shared.tiles import tiles_of

CHUNK = 128  # tokens: as many products with states as among tokens
SMALL = 128  # heads up to this size are scanned


def serves(k: Tensor, v: Tensor) -> bool:
    return max(k.shape[3], v.shape[3]) > SMALL and v.dtype != torch.float32 and is_roomy(v.device)


@dataclass(frozen=True)
class Chunkwise:
    """A `Backend`. It saves the cumulative gates."""

    tiles: Tiles
    chunks: Tiles
    first_chunk: Tensor
    scale: float
    config: ScalarConfig

    @classmethod
    def of(cls, x: LinearInputs, config: ScalarConfig) -> "Chunkwise":
        cut = x.segments.cut(tiles_of(x, chunk=CHUNK).size, CHUNK, x.v.device)
        return cls(*cut, x.scale, replace(config, chunk=CHUNK))

    def tile_states(self, k: Tensor, v: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor | None, Saved]:
        gates = cumulate(self.tiles, decay, v, CHUNK)
        states, transitions, _ = tile_states(self.tiles, k, v, gates, self.config)
        return states, transitions, (gates,)

    def tile_states_grad(self, q: Tensor, do: Tensor, saved: Saved) -> Tensor:
        return tile_states(self.tiles, q, do, saved[0], self.config, backward=True, scale=self.scale)[0]

    def outputs(self, x: LinearInputs, saved: Saved, initial: InitialStates) -> Tensor:
        return chunk_reads(self.chunks, x.q, x.k, x.v, saved[0], self._before(x, saved, initial), self.scale)

    def query_grads(self, x: LinearInputs, do: Tensor, saved: Saved, initial: InitialStates) -> Tensor:
        before = self._before(x, saved, initial)
        return chunk_reads(self.chunks, do, x.v, x.k, saved[0], before, self.scale, transposed=True)

    def key_value_grads(
        self, x: LinearInputs, do: Tensor, saved: Saved, d_final: InitialStates
    ) -> tuple[Tensor, Tensor]:
        shared = saved[0], self._behind(x, do, saved, d_final), self.scale
        dv = chunk_reads(self.chunks, x.k, x.q, do, *shared, reverse=True)
        return chunk_reads(self.chunks, x.v, do, x.q, *shared, reverse=True, transposed=True), dv

    def gradients(
        self, x: LinearInputs, do: Tensor, saved: Saved, initial: InitialStates, d_final: InitialStates
    ) -> Grads:
        assert x.decay is not None and saved[0] is not None
        before = self._before(x, saved, initial)
        products = initial.local.new_empty(1, self.chunks.count, *before.states.shape[1:3])
        behind = self._behind(x, do, saved, d_final, others=before, products=products)
        dq, dk, dv, reads, writes = chunk_gradients(self.chunks, x, do, saved[0], before, behind)
        return Grads(dq, dk, dv, chunk_gate_grads(self.chunks, x.decay, reads, writes, products))

    def _before(self, x: LinearInputs, saved: Saved, initial: InitialStates) -> ChunkStates:
        return self._states(x.k, x.v, saved, initial)

    def _behind(self, x: LinearInputs, do: Tensor, saved: Saved, d_final: InitialStates, **products) -> ChunkStates:
        return self._states(x.q, do, saved, d_final, reverse=True, scale=self.scale, **products)

    def _states(self, k: Tensor, v: Tensor, saved: Saved, initial: InitialStates, **how) -> ChunkStates:
        tiles, chunks = self.tiles, self.chunks
        return chunk_states(
            tiles, chunks.count, self.first_chunk, k, v, saved[0], initial, chunk=CHUNK, block_k=STEP, **how
        )
