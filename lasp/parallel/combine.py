"""The algebra that turns units' summaries into the states between them (math §1, §5). Pure, no communication.

`states` and `transitions` are in unit order, [U, ..., H, K, V] and as in `lasp.kernels.summary`. `breaks[c]` says that
nothing passes through unit c, since a document starts in it (backward: ends in it). A boolean, since a decay of -inf
would make NaN of -inf + inf.
"""

import torch
from torch import Tensor

from lasp.kernels.summary import apply, apply_transposed


def entering_states(states: Tensor, transitions: Tensor | None, breaks: list[bool]) -> Tensor:
    """X_c = Σ_{c'<c} A_{c-1} … A_{c'+1} S_{c'}, the state that enters each unit."""
    entering, x = torch.empty_like(states), torch.zeros_like(states[0])
    for c in range(len(states)):
        entering[c] = x
        x = pass_unit(x, states[c], None if transitions is None else transitions[c], breaks[c])
    return entering


def leaving_gradients(d: Tensor, transitions: Tensor | None, breaks: list[bool]) -> Tensor:
    """G_c = Σ_{c'>c} A_{c+1}ᵀ … A_{c'-1}ᵀ D_{c'}, the gradient of the state that leaves each unit."""
    leaving, g = torch.empty_like(d), torch.zeros_like(d[0])
    for c in reversed(range(len(d))):
        leaving[c] = g
        g = pass_unit_back(g, d[c], None if transitions is None else transitions[c], breaks[c])
    return leaving


def pass_unit(x: Tensor, state: Tensor, transition: Tensor | None, breaks: bool) -> Tensor:
    """A X + S: the state behind a unit."""
    return state if breaks else apply(transition, x) + state


def pass_unit_back(g: Tensor, d: Tensor, transition: Tensor | None, breaks: bool) -> Tensor:
    """Aᵀ G + D: the gradient before a unit."""
    return d if breaks else apply_transposed(transition, g) + d
