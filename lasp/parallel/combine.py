"""The algebra that turns units' summaries into the states between them (math §1, §5). Pure, no communication.

    forward    X_c = Σ_{c'<c} A_{c-1} … A_{c'+1} S_{c'}       the state that enters unit c
    backward   G_c = Σ_{c'>c} A_{c+1}ᵀ … A_{c'-1}ᵀ D_{c'}      the gradient of the state that leaves it

`states` (S or D) and `transitions` are in unit order, [U, ..., H, K, V] and as in `lasp.kernels.summary`. `breaks[c]`
says that nothing passes through unit c, since a document starts in it (backward: ends in it). Which units reach which
is known on the host, so that nothing is indexed and nothing masked: a decay of -inf meets no +inf.
"""

import torch
from torch import Tensor

from lasp.kernels.summary import apply, apply_transposed

Breaks = tuple[bool, ...]  # of every unit of the sequence, whether nothing passes through it


def combine(states: Tensor, transitions: Tensor | None, breaks: Breaks, units: list[int], *, backward: bool) -> Tensor:
    """[len(units), ...]: X or, if `backward`, G of the given units, which are ascending."""
    by_matrix = transitions is not None and transitions.ndim == states.ndim
    arrived: dict[int, Tensor | None] = {}
    for unit in units[:: -1 if backward else 1]:
        if by_matrix:
            assert transitions is not None
            arrived[unit] = _chained(states, transitions, breaks, unit, arrived, backward)
        else:
            arrived[unit] = _weighted(states, transitions, breaks, unit, backward)
    return torch.stack([torch.zeros_like(states[0]) if (x := arrived[u]) is None else x for u in units])


def pass_unit(x: Tensor, state: Tensor, transition: Tensor | None, breaks: bool, *, backward: bool) -> Tensor:
    """A X + S, the state behind a unit, or Aᵀ G + D, the gradient before it."""
    return state if breaks else (apply_transposed if backward else apply)(transition, x) + state


def reach(breaks: Breaks, unit: int, *, backward: bool) -> int:
    """How many units before (backward: behind) `unit` reach it: up to the nearest through which nothing passes."""
    beyond = breaks[unit + 1 :] if backward else breaks[:unit][::-1]
    return beyond.index(True) + 1 if True in beyond else len(beyond)


def _weighted(states: Tensor, transitions: Tensor | None, breaks: Breaks, unit: int, backward: bool) -> Tensor | None:
    """A sum with weights, for transitions that commute. The logarithms are summed from the unit outwards, and never
    differenced (math §8)."""
    count = reach(breaks, unit, backward=backward)
    if not count:
        return None
    near, between = (unit + 1, slice(unit + 1, unit + count)) if backward else (unit - 1, slice(unit - count + 1, unit))
    far = states[unit + 2 : unit + count + 1] if backward else states[unit - count : unit - 1]
    if count == 1:
        return states[near]
    if transitions is None:
        return states[near] + far.sum(0)
    logs = transitions[between]
    logs = logs.cumsum(0) if backward else logs.flip(0).cumsum(0).flip(0)
    weights = logs.exp().reshape(logs.shape + (1,) * (states.ndim - logs.ndim))
    return states[near] + (weights * far).sum(0)


def _chained(
    states: Tensor,
    transitions: Tensor,
    breaks: Breaks,
    unit: int,
    arrived: dict[int, Tensor | None],
    backward: bool,
) -> Tensor | None:
    """Unit by unit, for matrices; from the nearest unit already computed, if the way leads past it."""
    step, x = (-1 if backward else 1), None
    way = range(unit - step * reach(breaks, unit, backward=backward), unit, step)
    for passed in reversed(way):
        if (x := arrived.get(passed)) is not None:
            way = range(passed, unit, step)
            break
    for passed in way:
        state, transition = states[passed], transitions[passed]
        x = state if x is None else pass_unit(x, state, transition, breaks[passed], backward=backward)
    return x
