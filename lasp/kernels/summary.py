"""What a run of tokens does to the state before it: X -> A X + S  (math §1).

A transition A is one of four classes, told apart by its rank against that of the state `[..., H, K, V]`:

    None                 identity                    linear attention without decay
    [..., H]             log of a scalar per head    lightning, retention, Mamba-2, simple GLA
    [..., H, K]          log of a diagonal           GLA, HGRN2
    [..., H, K, K]       a matrix                    the delta family

Logarithms are natural and accumulate by addition; everything is fp32 (fp64 for fp64 inputs).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# A gate with so large a log decay, or a larger one, is shut: its exponential is 0 in the state's dtype, and so is its
# gradient. Wherever logarithms are summed and differences taken it counts as this, since -inf - -inf is not a number.
SHUT = {torch.float32: -104.0, torch.float64: -746.0}


@dataclass(frozen=True)
class Summary:
    """State `S` [N, H, K, V] that a run of tokens leaves when it starts from zero, and its transition `A`."""

    state: Tensor
    transition: Tensor | None = None


def apply(transition: Tensor | None, state: Tensor) -> Tensor:
    """A X for X [..., H, K, V]."""
    if transition is None:
        return state
    if transition.ndim == state.ndim:
        return transition @ state
    return _weights(transition, state) * state


def apply_transposed(transition: Tensor | None, state: Tensor) -> Tensor:
    """Aᵀ G for G [..., H, K, V]: the same as `apply` for the classes that are diagonal."""
    if transition is not None and transition.ndim == state.ndim:
        return transition.mT @ state
    return apply(transition, state)


def as_matrix(log_decay: Tensor | None, like: Tensor) -> Tensor:
    """The diagonal matrix [..., K, K] of a log decay [..., H] or [..., H, K]; K, dtype, device as `like`."""
    eye = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    if log_decay is None:
        return eye
    return eye * _weights(log_decay, like) if log_decay.ndim == like.ndim - 2 else eye * log_decay.exp()[..., None]


def _weights(log_decay: Tensor, state: Tensor) -> Tensor:
    """exp(log decay) with dimensions of size one where the state has K or V."""
    return log_decay.exp().reshape(log_decay.shape + (1,) * (state.ndim - log_decay.ndim))
