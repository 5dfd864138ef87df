"""The delta rule with a diagonal decay: what the scans read instead of q and k, and scores within chunks (math §8).

    q⁺_i = q_i e^{b_i}    k⁺_i = k_i e^{b_i}    k⁻_i = k_i e^{b_C - b_i}    P_ij = scale q_i·(e^{b_i - b_j} k_j), j <= i

b is the cumulative gate [K] from the chunk's start, so no exponent is above zero. q⁺ and k⁺ meet the state that enters
the chunk, k⁻ is what is written. The exponents of P and of k_i·(e^{b_i - b_j} k_j), which becomes T, are split at half
of the chunk's decay, b_C/2, and so stay within `max_ln_decay` but for chunks that decay more (see `secondary`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.delta.config import DeltaConfig
from lasp.kernels.triton.device import block_of
from lasp.kernels.triton.diagonal.gradients import weighted_sums
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.shared.rows import load_decays, load_rows, store_rows


class Factors(NamedTuple):
    """q, k: what reads the state that enters a chunk; written: what is written into it; [B, T, H or Hq, K].

    With a diagonal decay: ln_ends, b_C [chunks, H, K], and ln_chunk_decay, the largest -b_C [chunks, H], in fp32;
    else q and k themselves.
    """

    q: Tensor
    k: Tensor
    written: Tensor
    ln_ends: Tensor | None = None
    ln_chunk_decay: Tensor | None = None


@triton.jit
def _factors(
    q,  # [tokens, Hq, K]
    k,
    decay,  # [tokens, H, K]
    q_read,  # [tokens, H, K]: q⁺
    k_read,  # k⁺
    written,  # k⁻
    ln_ends,  # [chunks, H, K] fp32
    ln_chunk_decay,  # [chunks, H] fp32
    scores,  # [tokens, H, C]: P, if SCORES
    products,  # [tokens, H, C] fp32: k_i·(e^{b_i - b_j} k_j) for j < i, if SCORES
    start, length, scale, H, G,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SCORES: tl.constexpr, MAX_LN_DECAY: tl.constexpr,
    BY_PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, count = tl.load(start + chunk), tl.load(length + chunk)
    row = tl.arange(0, C)
    here = row < count
    work = k_read.dtype.element_ty
    p, m = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    widest = 0.0
    for block in range((K + BK - 1) // BK):
        cols = block * BK + tl.arange(0, BK)
        qc = load_rows(q, begin, here, h // G, H // G, cols, K).to(tl.float32)
        kc = load_rows(k, begin, here, h // G, H // G, cols, K).to(tl.float32)
        g = load_decays(decay, begin, here, h, H, cols, K)
        up, down = channel_sums(g, BY_PRODUCTS)
        from_start, to_end = tl.exp(up), tl.exp(down)
        store_rows(q_read, (qc * from_start).to(work), begin, here, h, H, cols, K)
        store_rows(k_read, (kc * from_start).to(work), begin, here, h, H, cols, K)
        store_rows(written, (kc * to_end).to(work), begin, here, h, H, cols, K)
        end = tl.sum(g, axis=0)
        tl.store(ln_ends + (chunk * H + h) * K + cols, end, mask=cols < K)
        widest = tl.maximum(widest, tl.max(-end))
        if SCORES:
            half = 0.5 * end[None, :]
            reading = tl.exp(tl.minimum(up - half, MAX_LN_DECAY))
            kt = tl.trans((kc * tl.exp(tl.minimum(down - half, MAX_LN_DECAY))).to(work))
            p = tl.dot((qc * reading).to(work), kt, p, input_precision=PRECISION)
            m = tl.dot((kc * reading).to(work), kt, m, input_precision=PRECISION)
    tl.store(ln_chunk_decay + chunk * H + h, widest)
    if SCORES:
        store_scores(scores, products, p, m, scale, begin, here, h, H)


@triton.jit
def store_scores(scores, products, p, m, scale, begin, here, h, H):
    """Both [C, C] as far as they are meant: beyond, exponents are above zero."""
    row = tl.arange(0, p.shape[0])
    p = tl.where(row[:, None] >= row[None, :], p * scale, 0.0)
    m = tl.where(row[:, None] > row[None, :], m, 0.0)
    store_rows(scores, p.to(scores.dtype.element_ty), begin, here, h, H, row, p.shape[0])
    store_rows(products, m, begin, here, h, H, row, p.shape[0])


@triton.jit
def channel_sums(g, BY_PRODUCTS: tl.constexpr):
    """b_i and b_C - b_i [C, BK]; sums by products come in the layout of what they scale."""
    if BY_PRODUCTS:
        t, j = tl.arange(0, g.shape[0])[:, None], tl.arange(0, g.shape[0])[None, :]
        up = weighted_sums((j <= t).to(tl.bfloat16), g, False)
    else:
        up = tl.cumsum(g, axis=0)
    return up, sums_after(g, BY_PRODUCTS, False)


@triton.jit
def sums_after(g, BY_PRODUCTS: tl.constexpr, EXACT: tl.constexpr):
    """b_C - b_t."""
    if BY_PRODUCTS:
        t, j = tl.arange(0, g.shape[0])[:, None], tl.arange(0, g.shape[0])[None, :]
        return weighted_sums((j > t).to(tl.bfloat16), g, EXACT)
    else:
        return tl.cumsum(g, axis=0, reverse=True) - g


def diagonal_factors(
    chunks: Tiles,
    q: Tensor,
    k: Tensor,
    decay: Tensor,
    dtype: torch.dtype,
    config: DeltaConfig,
    scale: float | None,
) -> tuple[Factors, Tensor | None, Tensor | None]:
    """q⁺, k⁺, k⁻ [B, T, H, K] in `dtype`; with a scale also P in `dtype`, products for T in fp32 [B, T, H, C].

    The last two of chunks that decay more than 2 max_ln_decay are left to `secondary`.
    """
    (heads, key_dim), q_heads = decay.shape[2:], q.shape[2]
    read_q, read_k, written = (torch.empty_like(decay, dtype=dtype) for _ in range(3))
    ln_ends = decay.new_empty(chunks.count, heads, key_dim, dtype=torch.float32)
    ln_chunk_decay = decay.new_empty(chunks.count, heads, dtype=torch.float32)
    scores = products = None
    if scale is not None:
        scores = decay.new_empty(*decay.shape[:3], chunks.size, dtype=dtype)
        products = torch.empty_like(scores, dtype=torch.float32)
    how = config.factors
    launch(
        _factors, (chunks.count, heads),
        q, k, decay, read_q, read_k, written, ln_ends, ln_chunk_decay, scores, products, chunks.start, chunks.length,
        scale or 1.0, heads, heads // q_heads, K=key_dim, BK=min(how.block, block_of(key_dim)), C=chunks.size,
        SCORES=scale is not None, MAX_LN_DECAY=config.max_ln_decay, BY_PRODUCTS=config.sums_by_products,
        PRECISION=config.precision, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return Factors(read_q, read_k, written, ln_ends, ln_chunk_decay), scores, products
