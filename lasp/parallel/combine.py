"""The algebra that turns units' summaries into the states between them (math §1, §5). Pure, no communication.

    forward    X_c = Σ_{c'<c} A_{c-1} … A_{c'+1} S_{c'}       the state that enters unit c
    backward   G_c = Σ_{c'>c} A_{c+1}ᵀ … A_{c'-1}ᵀ D_{c'}      the gradient of the state that leaves it

`states` (S or D) are in unit order, each [B, H, K, V], and so are `factors`: transitions as `Affine.factors_of` makes
them. Which units reach which is known on the host, so that nothing is indexed and nothing masked: a decay of -inf meets
no +inf.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lasp.kernels.summary import apply, apply_transposed, factor_of

Breaks = tuple[bool, ...]  # of every unit of the sequence, whether nothing passes through it
Factors = Sequence[Tensor] | None
FEW = 4  # units up to which a chain of single steps takes fewer kernels than a sum with weights


class Algebra(Protocol):
    """What exchanges need to know of states, in one direction (forward or backward) of one sequence."""

    def factors_of(self, transitions: Tensor | None, states: Tensor) -> Any:
        """What `combine` is given of the units' transitions [units, ...], in both directions."""

    def combine(self, states: Sequence[Tensor], factors: Any, units: Sequence[int]) -> Tensor:
        """[len(units), ...]: what enters (backward: the gradient of what leaves) the given units, which are ascending,
        out of all units' summaries in their order."""

    def extend(self, state: Tensor, transition: Tensor | None, start: Tensor) -> Tensor:
        """What leaves a run of tokens (backward: the gradient of what enters it) where `start` enters instead of
        nothing, its own contribution being `state`."""


@dataclass(frozen=True)
class Affine:
    """Of X -> A X + S, for all classes of A (lasp.kernels.summary).

    breaks[c] says that nothing passes through unit c, since a document starts in it (backward: ends in it).
    """

    breaks: Breaks
    backward: bool

    @staticmethod
    def factors_of(transitions: Tensor | None, states: Tensor) -> Tensor | None:
        """Contiguous, so that they keep no message alive that they lie in."""
        factors = factor_of(transitions, states)
        return None if factors is None else factors.contiguous()

    def extend(self, state: Tensor, transition: Tensor | None, start: Tensor) -> Tensor:
        return state + (apply_transposed if self.backward else apply)(transition, start)

    def combine(self, states: Sequence[Tensor], factors: Factors, units: Sequence[int]) -> Tensor:
        """[len(units), B, H, K, V]: X or, if backward, G."""
        result = states[0].new_empty(len(units), *states[0].shape)
        by_matrix = factors is not None and factors[0].shape[-1] > 1
        found: dict[int, Tensor] = {}
        for unit, out in list(zip(units, result.unbind(), strict=True))[:: -1 if self.backward else 1]:
            count, step = self.reach(unit), -1 if self.backward else 1
            way = range(unit - step * count, unit, step)
            if count == 0:
                out.zero_()
            elif count <= FEW or by_matrix:
                found[unit] = self._chained(states, factors, way, found, out)
            else:
                found[unit] = _weighted(states, factors, way[::-1], out)
        return result

    def pass_unit(
        self, x: Tensor, state: Tensor, factor: Tensor | None, unit: int, out: Tensor | None = None
    ) -> Tensor:
        """A X + S, the state behind a unit, or Aᵀ G + D, the gradient before it; [B, H, K, V], but for the factor."""
        if self.breaks[unit]:
            return state if out is None else out.copy_(state)
        if factor is None:
            return torch.add(state, x, out=out)
        if factor.shape[-1] == 1:
            return torch.addcmul(state, factor, x, out=out)
        matrix = factor.mT if self.backward else factor
        product = torch.baddbmm(
            *(y.flatten(0, 1) for y in (state, matrix, x)), out=None if out is None else out.flatten(0, 1)
        )
        return product.view(state.shape)

    def reach(self, unit: int) -> int:
        """How many units before (backward: behind) `unit` reach it: up to the nearest that nothing passes through."""
        beyond = self.breaks[unit + 1 :] if self.backward else self.breaks[:unit][::-1]
        return beyond.index(True) + 1 if True in beyond else len(beyond)

    def _chained(
        self, states: Sequence[Tensor], factors: Factors, way: range, found: dict[int, Tensor], out: Tensor
    ) -> Tensor:
        """Step by step, for matrices and for few units; from the last unit already found, if the way leads past one."""
        known = [place for place, unit in enumerate(way) if unit in found]
        x, way = (found[way[known[-1]]], way[known[-1] :]) if known else (states[way[0]], way[1:])
        if not way:
            return out.copy_(x)
        for unit in way:
            factor, into = None if factors is None else factors[unit], out if unit == way[-1] else None
            x = self.pass_unit(x, states[unit], factor, unit, into)
        return x


def _weighted(states: Sequence[Tensor], factors: Factors, outwards: range, out: Tensor) -> Tensor:
    """A sum with weights, for transitions that commute. They are products of factors, taken from the unit outwards."""
    if factors is None:
        return torch.sum(torch.stack([states[unit] for unit in outwards]), 0, out=out)
    weights = torch.stack([factors[unit] for unit in outwards[:-1]]).cumprod(0)
    far = torch.stack([states[unit] for unit in outwards[1:]]).mul_(weights)
    return torch.sum(far, 0, out=out).add_(states[outwards[0]])
