"""Levels in kernels: the bit length of two places' xor."""

import triton
import triton.language as tl


@triton.jit
def bit_length(x):
    """Of integers from 0 to 2^24 - 1: the exponent of a float."""
    return tl.maximum((x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)


@triton.jit
def level_of(position, origin, LEAF: tl.constexpr, LOG_LEAF: tl.constexpr):
    """Of positions within a document up to 2^24 leaves."""
    x = position ^ origin
    above = x // LEAF
    return tl.where(above > 0, LOG_LEAF + bit_length(above), bit_length(x))


@triton.jit
def scales_at(scales, level, tokens, here, h, H, L):
    """[C] the scales of the queries at these tokens (levels: one, or one of each), 0 where there is none."""
    return tl.load(scales + (tokens * H + h) * L + level, mask=here & (level < L), other=0.0).to(tl.float32)


@triton.jit
def add_share(d_scales, level, share, tokens, here, h, H, L, FIRST: tl.constexpr):
    """Adds to the gradients of the scales at one level, or at one of each query; FIRST: nothing is there yet."""
    at = d_scales + (tokens * H + h) * L + level
    here &= level < L
    if not FIRST:
        tl.debug_barrier()  # what is there comes from this program
        share += tl.load(at, mask=here, other=0.0)
    tl.store(at, share, mask=here)
