"""Linear attention without gates or with scalar ones: an op of two halves per direction (lasp.kernels.recurrence)."""

from dataclasses import dataclass

from torch import Tensor

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.layouts import laid_out
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Finished, Gradients, Kept
from lasp.kernels.triton.device import GLUON
from lasp.kernels.triton.scalar import chunkwise
from lasp.kernels.triton.scalar.backend import Backend
from lasp.kernels.triton.scalar.config import ScalarConfig, scalar_config
from lasp.kernels.triton.scalar.portable import Portable
from lasp.kernels.triton.shared.operands import contiguous, per_q_head
from lasp.kernels.triton.shared.state_passing import InitialStates, StatePassing
from lasp.kernels.triton.shared.tiles import tiles_of

if GLUON:
    from lasp.kernels.triton.hopper import scalar as hopper


@dataclass(frozen=True)
class TritonLinear:
    """decay None, [H] or [B, T, H]. Kept for backward: the tiles' initial states and what kernels read of gates."""

    config: ScalarConfig | None = None  # None takes it from the table

    def summarize(self, x: LinearInputs, wanted: bool):
        x, kernels = contiguous(x), self._backend(x)
        states, transitions, saved = kernels.tile_states(x.k, x.v, x.decay)
        passing = StatePassing(kernels.tiles, states, transitions, reverse=False, ahead=wanted)
        return passing.summary, (x, kernels, saved, passing)

    def finish(self, x: LinearInputs, partial, incoming: Pending[Tensor | None]) -> Finished:
        x, kernels, saved, passing = partial
        initial, final_states = passing.enter(incoming.wait())
        o = kernels.outputs(x, saved, initial)
        return o, final_states, (passing.transitions, *initial, *saved)

    def summarize_grad(self, x: LinearInputs, kept: Kept, do: Tensor, wanted: bool):
        x, do, kernels = contiguous(x), laid_out(do), self._backend(x)
        (transitions, local, incoming, passed), saved = kept[:4], kept[4:]
        assert local is not None
        initial = InitialStates(local, incoming, passed)
        d_states = kernels.tile_states_grad(x.q, do, saved)
        passing = StatePassing(kernels.tiles, d_states, transitions, reverse=True, ahead=wanted)
        return passing.summary and passing.summary.state, (x, kernels, do, saved, initial, passing)

    def finish_grad(self, x: LinearInputs, kept: Kept, partial, d_outgoing: Pending[Tensor | None]) -> Gradients:
        x, kernels, do, saved, initial, passing = partial
        if x.decay_class.learned:
            d_final, d_incoming = passing.enter(d_outgoing.wait())
            dq, dk, dv, d_decay = kernels.gradients(x, do, saved, initial, d_final)
        else:
            dq, d_decay = kernels.query_grads(x, do, saved, initial), None  # while what comes in is on its way
            d_final, d_incoming = passing.enter(d_outgoing.wait())
            dk, dv = kernels.key_value_grads(x, do, saved, d_final)
        grads = {"q": per_q_head(dq, x.q), "k": per_q_head(dk, x.q), "v": dv, "decay": d_decay}
        return Gradients(grads, d_incoming)

    def _backend(self, x: LinearInputs) -> Backend:
        if GLUON and hopper.serves(x.k, x.v):
            return hopper.Hopper(tiles_of(x, hopper.at_once(x.v)), x.scale)
        config = self.config or scalar_config(x.k, x.v, x.decay is not None)
        if chunkwise.serves(x.k, x.v):
            return chunkwise.Chunkwise.of(x, config)
        return Portable(tiles_of(x), x.scale, config)
