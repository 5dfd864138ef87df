"""The delta rule with a diagonal decay: what enters the walks instead of q and k, and scores within chunks (math §8).

    q⁺_i = q_i e^{b_i}    k⁺_i = k_i e^{b_i}    k⁻_i = k_i e^{b_C - b_i}    P_ij = scale q_i·(e^{b_i - b_j} k_j), j <= i

b is the cumulative gate [K] from the chunk's start, so no exponent is above zero. q⁺ and k⁺ meet the state that enters
the chunk, k⁻ is what is written. The exponents of P and of k_i·(e^{b_i - b_j} k_j), which becomes T, are split at the
start of i's sub-chunk of 16: those of keys before it fall to zero or below. Within the sub-chunk they rise, up to
`reach`; where a gate is steeper than that, the sub-chunk's own scores come one diagonal at a time in fp32.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.config import block_of
from lasp.kernels.triton.delta_config import DeltaConfig
from lasp.kernels.triton.diagonal_chunk import load_rows, store_rows

SUB = tl.constexpr(16)


@dataclass(frozen=True)
class Factors:
    """q, k: what reads the state that enters a chunk; written: what is written into it; [B, T, H or Hq, K].

    With a diagonal decay: totals, e^{b_C} [chunks, H, K], and spread, the largest -b_C [chunks, H], in fp32; else
    q and k themselves.
    """

    q: Tensor
    k: Tensor
    written: Tensor
    totals: Tensor | None = None
    spread: Tensor | None = None


@triton.jit
def sub_chunk_sums(g):
    """Gates [C, BK] from a sub-chunk's start up to each token, and from after each token to the sub-chunk's end."""
    shape: tl.constexpr = [g.shape[0] // SUB, SUB, g.shape[1]]
    parts = tl.reshape(g, shape)
    up = tl.reshape(tl.cumsum(parts, axis=1), g.shape)
    return up, tl.reshape(tl.cumsum(parts, axis=1, reverse=True), g.shape) - g


@triton.jit
def key_weights(past, up, n, steepest, REACH: tl.constexpr):
    """[C, BK]: e^{b at the start of sub-chunk n - b_j} for the keys that its queries meet by products, else zero."""
    now = (tl.arange(0, up.shape[0]) // SUB == n)[:, None]
    return past + tl.where(now, tl.exp(tl.minimum(-up, REACH)), 0.0) * tl.where(steepest > REACH, 0.0, 1.0)


@triton.jit
def advance_weights(past, g, down, n):
    """The weights of past keys, referred to the start of the next sub-chunk."""
    now = (tl.arange(0, g.shape[0]) // SUB == n)[:, None]
    return past * tl.exp(tl.sum(tl.where(now, g, 0.0), axis=0))[None, :] + tl.where(now, tl.exp(down), 0.0)


@triton.jit
def _factors(
    q,  # [tokens, Hq, K]
    k,
    decay,  # [tokens, H, K]
    q_read,  # [tokens, H, K]: q⁺
    k_read,  # k⁺
    written,  # k⁻
    totals,  # [chunks, H, K] fp32
    spread,  # [chunks, H] fp32
    scores,  # [tokens, H, C]: P, if SCORES
    products,  # [tokens, H, C] fp32: k_i·(e^{b_i - b_j} k_j), if SCORES; right for j < i
    start,
    length,
    scale,
    H,
    G,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SCORES: tl.constexpr,
    REACH: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
        g = load_rows(decay, begin, here, h, H, cols, K).to(tl.float32)
        from_start = tl.exp(tl.cumsum(g, axis=0))
        to_end = tl.exp(tl.cumsum(g, axis=0, reverse=True) - g)
        store_rows(q_read, (qc * from_start).to(work), begin, here, h, H, cols, K)
        store_rows(k_read, (kc * from_start).to(work), begin, here, h, H, cols, K)
        store_rows(written, (kc * to_end).to(work), begin, here, h, H, cols, K)
        end = tl.sum(g, axis=0)
        tl.store(totals + (chunk * H + h) * K + cols, tl.exp(end), mask=cols < K)
        widest = tl.maximum(widest, tl.max(-end))
        if SCORES:
            up, down = sub_chunk_sums(g)
            steepest = tl.max(-(up + down))
            e_up = tl.exp(up)
            past = tl.zeros([C, BK], tl.float32)
            for n in range(C // SUB):
                now = (row // SUB == n)[:, None]
                kt = tl.trans((kc * key_weights(past, up, n, steepest, REACH)).to(work))
                p = tl.dot(tl.where(now, qc * e_up, 0.0).to(work), kt, p, input_precision=PRECISION)
                m = tl.dot(tl.where(now, kc * e_up, 0.0).to(work), kt, m, input_precision=PRECISION)
                past = advance_weights(past, g, down, n)
            if steepest > REACH:
                gap = tl.zeros([C, BK], tl.float32)
                for d in range(SUB):
                    behind = here & (row % SUB >= d)
                    k_behind = load_rows(k, begin - d, behind, h // G, H // G, cols, K).to(tl.float32) * tl.exp(gap)
                    at = row[None, :] == row[:, None] - d
                    p += tl.where(at, tl.sum(qc * k_behind, axis=1)[:, None], 0.0)
                    m += tl.where(at, tl.sum(kc * k_behind, axis=1)[:, None], 0.0)
                    gap += load_rows(decay, begin - d, behind, h, H, cols, K).to(tl.float32)
    tl.store(spread + chunk * H + h, widest)
    if SCORES:
        p = tl.where(row[:, None] >= row[None, :], p * scale, 0.0)
        store_rows(scores, p.to(scores.dtype.element_ty), begin, here, h, H, row, C)
        store_rows(products, m, begin, here, h, H, row, C)


def diagonal_factors(
    chunks: Tiles,
    q: Tensor,
    k: Tensor,
    decay: Tensor,
    dtype: torch.dtype,
    config: DeltaConfig,
    scale: float | None,
) -> tuple[Factors, Tensor | None, Tensor | None]:
    """q⁺, k⁺, k⁻ [B, T, H, K] in `dtype`; with a scale also P in `dtype`, products for T in fp32 [B, T, H, C]."""
    (heads, key_dim), q_heads = decay.shape[2:], q.shape[2]
    read_q, read_k, written = (torch.empty_like(decay, dtype=dtype) for _ in range(3))
    totals = decay.new_empty(chunks.count, heads, key_dim, dtype=torch.float32)
    spread = decay.new_empty(chunks.count, heads, dtype=torch.float32)
    scores = products = None
    if scale is not None:
        scores = decay.new_empty(*decay.shape[:3], chunks.size, dtype=dtype)
        products = torch.empty_like(scores, dtype=torch.float32)
    launch = config.factors
    _factors[chunks.count, heads](
        q, k, decay, read_q, read_k, written, totals, spread, scores, products, chunks.start, chunks.length,
        scale or 1.0, heads, heads // q_heads, K=key_dim, BK=min(launch.block, block_of(key_dim)), C=chunks.size,
        SCORES=scale is not None, REACH=config.reach, PRECISION=config.precision,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return Factors(read_q, read_k, written, totals, spread), scores, products
