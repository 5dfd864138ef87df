"""Linear attention with a diagonal decay as an op of two halves per direction (see lasp.kernels.recurrence)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Gradients, Inputs, Kept
from lasp.kernels.summary import Summary
from lasp.kernels.triton.diagonal_chunk import Config, config_for, refer
from lasp.kernels.triton.diagonal_grads import gradients
from lasp.kernels.triton.diagonal_outputs import outputs
from lasp.kernels.triton.diagonal_states import chunk_states, chunk_states_grad, tile_states, tile_states_grad
from lasp.kernels.triton.diagonal_steep import steep_gradients, steep_outputs
from lasp.kernels.triton.linear import contiguous, per_q_head, tiles_of
from lasp.kernels.triton.scan import scan, whole_summary


@dataclass(frozen=True)
class TritonDiagonal:
    """decay [B, T, H, K]. Kept for backward: the state that enters each tile, and the tiles' decays."""

    config: Config | None = None  # None takes it from the table

    def summarize(self, x: Inputs, wanted: bool):
        x, tiles, config = self._prepare(x)
        assert x.decay is not None
        referred = refer(tiles, x.q, x.k, x.decay, x.scale, config)
        states, transitions = tile_states(tiles, referred, x.v, config)
        summary = Summary(*whole_summary(tiles, states, transitions, backward=False)) if wanted else None
        return summary, (x, tiles, config, referred, states, transitions)

    def finish(self, x: Inputs, partial, incoming: Pending[Tensor | None]) -> tuple[Tensor, Tensor, Kept]:
        x, tiles, config, referred, states, transitions = partial
        assert x.decay is not None
        o = torch.empty_like(x.v)
        entering, outgoing = scan(tiles, states, transitions, incoming.wait(), backward=False)
        outputs(tiles, referred, x.v, entering, o, config)
        steep_outputs(tiles, x.q, x.k, x.v, x.decay, referred.spread, o, x.scale, config)
        return o, outgoing, (entering, transitions)

    def summarize_grad(self, x: Inputs, kept: Kept, do: Tensor, wanted: bool):
        x, tiles, config = self._prepare(x)
        assert x.decay is not None
        referred = refer(tiles, x.q, x.k, x.decay, x.scale, config)
        states = tile_states_grad(tiles, referred, do, config)
        d = whole_summary(tiles, states, kept[1], backward=True)[0] if wanted else None
        return d, (x, tiles, config, referred, states)

    def finish_grad(self, x: Inputs, kept: Kept, partial, do: Tensor, d_outgoing: Pending[Tensor | None]) -> Gradients:
        (x, tiles, config, referred, states), (entering, transitions) = partial, kept
        assert entering is not None and x.decay is not None
        before = chunk_states(tiles, referred, x.v, entering, config)
        leaving, d_incoming = scan(tiles, states, transitions, d_outgoing.wait(), backward=True)
        after = chunk_states_grad(tiles, referred, do, leaving, config)
        dq, dk, dv, dg = referred.q, referred.k, torch.empty_like(x.v), torch.empty_like(x.decay)
        gradients(tiles, referred, x.v, x.decay, do, before, after, dv, dg, x.scale, config)
        steep_gradients(tiles, x.q, x.k, x.v, x.decay, do, referred.spread, (dq, dk, dv, dg), x.scale, config)
        dq, dk = (per_q_head(d, x.q).to(x.q.dtype) for d in (dq, dk))
        return Gradients(dq, dk, dv, dg, None, d_incoming)

    def _prepare(self, x: Inputs):
        return contiguous(x), tiles_of(x), self.config or config_for(x.k, x.v)
