"""The algebra that turns units' summaries into the states between them (math §1, §5). Pure, no communication.

    forward    X_c = Σ_{c'<c} A_{c-1} … A_{c'+1} S_{c'}       the state that enters unit c
    backward   G_c = Σ_{c'>c} A_{c+1}ᵀ … A_{c'-1}ᵀ D_{c'}      the gradient of the state that leaves it

`states` (S or D) are in unit order, each [B, H, K, V], and so are `factors`: transitions as `factors_of` makes them.
`breaks[c]` says that nothing passes through unit c, since a document starts in it (backward: ends in it). Which units
reach which is known on the host, so that nothing is indexed and nothing masked: a decay of -inf meets no +inf.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Breaks = tuple[bool, ...]  # of every unit of the sequence, whether nothing passes through it
Factors = Sequence[Tensor] | None
FEW = 4  # units up to which a chain of single steps takes fewer kernels than a sum with weights


def factors_of(transitions: Tensor | None, states: Tensor) -> Tensor | None:
    """What multiplies states, given transitions as in `lasp.kernels.summary`: matrices as they are, logarithms as
    weights with dimensions of size one where the state has K or V. They keep no message alive that they lie in."""
    if transitions is None:
        return None
    if transitions.ndim == states.ndim:
        return transitions.contiguous()
    return transitions.exp().view(*transitions.shape, *(1,) * (states.ndim - transitions.ndim))


def combine(
    states: Sequence[Tensor], factors: Factors, breaks: Breaks, units: Sequence[int], *, backward: bool
) -> Tensor:
    """[len(units), B, H, K, V]: X or, if `backward`, G of the given units, which are ascending."""
    result = states[0].new_empty(len(units), *states[0].shape)
    by_matrix = factors is not None and factors[0].shape[-1] > 1
    found: dict[int, Tensor] = {}
    for unit, out in list(zip(units, result.unbind(), strict=True))[:: -1 if backward else 1]:
        count, step = reach(breaks, unit, backward=backward), -1 if backward else 1
        way = range(unit - step * count, unit, step)
        if count == 0:
            out.zero_()
        elif count <= FEW or by_matrix:
            found[unit] = _chained(states, factors, breaks, way, found, out, backward)
        else:
            found[unit] = _weighted(states, factors, way[::-1], out)
    return result


def pass_unit(
    x: Tensor, state: Tensor, factor: Tensor | None, breaks: bool, *, backward: bool, out: Tensor | None = None
) -> Tensor:
    """A X + S, the state behind a unit, or Aᵀ G + D, the gradient before it; all [B, H, K, V] but for A's factor."""
    if breaks:
        return state if out is None else out.copy_(state)
    if factor is None:
        return torch.add(state, x, out=out)
    if factor.shape[-1] == 1:
        return torch.addcmul(state, factor, x, out=out)
    matrix = factor.mT if backward else factor
    product = torch.baddbmm(
        *(y.flatten(0, 1) for y in (state, matrix, x)), out=None if out is None else out.flatten(0, 1)
    )
    return product.view(state.shape)


def reach(breaks: Breaks, unit: int, *, backward: bool) -> int:
    """How many units before (backward: behind) `unit` reach it: up to the nearest through which nothing passes."""
    beyond = breaks[unit + 1 :] if backward else breaks[:unit][::-1]
    return beyond.index(True) + 1 if True in beyond else len(beyond)


def _chained(
    states: Sequence[Tensor],
    factors: Factors,
    breaks: Breaks,
    way: range,
    found: dict[int, Tensor],
    out: Tensor,
    backward: bool,
) -> Tensor:
    """Step by step, for matrices and for few units; from the last unit already found, if the way leads past one."""
    known = [place for place, unit in enumerate(way) if unit in found]
    x, way = (found[way[known[-1]]], way[known[-1] :]) if known else (states[way[0]], way[1:])
    if not way:
        return out.copy_(x)
    for unit in way:
        factor, into = None if factors is None else factors[unit], out if unit == way[-1] else None
        x = pass_unit(x, states[unit], factor, breaks[unit], backward=backward, out=into)
    return x


def _weighted(states: Sequence[Tensor], factors: Factors, outwards: range, out: Tensor) -> Tensor:
    """A sum with weights, for transitions that commute. They are products of factors, taken from the unit outwards."""
    if factors is None:
        return torch.sum(torch.stack([states[unit] for unit in outwards]), 0, out=out)
    weights = torch.stack([factors[unit] for unit in outwards[:-1]]).cumprod(0)
    far = torch.stack([states[unit] for unit in outwards[1:]]).mul_(weights)
    return torch.sum(far, 0, out=out).add_(states[outwards[0]])
