"""The kernels of `scalar` for Hopper."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import HOPPER_HEAD, on_hopper
from lasp.kernels.triton.hopper.chunk_scan import chunk_scan
from lasp.kernels.triton.hopper.forward_scan import forward_scan
from lasp.kernels.triton.hopper.group_gradients import group_gradients, serves_groups
from lasp.kernels.triton.hopper.joint_scan import joint_scan
from lasp.kernels.triton.hopper.layouts import HALF
from lasp.kernels.triton.hopper.pair_reverse_scan import pair_reverse_scan
from lasp.kernels.triton.hopper.reverse_scan import reverse_scan
from lasp.kernels.triton.hopper.scalar_shared import new_behind
from lasp.kernels.triton.hopper.tile_states import tile_states
from lasp.kernels.triton.scalar.backend import Grads, Saved
from lasp.kernels.triton.scalar.chunk_states import chunk_states
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
        if x.v.shape[-1] == HOPPER_HEAD and saved[0] is not None:
            return forward_scan(self.tiles, x.q, x.k, x.v, saved[0], initial, self.scale)
        return chunk_scan(self.tiles, x.q, x.k, x.v, saved[0], initial, self.scale)[0]

    def query_grads(self, x: LinearInputs, do: Tensor, saved: Saved, initial: InitialStates) -> Tensor:
        return chunk_scan(self.tiles, do, x.v, x.k, saved[0], initial, self.scale, transposed=True)[0]

    def key_value_grads(
        self, x: LinearInputs, do: Tensor, saved: Saved, d_final: InitialStates
    ) -> tuple[Tensor, Tensor]:
        operands = self.tiles, x.q, x.k, x.v, do, saved[0], d_final, self.scale
        if x.v.shape[-1] == HALF.value:
            return pair_reverse_scan(*operands, None)[:2]
        return reverse_scan(*operands)

    def gradients(
        self, x: LinearInputs, do: Tensor, saved: Saved, initial: InitialStates, d_final: InitialStates
    ) -> Grads:
        assert x.decay is not None and saved[0] is not None
        _, chunks, first_chunk = x.segments.cut(self.tiles.size, CHUNK, x.v.device)
        operands = self.tiles, x.q, x.k, x.v, do, saved[0]
        if serves_groups(x.k, x.v):
            dq, dk, dv, *sums = group_gradients(self.tiles, chunks, first_chunk, x, do, saved[0], initial, d_final)
        elif x.v.shape[-1] == HOPPER_HEAD:
            before = chunk_states(self.tiles, chunks.count, first_chunk, x.k, x.v, saved[0], initial)
            dq, dk, dv, *sums = joint_scan(*operands, before, d_final, first_chunk, self.scale)
        else:
            behind = new_behind(chunks.count, x.k, x.v, first_chunk)
            dk, dv, writes = pair_reverse_scan(*operands, d_final, self.scale, behind)
            dq, reads, products = chunk_scan(
                self.tiles, do, x.v, x.k, saved[0], initial, self.scale, transposed=True, partner=x.q, behind=behind
            )
            assert reads is not None and writes is not None and products is not None
            sums = [reads, writes, products]
        return Grads(dq, dk, dv, chunk_gate_grads(chunks, x.decay, *sums))
