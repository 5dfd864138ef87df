"""The kernels of `scalar` for Hopper."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import HOPPER_HEAD, on_hopper
from lasp.kernels.triton.hopper.chunk_scan import chunk_scan
from lasp.kernels.triton.hopper.pair_reverse_scan import pair_reverse_scan
from lasp.kernels.triton.hopper.reverse_scan import reverse_scan
from lasp.kernels.triton.hopper.shared import HALF, Behind
from lasp.kernels.triton.hopper.tile_states import tile_states
from lasp.kernels.triton.scalar.backend import KeyValueGrads, QueryGrads, Saved
from lasp.kernels.triton.scalar.gates import chunk_gate_grads, cumulate
from lasp.kernels.triton.shared.state_passing import InitialStates
from lasp.kernels.triton.shared.tiles import CHUNK


def serves(k: Tensor, v: Tensor) -> bool:
    """Whether these kernels do: for heads that have been compared with float64 on a GPU. Those of 64 come in pairs,
    which share q and k if these have 128."""
    small = HALF.value
    pairs = {
        (small, small): v.shape[2] % 2 == 0,
        (HOPPER_HEAD, small): v.shape[2] // k.shape[2] % 2 == 0,
        (HOPPER_HEAD, HOPPER_HEAD): True,
    }
    return on_hopper(v) and v.dtype != torch.float32 and pairs.get((k.shape[3], v.shape[3]), False)


def at_once(v: Tensor) -> int:
    """Heads that a program scans."""
    return 2 if v.shape[3] == HALF.value else 1


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

    def outputs(self, x: LinearInputs, saved: Saved, initial: InitialStates) -> Tensor:
        return chunk_scan(self.tiles, x.q, x.k, x.v, saved[0], initial, self.scale)[0]

    def key_value_grads(self, x: LinearInputs, do: Tensor, saved: Saved, d_final: InitialStates) -> KeyValueGrads:
        behind = self._new_behind(x) if x.decay_class.learned else None
        scan = pair_reverse_scan if x.v.shape[-1] == HALF.value else reverse_scan
        dk, dv, writes = scan(self.tiles, x.q, x.k, x.v, do, saved[0], d_final, self.scale, behind)
        return KeyValueGrads(dk, dv, (writes, behind))

    def query_grads(
        self, x: LinearInputs, do: Tensor, saved: Saved, initial: InitialStates, known: Any = None
    ) -> QueryGrads:
        shared = saved[0], initial, self.scale
        if known is None:
            return QueryGrads(chunk_scan(self.tiles, do, x.v, x.k, *shared, transposed=True)[0], None)
        writes, behind = known
        dq, reads, products = chunk_scan(self.tiles, do, x.v, x.k, *shared, transposed=True, partner=x.q, behind=behind)
        assert x.decay is not None and reads is not None and products is not None
        return QueryGrads(dq, chunk_gate_grads(self._chunks(x), x.decay, reads, writes, products))

    def _chunks(self, x: LinearInputs) -> Tiles:
        return x.segments.tiles(CHUNK, x.v.device)

    def _new_behind(self, x: LinearInputs) -> Behind:
        """For the gradients of the states behind all chunks."""
        (heads, size_v), size_k, chunks = x.v.shape[2:], x.k.shape[3], self._chunks(x).count
        states, ups = x.v.new_empty(chunks, heads, size_k, size_v), None
        if x.v.dtype == torch.float16:
            ups = x.v.new_empty(chunks, heads, size_v // HALF.value, dtype=torch.float32)
        return Behind(states, ups, x.segments.first_chunks(self.tiles.size, CHUNK, x.v.device))
