"""Decays as kernels name them, and log decays of constant and scalar gates.

A gate that is shut (summary.SHUT) counts as just shut, so that differences of sums stay numbers; its gradient is 0.
Sums over a chunk then reach some thousands, where fp32 numbers lie 5e-4 apart. That is less than bf16 and fp16 lose
anyway; for fp32 inputs sums are fp64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.summary import SHUT as SHUT_GATES

LOG2_E = tl.constexpr(1.4426950408889634)
SHUT = tl.constexpr(SHUT_GATES[torch.float32])
NONE, CONSTANT, SCALAR, DIAGONAL = (tl.constexpr(int(decay)) for decay in Decay)


def sums_dtype(v: Tensor) -> torch.dtype:
    """Of sums of gates."""
    return torch.float64 if v.dtype == torch.float32 else torch.float32


@triton.jit
def bounded(decay):
    """Log decays as they were loaded, in fp32; no less than SHUT."""
    decay = decay.to(tl.float32)
    return tl.where(decay < SHUT, SHUT, decay)


@triton.jit
def unless_shut(grad, decay):
    """The gradients of gates, zero where they are shut."""
    return tl.where(decay <= SHUT, 0.0, grad)


@triton.jit
def scalar_decay(decay, tokens, here, h, H, DECAY: tl.constexpr):
    """Log decay of a chunk's tokens, [C]; zero outside the tile, so that empty places do not decay the state."""
    if DECAY == CONSTANT:
        return tl.where(here, bounded(tl.load(decay + h)), 0.0)
    else:
        return bounded(tl.load(decay + tokens * H + h, mask=here, other=0.0))
