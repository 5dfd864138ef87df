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

    totals: e^{b_C} [chunks, H, K] in fp32 for a diagonal decay. Without one, q and k themselves, and scalars elsewhere.
    """

    q: Tensor
    k: Tensor
    written: Tensor
    totals: Tensor | None = None


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
        tl.store(totals + (chunk * H + h) * K + cols, tl.exp(tl.sum(g, axis=0)), mask=cols < K)
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
    """q⁺, k⁺, k⁻ [B, T, H, K] in `dtype`; with a scale also P in `dtype`, the products for T in fp32 [B, T, H, C]."""
    (heads, key_dim), q_heads = decay.shape[2:], q.shape[2]
    read_q, read_k, written = (torch.empty_like(decay, dtype=dtype) for _ in range(3))
    totals = decay.new_empty(chunks.count, heads, key_dim, dtype=torch.float32)
    scores = products = None
    if scale is not None:
        scores = decay.new_empty(*decay.shape[:3], chunks.size, dtype=dtype)
        products = torch.empty_like(scores, dtype=torch.float32)
    launch = config.factors
    _factors[chunks.count, heads](
        q, k, decay, read_q, read_k, written, totals, scores, products, chunks.start, chunks.length, scale or 1.0,
        heads, heads // q_heads, K=key_dim, BK=min(launch.block, block_of(key_dim)), C=chunks.size,
        SCORES=scale is not None, REACH=config.reach, PRECISION=config.precision,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return Factors(read_q, read_k, written, totals), scores, products


@triton.jit
def within_chunk_grads(
    q,  # [tokens, Hq, K]
    k,
    decay,  # [tokens, H, K]
    qc,  # [C, BK], fp32
    kc,
    g,
    p,  # [i, j]: scale do_i·u_j for j <= i
    n,  # [i, j]: dr_i·u_j for j < i
    pt,  # [j, i]: the first transposed
    nt,  # [j, i]: the second transposed, times -beta_i
    betas,
    begin,
    here,
    count,
    h,
    cols,
    H,
    G,
    K: tl.constexpr,
    REACH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a chunk's tokens give each other: of dq_i, of w_i, of dk_j as far as it is written, and of db.

    What cancels in db is the same rounded numbers, whether it comes from the query's or the key's side.
    """
    row = tl.arange(0, qc.shape[0])
    work: tl.constexpr = p.dtype
    up, down = sub_chunk_sums(g)
    steepest = tl.max(-(up + down))
    e_up = tl.exp(up)
    zero = tl.zeros_like(qc)
    dq, w, dk, change, past = zero, zero, zero, zero, zero
    for i in range(qc.shape[0] // SUB):
        now = (row // SUB == i)[:, None]
        weight = key_weights(past, up, i, steepest, REACH)
        q_now, r_now = tl.where(now, qc * e_up, 0.0).to(work), tl.where(now, kc * e_up, 0.0).to(work)
        k_past = (kc * weight).to(work)
        to_q = tl.where(now, tl.dot(p, k_past, input_precision=PRECISION), 0.0)
        to_w = tl.where(now, tl.dot(n, k_past, input_precision=PRECISION), 0.0)
        to_k = tl.dot(pt, q_now, input_precision=PRECISION)
        to_k = tl.dot(nt, r_now, to_k, input_precision=PRECISION)
        dq += e_up * to_q
        w += e_up * to_w
        dk += weight * to_k
        change += q_now.to(tl.float32) * to_q - betas[:, None] * r_now.to(tl.float32) * to_w
        change -= k_past.to(tl.float32) * to_k
        past = advance_weights(past, g, down, i)
    if steepest > REACH:
        gap, gap_ahead = zero, zero
        for d in range(SUB):  # i with j = i - d, and j with i = j + d
            behind, ahead = here & (row % SUB >= d), (row % SUB + d < SUB) & (row + d < count)
            at_behind, at_ahead = row[None, :] == row[:, None] - d, row[None, :] == row[:, None] + d
            if d > 0:
                gap_ahead += load_rows(decay, begin + d, ahead, h, H, cols, K).to(tl.float32)
            k_behind = load_rows(k, begin - d, behind, h // G, H // G, cols, K).to(tl.float32) * tl.exp(gap)
            q_ahead = load_rows(q, begin + d, ahead, h // G, H // G, cols, K).to(tl.float32) * tl.exp(gap_ahead)
            k_ahead = load_rows(k, begin + d, ahead, h // G, H // G, cols, K).to(tl.float32) * tl.exp(gap_ahead)
            to_q = k_behind * tl.sum(tl.where(at_behind, p.to(tl.float32), 0.0), axis=1)[:, None]
            to_w = k_behind * tl.sum(tl.where(at_behind, n.to(tl.float32), 0.0), axis=1)[:, None]
            to_k = q_ahead * tl.sum(tl.where(at_ahead, pt.to(tl.float32), 0.0), axis=1)[:, None]
            to_k += k_ahead * tl.sum(tl.where(at_ahead, nt.to(tl.float32), 0.0), axis=1)[:, None]
            dq += to_q
            w += to_w
            dk += to_k
            if d > 0:  # a token's own score does not decay
                change += qc * to_q - betas[:, None] * kc * to_w - kc * to_k
            gap += load_rows(decay, begin - d, behind, h, H, cols, K).to(tl.float32)
    return dq, w, dk, change
