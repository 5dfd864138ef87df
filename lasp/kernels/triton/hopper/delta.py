"""The kernels of the delta rule for Hopper."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.inputs import DeltaInputs
from lasp.kernels.segments import Cut
from lasp.kernels.triton.delta.backend import Grads, Recomputed, Terms
from lasp.kernels.triton.delta.config import OUTPUTS, STATES, SUMMARY, DeltaConfig, HopperLaunch
from lasp.kernels.triton.delta.rescale import Factors
from lasp.kernels.triton.delta.secondary import secondary_gradients, secondary_scores
from lasp.kernels.triton.hopper.delta_forward_scan import forward_scan
from lasp.kernels.triton.hopper.delta_reverse_scan import reverse_scan
from lasp.kernels.triton.hopper.delta_ut_transform import ut_transform
from lasp.kernels.triton.hopper.diagonal_factors import delta_factors
from lasp.kernels.triton.hopper.diagonal_gradients import delta_gradients


@dataclass(frozen=True)
class Hopper:
    """A `Backend`, without a decay or with one number a token and head. States and transitions of tiles come from one
    scan; `outputs` computes the scores on its way, for itself and for backward; `gradients` is one reverse scan."""

    cut: Cut
    how: HopperLaunch
    adds_d_beta = False

    def terms(self, x: DeltaInputs) -> Terms:
        return Terms(*ut_transform(self.cut.chunks, x.k, x.decay, x.beta), None, Factors(x.q, x.k, x.k))

    def with_scores(self, x: DeltaInputs, terms: Terms) -> Terms:
        return terms._replace(scores=torch.empty_like(terms.ut))

    def terms_again(
        self, x: DeltaInputs, ut: Tensor, gates: Tensor, log2_bounds: Tensor | None, scores: Tensor
    ) -> Terms:
        return Terms(ut, gates, log2_bounds, scores, Factors(x.q, x.k, x.k))

    def tile_states(self, x: DeltaInputs, terms: Terms, states: Tensor, transitions: Tensor) -> None:
        forward_scan(SUMMARY, self.cut, x, terms, self.how, final=states, transitions=transitions)

    def outputs(self, x: DeltaInputs, terms: Terms, initial: Tensor | None, final: Tensor | None) -> Tensor:
        o = torch.empty_like(x.v)
        forward_scan(OUTPUTS, self.cut, x, terms, self.how, initial=initial, final=final, y=o)
        return o

    def tile_states_grad(self, x: DeltaInputs, terms: Terms, do: Tensor, states: Tensor) -> None:
        reverse_scan(self.cut, x, terms, do, self.how, d_initial=states)

    def recompute(
        self, x: DeltaInputs, terms: Terms, initial: Tensor | None, heads: range, into: Recomputed, pdl: bool
    ) -> None:
        u, states = into
        forward_scan(STATES, self.cut, x, terms, self.how, initial=initial, y=u, states=states, rows=heads, pdl=pdl)

    def gradients(
        self, x: DeltaInputs, terms: Terms, do: Tensor, recomputed: Recomputed, d_final: Tensor | None,
        d_initial: Tensor | None, heads: range, grads: Grads,
    ) -> None:  # fmt: skip
        reverse_scan(
            self.cut,
            x,
            terms,
            do,
            self.how,
            d_final=d_final,
            d_initial=d_initial,
            rows=heads,
            recomputed=recomputed,
            grads=grads,
        )


@dataclass(frozen=True)
class HopperDiagonal(Hopper):
    """The same with a vector gate, for heads of 128 in bf16: scores are known before the scans, and that in reverse
    finds what a kernel over chunks needs for the gradients."""

    config: DeltaConfig
    adds_d_beta = True

    def terms(self, x: DeltaInputs) -> Terms:
        factors, scores, products = self._factors(x, x.scale)
        assert x.decay is not None and factors.ln_chunk_decay is not None
        assert scores is not None and products is not None
        tensors = x.q, x.k, x.decay, factors.ln_chunk_decay, scores, products
        secondary_scores(self.cut.chunks, *tensors, x.scale, self.config)
        return Terms(*ut_transform(self.cut.chunks, x.k, x.decay, x.beta, products), scores, factors)

    def with_scores(self, x: DeltaInputs, terms: Terms) -> Terms:
        return terms

    def terms_again(
        self, x: DeltaInputs, ut: Tensor, gates: Tensor, log2_bounds: Tensor | None, scores: Tensor
    ) -> Terms:
        return Terms(ut, gates, log2_bounds, scores, self._factors(x, None)[0])

    def gradients(
        self, x: DeltaInputs, terms: Terms, do: Tensor, recomputed: Recomputed, d_final: Tensor | None,
        d_initial: Tensor | None, heads: range, grads: Grads,
    ) -> None:  # fmt: skip
        each = Recomputed(*(torch.empty_like(y) for y in recomputed))
        reverse_scan(
            self.cut, x, terms, do, self.how, d_final=d_final, d_initial=d_initial, rows=heads, each=each
        )  # fmt: skip
        delta_gradients(self.cut.chunks, x, do, terms, recomputed, *each, grads, self.config.max_ln_decay, heads)
        secondary_gradients(self.cut.chunks, x, do, terms, recomputed.u, each.u, grads, self.config, heads)

    def _factors(self, x: DeltaInputs, scale: float | None) -> tuple[Factors, Tensor | None, Tensor | None]:
        assert x.decay is not None
        return delta_factors(self.cut.chunks, x.q, x.k, x.decay, scale, self.config.max_ln_decay)
