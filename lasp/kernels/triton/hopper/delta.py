"""The kernels of the delta rule for Hopper."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.inputs import DeltaInputs
from lasp.kernels.triton.delta.backend import Cut, Grads, Recomputed, Terms
from lasp.kernels.triton.delta.config import OUTPUTS, STATES, SUMMARY, HopperLaunch
from lasp.kernels.triton.delta.portable import Portable
from lasp.kernels.triton.delta.rescale import Factors
from lasp.kernels.triton.delta.secondary import secondary_gradients
from lasp.kernels.triton.device import HOPPER_HEAD
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
    states_at_once = 1
    adds_d_beta = False

    def terms(self, x: DeltaInputs) -> Terms:
        ut, gates = ut_transform(self.cut.chunks, x.k, x.decay, x.beta)
        return Terms(ut, gates, None, Factors(x.q, x.k, x.k))

    def with_scores(self, x: DeltaInputs, terms: Terms) -> Terms:
        return terms._replace(scores=torch.empty_like(terms.ut))

    def terms_again(self, x: DeltaInputs, ut: Tensor, gates: Tensor, scores: Tensor) -> Terms:
        return Terms(ut, gates, scores, Factors(x.q, x.k, x.k))

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
class HopperDiagonal(Portable):
    """With a vector gate, heads of 128 in bf16."""

    how = HopperLaunch.of(HOPPER_HEAD, HOPPER_HEAD)
    adds_d_beta = True

    def diagonal_factors(self, x: DeltaInputs, scale: float | None) -> tuple[Factors, Tensor | None, Tensor | None]:
        assert x.decay is not None
        return delta_factors(self.cut.chunks, x.q, x.k, x.decay, scale, self.config.max_ln_decay)

    def ut_transform(self, x: DeltaInputs, products: Tensor | None) -> tuple[Tensor, Tensor]:
        return ut_transform(self.cut.chunks, x.k, x.decay, x.beta, products)

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
        dr, d_states = torch.empty_like(recomputed.u), torch.empty_like(recomputed.states)
        each = Recomputed(dr, d_states)
        reverse_scan(self.cut, x, terms, do, self.how, d_final=d_final, d_initial=d_initial, rows=heads, each=each)
        steep = self.config.max_ln_decay
        delta_gradients(self.cut.chunks, x, do, terms, recomputed, dr, d_states, grads, steep, heads)
        secondary_gradients(self.cut.chunks, x, do, terms, recomputed.u, dr, grads, self.config, heads)
