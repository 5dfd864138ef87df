"""The kernels of the delta rule for any GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.inputs import DeltaInputs
from lasp.kernels.segments import Cut
from lasp.kernels.triton.delta.backend import Grads, Recomputed, Terms
from lasp.kernels.triton.delta.config import OUTPUTS, STATES, SUMMARY, TRANSITION, DeltaConfig, scan_decay
from lasp.kernels.triton.delta.forward_scan import forward_scan
from lasp.kernels.triton.delta.gradients import gradients
from lasp.kernels.triton.delta.rescale import Factors, diagonal_factors
from lasp.kernels.triton.delta.reverse_scan import reverse_scan
from lasp.kernels.triton.delta.secondary import secondary_gradients, secondary_scores
from lasp.kernels.triton.delta.ut_transform import chunk_scores, ut_transform


@dataclass(frozen=True)
class Portable:
    """A `Backend`. `gradients` is a reverse scan for dr and the gradients of every chunk's final state, then one kernel
    over chunks."""

    cut: Cut
    config: DeltaConfig
    adds_d_beta = False

    def terms(self, x: DeltaInputs) -> Terms:
        if x.decay is None or scan_decay(x.decay) != Decay.DIAGONAL:
            known = ut_transform(self.cut.chunks, x.k, x.decay, x.beta, None, _work_dtype(x))
            return Terms(*known, None, Factors(x.q, x.k, x.k))
        factors, scores, products = diagonal_factors(
            self.cut.chunks, x.q, x.k, x.decay, _work_dtype(x), self.config, x.scale
        )
        assert scores is not None and products is not None and factors.ln_chunk_decay is not None
        secondary_scores(
            self.cut.chunks, x.q, x.k, x.decay, factors.ln_chunk_decay, scores, products, x.scale, self.config
        )
        return Terms(*ut_transform(self.cut.chunks, x.k, x.decay, x.beta, products, _work_dtype(x)), scores, factors)

    def with_scores(self, x: DeltaInputs, terms: Terms) -> Terms:
        if terms.scores is not None:
            return terms
        decay, precision = scan_decay(x.decay).value, self.config.precision
        scores = chunk_scores(self.cut.chunks, x.q, x.k, terms.gates, decay, terms.ut, x.scale, precision)
        return terms._replace(scores=scores)

    def terms_again(
        self, x: DeltaInputs, ut: Tensor, gates: Tensor, log2_bounds: Tensor | None, scores: Tensor
    ) -> Terms:
        factors = Factors(x.q, x.k, x.k)
        if x.decay is not None and scan_decay(x.decay) == Decay.DIAGONAL:
            factors, _, _ = diagonal_factors(self.cut.chunks, x.q, x.k, x.decay, _work_dtype(x), self.config, None)
        return Terms(ut, gates, log2_bounds, scores, factors)

    def tile_states(self, x: DeltaInputs, terms: Terms, states: Tensor, transitions: Tensor) -> None:
        for mode, final in ((SUMMARY, states), (TRANSITION, transitions)):
            forward_scan(mode, self.cut, terms, x.v, self.config, scan_decay(x.decay), final=final)

    def outputs(self, x: DeltaInputs, terms: Terms, initial: Tensor | None, final: Tensor | None) -> Tensor:
        o = torch.empty_like(x.v)
        forward_scan(
            OUTPUTS, self.cut, terms, x.v, self.config, scan_decay(x.decay),
            scale=x.scale, initial=initial, final=final, o=o,
        )  # fmt: skip
        return o

    def tile_states_grad(self, x: DeltaInputs, terms: Terms, do: Tensor, states: Tensor) -> None:
        reverse_scan(SUMMARY, self.cut, terms, do, self.config, scan_decay(x.decay), x.scale, d_initial=states)

    def recompute(
        self, x: DeltaInputs, terms: Terms, initial: Tensor | None, heads: range, into: Recomputed, pdl: bool
    ) -> None:
        forward_scan(
            STATES, self.cut, terms, x.v, self.config, scan_decay(x.decay),
            initial=initial, recomputed=into, heads=heads, pdl=pdl,
        )  # fmt: skip

    def gradients(
        self, x: DeltaInputs, terms: Terms, do: Tensor, recomputed: Recomputed, d_final: Tensor | None,
        d_initial: Tensor | None, heads: range, grads: Grads,
    ) -> None:  # fmt: skip
        dr, d_states = torch.empty_like(recomputed.u), torch.empty_like(recomputed.states)
        reverse_scan(
            STATES, self.cut, terms, do, self.config, scan_decay(x.decay), x.scale,
            d_final=d_final, d_initial=d_initial, dr=dr, d_states=d_states, heads=heads,
        )  # fmt: skip
        gradients(self.cut.chunks, x, do, terms, recomputed, dr, d_states, grads, self.config, heads)
        if scan_decay(x.decay) == Decay.DIAGONAL:
            secondary_gradients(self.cut.chunks, x, do, terms, recomputed.u, dr, grads, self.config, heads)


def _work_dtype(x: DeltaInputs) -> torch.dtype:
    """Of the products' operands: with a diagonal decay they have factors up to e^max_ln_decay, too large for fp16."""
    in_fp32 = x.v.dtype == torch.float16 and scan_decay(x.decay) == Decay.DIAGONAL
    return torch.float32 if in_fp32 else x.v.dtype
