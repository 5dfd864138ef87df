"""Linear attention without gates or with scalar ones: an op of two halves per direction (lasp.kernels.recurrence)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Gradients, Inputs, Kept
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import for_hopper
from lasp.kernels.triton.scalar.backend import Walks
from lasp.kernels.triton.scalar.config import ScalarConfig, scalar_config
from lasp.kernels.triton.scalar.gates import cumulate, gate_grads
from lasp.kernels.triton.scalar.tile_states import tile_states
from lasp.kernels.triton.shared.operands import contiguous, laid_out, per_q_head
from lasp.kernels.triton.shared.state_passing import InitialStates, Scan
from lasp.kernels.triton.shared.tiles import tiles_of


@dataclass(frozen=True)
class TritonLinear:
    """decay None, [H] or [B, T, H]. Kept for backward: what enters the tiles, and what walks read of gates."""

    config: ScalarConfig | None = None  # None takes it from the table

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
        entering = InitialStates(local, *came)
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
    def _walks(x: Inputs, tiles: Tiles, gates: Tensor | None, steepest: Tensor | None, config: ScalarConfig) -> Walks:
        return Walks(tiles, gates, steepest, x.scale, config, for_hopper(x.k, x.v))

    def _prepare(self, x: Inputs) -> tuple[Inputs, Tiles, ScalarConfig]:
        return contiguous(x), tiles_of(x), self.config or scalar_config(x.k, x.v, x.decay is not None)
