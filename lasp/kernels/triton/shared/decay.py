"""Decays as kernels name them, and log decays of constant and scalar gates."""

import triton
import triton.language as tl

from lasp.kernels.decay import Decay

LOG2_E = tl.constexpr(1.4426950408889634)
NONE, CONSTANT, SCALAR, DIAGONAL = (tl.constexpr(int(decay)) for decay in Decay)


@triton.jit
def scalar_decay(decay, tokens, here, h, H, DECAY: tl.constexpr):
    """Log decay of a chunk's tokens, [C]; zero outside the tile, so that empty places do not decay the state."""
    if DECAY == CONSTANT:
        return tl.where(here, tl.load(decay + h).to(tl.float32), 0.0)
    else:
        return tl.load(decay + tokens * H + h, mask=here, other=0.0).to(tl.float32)


@triton.jit
def log2_rate(decay, h):
    """The log2 decay of one token, given those of the heads, [H], as natural logarithms."""
    return tl.load(decay + h).to(tl.float32) * LOG2_E
