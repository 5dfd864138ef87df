"""What a run of tokens does to the state before it: X -> A X + S  (math §1).

Logarithms are natural and accumulate by addition; everything is fp32 (fp64 for fp64 inputs).
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

# A gate with so large a log decay, or a larger one, is shut: its exponential is 0 in the state's dtype, and so is its
# gradient. Wherever logarithms are summed and differences taken it counts as this, since -inf - -inf is not a number.
SHUT = {torch.float32: -104.0, torch.float64: -746.0}


class Transition(IntEnum):
    """The classes of A. A tensor's is told by its rank against that of the state `[..., H, K, V]`."""

    IDENTITY = 0  # None                linear attention without decay
    SCALAR = 1  # [..., H]        log   lightning, retention, Mamba-2, simple GLA
    DIAGONAL = 2  # [..., H, K]   log   GLA, HGRN2
    MATRIX = 3  # [..., H, K, K]        the delta family

    @classmethod
    def of(cls, transition: Tensor | None, state: Tensor) -> "Transition":
        return cls.IDENTITY if transition is None else cls(transition.ndim - state.ndim + 3)


@dataclass(frozen=True)
class Summary:
    """State `S` [N, H, K, V] that a run of tokens leaves when it starts from zero, and its transition `A`."""

    state: Tensor
    transition: Tensor | None = None


def factor_of(transition: Tensor | None, state: Tensor) -> Tensor | None:
    """What multiplies a state: a matrix as it is, a logarithm as weights with dimensions of size one where the state
    has K or V."""
    kind = Transition.of(transition, state)
    if transition is None or kind == Transition.MATRIX:
        return transition
    return transition.exp().reshape(*transition.shape, *(1,) * (Transition.MATRIX - kind))


def apply(transition: Tensor | None, state: Tensor) -> Tensor:
    """A X for X [..., H, K, V]."""
    factor = factor_of(transition, state)
    if factor is None:
        return state
    return factor @ state if Transition.of(transition, state) == Transition.MATRIX else factor * state


def apply_transposed(transition: Tensor | None, state: Tensor) -> Tensor:
    """Aᵀ G for G [..., H, K, V]: the same as `apply` for the classes that are diagonal."""
    if transition is not None and Transition.of(transition, state) == Transition.MATRIX:
        return transition.mT @ state
    return apply(transition, state)


def as_matrix(transition: Tensor | None, like: Tensor) -> Tensor:
    """The diagonal matrix [..., K, K] of a transition that is not one; K, dtype, device as `like` [..., K]."""
    eye = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    factor = factor_of(transition, like)
    return eye if factor is None else eye * factor


def compose(transitions: Tensor, states: Tensor) -> Tensor:
    """The product A_n … A_1 of consecutive transitions [n, ..., H, ...]; states: [n, ..., H, K, V], for their shape."""
    if Transition.of(transitions, states) != Transition.MATRIX:
        return transitions.sum(0)
    whole = transitions[0]
    for transition in transitions[1:]:
        whole = transition @ whole
    return whole
