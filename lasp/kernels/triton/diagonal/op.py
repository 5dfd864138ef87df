"""Linear attention with a diagonal decay as an op of two halves per direction (see lasp.kernels.recurrence)."""

from dataclasses import dataclass

from torch import Tensor

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.layouts import laid_out
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Finished, Gradients, Kept
from lasp.kernels.triton.device import GLUON
from lasp.kernels.triton.diagonal.portable import Portable
from lasp.kernels.triton.diagonal.rescale import diagonal_config
from lasp.kernels.triton.diagonal.secondary import secondary_gradients, secondary_outputs
from lasp.kernels.triton.diagonal.states import chunk_states, tile_states, tile_states_grad
from lasp.kernels.triton.shared.operands import contiguous, per_q_head
from lasp.kernels.triton.shared.state_passing import InitialStates, StatePassing
from lasp.kernels.triton.shared.tiles import tiles_of

if GLUON:
    from lasp.kernels.triton.hopper import diagonal as hopper


@dataclass(frozen=True)
class TritonDiagonal:
    """decay [B, T, H, K]. Kept for backward: what enters the tiles, and the tiles' decays."""

    def summarize(self, x: LinearInputs, wanted: bool):
        x, kernels = contiguous(x), _kernels(x)
        rescaled = kernels.rescale(x)
        states, transitions = tile_states(kernels.tiles, rescaled, x.v, kernels.config)
        passing = StatePassing(kernels.tiles, states, transitions, reverse=False, ahead=wanted)
        return passing.summary, (x, kernels, rescaled, passing)

    def finish(self, x: LinearInputs, partial, incoming: Pending[Tensor | None]) -> Finished:
        x, kernels, rescaled, passing = partial
        assert x.decay is not None
        initial, outgoing = passing.enter(incoming.wait())
        o = kernels.outputs(x, rescaled, initial)
        secondary_outputs(kernels.tiles, x.q, x.k, x.v, x.decay, rescaled.ln_chunk_decay, o, x.scale, kernels.config)
        return o, outgoing, (passing.transitions, *initial)

    def summarize_grad(self, x: LinearInputs, kept: Kept, do: Tensor, wanted: bool):
        x, do, kernels = contiguous(x), laid_out(do), _kernels(x)
        rescaled = kernels.rescale(x)
        states = tile_states_grad(kernels.tiles, rescaled, do, kernels.config)
        passing = StatePassing(kernels.tiles, states, kept[0], reverse=True, ahead=wanted)
        return passing.summary and passing.summary.state, (x, kernels, do, rescaled, passing)

    def finish_grad(self, x: LinearInputs, kept: Kept, partial, d_outgoing: Pending[Tensor | None]) -> Gradients:
        (x, kernels, do, rescaled, passing), (_, local, *came) = partial, kept
        assert local is not None and x.decay is not None
        before = chunk_states(kernels.tiles, rescaled, x.v, InitialStates(local, *came), kernels.config)
        d_final, d_incoming = passing.enter(d_outgoing.wait())
        dv, after = kernels.value_grads(rescaled, do, d_final)
        dq, dk, dg = kernels.gradients(x, rescaled, do, before, after)
        secondary_gradients(
            kernels.tiles, x.q, x.k, x.v, x.decay, do, rescaled.ln_chunk_decay, (dq, dk, dv, dg), x.scale,
            kernels.config,
        )  # fmt: skip
        dq, dk = (per_q_head(d, x.q).to(x.q.dtype) for d in (dq, dk))
        return Gradients({"q": dq, "k": dk, "v": dv, "decay": dg}, d_incoming)


def _kernels(x: LinearInputs) -> Portable:
    tiles, config = tiles_of(x), diagonal_config(x.k, x.v)
    return hopper.Hopper(tiles, config) if GLUON and hopper.serves(x) else Portable(tiles, config)
