"""Linear attention with a diagonal decay as an op of two halves per direction (see lasp.kernels.recurrence)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.layouts import laid_out
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Finished, Gradients, Kept
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import GLUON, vector_gates_for_hopper
from lasp.kernels.triton.diagonal.gradients import gradients
from lasp.kernels.triton.diagonal.outputs import outputs, value_grads
from lasp.kernels.triton.diagonal.rescale import DiagonalConfig, Rescaled, diagonal_config, rescale
from lasp.kernels.triton.diagonal.secondary import secondary_gradients, secondary_outputs
from lasp.kernels.triton.diagonal.states import chunk_states, tile_states, tile_states_grad
from lasp.kernels.triton.shared.operands import contiguous, per_q_head
from lasp.kernels.triton.shared.state_passing import InitialStates, StatePassing
from lasp.kernels.triton.shared.tiles import CHUNK, tiles_of

if GLUON:
    from lasp.kernels.triton.hopper import diagonal_walk as walk
    from lasp.kernels.triton.hopper.diagonal_factors import rescale as rescale_on_hopper
    from lasp.kernels.triton.hopper.diagonal_gradients import linear_gradients


@dataclass(frozen=True)
class TritonDiagonal:
    """decay [B, T, H, K]. Kept for backward: what enters the tiles, and the tiles' decays."""

    config: DiagonalConfig | None = None  # None takes it from the table

    def summarize(self, x: LinearInputs, wanted: bool):
        x, tiles, config = self._prepare(x)
        rescaled = self._rescale(x, tiles, config)
        states, transitions = tile_states(tiles, rescaled, x.v, config)
        passing = StatePassing(tiles, states, transitions, reverse=False, ahead=wanted)
        return passing.summary, (x, tiles, config, rescaled, passing)

    def finish(self, x: LinearInputs, partial, incoming: Pending[Tensor | None]) -> Finished:
        x, tiles, config, rescaled, passing = partial
        assert x.decay is not None
        o = torch.empty_like(x.v)
        initial, outgoing = passing.enter(incoming.wait())
        if self._on_hopper(x, config) and initial.incoming is None:
            walk.outputs(tiles, rescaled, x.v, initial, o, config.max_ln_decay)
        else:
            outputs(tiles, rescaled, x.v, initial, o, config)
        secondary_outputs(tiles, x.q, x.k, x.v, x.decay, rescaled.ln_chunk_decay, o, x.scale, config)
        return o, outgoing, (passing.transitions, *initial)

    def summarize_grad(self, x: LinearInputs, kept: Kept, do: Tensor, wanted: bool):
        (x, tiles, config), do = self._prepare(x), laid_out(do)
        rescaled = self._rescale(x, tiles, config)
        states = tile_states_grad(tiles, rescaled, do, config)
        passing = StatePassing(tiles, states, kept[0], reverse=True, ahead=wanted)
        return passing.summary and passing.summary.state, (x, tiles, config, do, rescaled, passing)

    def finish_grad(self, x: LinearInputs, kept: Kept, partial, d_outgoing: Pending[Tensor | None]) -> Gradients:
        (x, tiles, config, do, rescaled, passing), (_, local, *came) = partial, kept
        assert local is not None and x.decay is not None
        before = chunk_states(tiles, rescaled, x.v, InitialStates(local, *came), config)
        d_final, d_incoming = passing.enter(d_outgoing.wait())
        dv, dg = torch.empty_like(x.v), torch.empty_like(x.decay)
        on_hopper = self._on_hopper(x, config)
        if on_hopper and d_final.incoming is None:
            after = walk.value_grads(tiles, rescaled, do, d_final, dv, config.max_ln_decay)
        else:
            after = value_grads(tiles, rescaled, do, d_final, dv, config)
        if on_hopper:
            dq, dk = linear_gradients(tiles, x, do, rescaled, before, after, dg, config.max_ln_decay)
        else:
            dq, dk = rescaled.q, rescaled.k
            gradients(tiles, rescaled, x.v, x.decay, do, before, after, dg, x.scale, config)
        secondary_gradients(
            tiles, x.q, x.k, x.v, x.decay, do, rescaled.ln_chunk_decay, (dq, dk, dv, dg), x.scale, config
        )
        dq, dk = (per_q_head(d, x.q).to(x.q.dtype) for d in (dq, dk))
        return Gradients({"q": dq, "k": dk, "v": dv, "decay": dg}, d_incoming)

    @staticmethod
    def _on_hopper(x: LinearInputs, config: DiagonalConfig) -> bool:
        return config.chunk == CHUNK and vector_gates_for_hopper(x)

    def _rescale(self, x: LinearInputs, tiles: Tiles, config: DiagonalConfig) -> Rescaled:
        assert x.decay is not None
        if self._on_hopper(x, config):
            return rescale_on_hopper(tiles, x.q, x.k, x.decay, x.scale, config.max_ln_decay)
        return rescale(tiles, x.q, x.k, x.decay, x.scale, config)

    def _prepare(self, x: LinearInputs):
        return contiguous(x), tiles_of(x), self.config or diagonal_config(x.k, x.v)
