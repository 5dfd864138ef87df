"""Rows of tensors [tokens, heads, D] in kernels: those of consecutive tokens of one head."""

import triton
import triton.language as tl

from lasp.kernels.triton.shared.decay import bounded


@triton.jit
def here_rows(here, cols, D: tl.constexpr):
    """Mask of a block of rows [C, BD]."""
    return here[:, None] if cols.shape[0] == D else here[:, None] & (cols < D)[None, :]


@triton.jit
def rows_at(token, here, head, heads, cols, D: tl.constexpr):
    """Where C rows of x [tokens, heads, D] from `token` on lie: the first as 64 bits, the others from there as 32."""
    return (token * heads + head) * D, tl.arange(0, here.shape[0])[:, None] * (heads * D) + cols[None, :]


@triton.jit
def load_rows(x, token, here, head, heads, cols, D: tl.constexpr):
    """[C, BD], zero where there is no token or no column."""
    base, offsets = rows_at(token, here, head, heads, cols, D)
    return tl.load((x + base) + offsets, mask=here_rows(here, cols, D), other=0.0)


@triton.jit
def load_decays(decay, token, here, h, H, cols, K: tl.constexpr):
    """[C, BK] in fp32, bounded: zero where there is no token."""
    return bounded(load_rows(decay, token, here, h, H, cols, K))


@triton.jit
def store_rows(x, value, token, here, head, heads, cols, D: tl.constexpr):
    base, offsets = rows_at(token, here, head, heads, cols, D)
    tl.store((x + base) + offsets, value, mask=here_rows(here, cols, D))


@triton.jit
def add_rows(x, value, token, here, head, heads, cols, D: tl.constexpr):
    store_rows(x, value + load_rows(x, token, here, head, heads, cols, D), token, here, head, heads, cols, D)
