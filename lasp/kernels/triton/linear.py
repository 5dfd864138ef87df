"""Linear attention without gates or with scalar ones: an op of two halves per direction (lasp.kernels.recurrence)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Gradients, Inputs, Kept
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.config import Config, config_for, for_hopper, tile_length
from lasp.kernels.triton.gates import cumulate, gate_grads
from lasp.kernels.triton.scan import Entering, Scan
from lasp.kernels.triton.states import tile_states
from lasp.kernels.triton.walks import Walks


@dataclass(frozen=True)
class TritonLinear:
    """decay None, [H] or [B, T, H]. Kept for backward: what enters the tiles, and what walks read of gates."""

    config: Config | None = None  # None takes it from the table

    def summarize(self, x: Inputs, wanted: bool):
        x, tiles, config = self._prepare(x)
        gates = cumulate(tiles, x.decay, x.v, config.chunk)
        states, transitions, steepest = tile_states(tiles, x.k, x.v, gates, config)
        scan = Scan(tiles, states, transitions, down=False, ahead=wanted)
        return scan.summary, (x, tiles, config, gates, steepest, scan)

    def finish(self, x: Inputs, partial, incoming: Pending[Tensor | None]) -> tuple[Tensor, Pending[Tensor], Kept]:
        x, tiles, config, gates, steepest, scan = partial
        entering, outgoing = scan.enter(incoming.wait())
        o = self._walks(x, tiles, gates, steepest, config).outputs(x.q, x.k, x.v, entering)
        return o, outgoing, (scan.transitions, gates, steepest, *entering)

    def summarize_grad(self, x: Inputs, kept: Kept, do: Tensor, wanted: bool):
        (x, tiles, config), do = self._prepare(x), laid_out(do)
        transitions, gates, *_ = kept
        states, _, _ = tile_states(tiles, x.q, do, gates, config, backward=True, scale=x.scale)
        scan = Scan(tiles, states, transitions, down=True, ahead=wanted)
        return scan.summary and scan.summary.state, (x, tiles, config, do, scan)

    def finish_grad(self, x: Inputs, kept: Kept, partial, d_outgoing: Pending[Tensor | None]) -> Gradients:
        (x, tiles, config, do, scan), (_, gates, steepest, local, *came) = partial, kept
        assert local is not None
        entering = Entering(local, *came)
        walks = self._walks(x, tiles, gates, steepest, config)
        gate = x.decay if x.decay is not None and x.decay.ndim == 3 else None
        ends = None if gate is None else torch.empty_like(entering.local)
        dq, q_dq = walks.query_grads(x.q, x.k, x.v, do, entering, ends)
        leaving, d_incoming = scan.enter(d_outgoing.wait())
        dk, dv, v_dv, at_end = walks.key_value_grads(x.q, x.k, x.v, do, leaving, ends)
        dg = None
        if gate is not None:
            assert q_dq is not None and v_dv is not None and at_end is not None
            dg = gate_grads(tiles, gate, q_dq, v_dv, at_end)
        return Gradients(per_q_head(dq, x.q), per_q_head(dk, x.q), dv, dg, None, d_incoming)

    @staticmethod
    def _walks(x: Inputs, tiles: Tiles, gates: Tensor | None, steepest: Tensor | None, config: Config) -> Walks:
        return Walks(tiles, gates, steepest, x.scale, config, for_hopper(x.k, x.v))

    def _prepare(self, x: Inputs) -> tuple[Inputs, Tiles, Config]:
        return contiguous(x), tiles_of(x), self.config or config_for(x.k, x.v, x.decay is not None)


def contiguous(x: Inputs) -> Inputs:
    """The same inputs as `laid_out`."""
    decay, beta = (None if gate is None else gate.contiguous() for gate in (x.decay, x.beta))
    return replace(x, q=laid_out(x.q), k=laid_out(x.k), v=laid_out(x.v), decay=decay, beta=beta)


def laid_out(x: Tensor) -> Tensor:
    """x with the memory layout that the kernels assume: contiguous, and from an address on that 16 divides.

    A copy has to live until its half of the op has ended, since kernels that overlap may get its memory (see overlap).
    """
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def tiles_of(x: Inputs) -> Tiles:
    batch, tokens, heads = x.v.shape[:3]
    return x.segments.tiles(tile_length(batch, tokens, heads, x.v.device), x.v.device)


def per_q_head(d: Tensor, q: Tensor) -> Tensor:
    """[B, T, H, K] -> [B, T, Hq, K]: the sum over the value heads that share a q/k head."""
    if d.shape[2] == q.shape[2]:
        return d
    return d.unflatten(2, (q.shape[2], -1)).float().sum(3).to(q.dtype)
