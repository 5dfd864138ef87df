"""The kernels of `scalar` for Hopper."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import HOPPER_HEAD, on_hopper
from lasp.kernels.triton.hopper.chunk_scan import chunk_scan
from lasp.kernels.triton.hopper.reverse_scan import reverse_scan
from lasp.kernels.triton.hopper.shared import HALF
from lasp.kernels.triton.hopper.tile_states import tile_states
from lasp.kernels.triton.scalar.backend import KeyValueGrads, QueryGrads, Saved
from lasp.kernels.triton.scalar.gates import cumulate
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

    def outputs(self, q: Tensor, k: Tensor, v: Tensor, saved: Saved, initial: InitialStates) -> Tensor:
        return chunk_scan(self.tiles, q, k, v, saved[0], initial, self.scale)[0]

    def query_grads(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, saved: Saved, initial: InitialStates, ends: Tensor | None
    ) -> QueryGrads:
        partner = None if ends is None else q
        dq, q_dq, _ = chunk_scan(
            self.tiles, do, v, k, saved[0], initial, self.scale, transposed=True, partner=partner, ends=ends
        )
        return QueryGrads(dq, q_dq)

    def key_value_grads(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, saved: Saved, d_final: InitialStates, ends: Tensor | None
    ) -> KeyValueGrads:
        shared = saved[0], d_final, self.scale
        if k.shape[-1] == v.shape[-1] == HOPPER_HEAD and v.dtype == torch.bfloat16:
            return KeyValueGrads(*reverse_scan(self.tiles, q, k, v, do, *shared, ends))
        partner = None if ends is None else v
        dv, v_dv, at_end = chunk_scan(self.tiles, k, q, do, *shared, reverse=True, partner=partner, ends=ends)
        dk, _, _ = chunk_scan(self.tiles, v, do, q, *shared, reverse=True, transposed=True)
        return KeyValueGrads(dk, dv, v_dv, at_end)
