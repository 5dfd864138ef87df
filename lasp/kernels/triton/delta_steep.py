"""The delta rule with a diagonal decay: gradients within steep chunks, whose decay is beyond 2 `reach` (math §8).

`delta_grads` leaves out what the tokens of such a chunk give each other; here it is added, in sub-chunks of 16 as in
`delta_diagonal`. Most often there is no such chunk.
"""

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.config import block_of
from lasp.kernels.triton.delta_config import DeltaConfig
from lasp.kernels.triton.delta_diagonal import SUB, advance_weights, key_weights, sub_chunk_sums
from lasp.kernels.triton.diagonal_chunk import add_rows, load_rows

CHUNKS = 8  # that one program looks at


@triton.jit
def _within_chunk(
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


@triton.jit(do_not_specialize=["FIRST_HEAD"])
def _steep_gradients(
    q,  # [tokens, Hq, K]
    k,
    do,  # [tokens, H, V]
    decay,  # [tokens, H, K]
    gates,  # [chunks, H, 4, C] fp32: beta first
    spread,  # [chunks, H] fp32
    u,  # [tokens, HEADS, V]
    dr,
    dq,  # [tokens, H, K]
    dk,
    d_decay,  # [tokens, H, K]
    d_beta,  # [tokens, H]
    start,
    length,
    scale,
    COUNT,
    H,
    G,
    FIRST_HEAD,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    REACH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, heads, row = tl.program_id(0).to(tl.int64) * N, tl.num_programs(1), tl.arange(0, C)
    h = FIRST_HEAD + tl.program_id(1)
    looked = first + tl.arange(0, N)
    spreads = tl.load(spread + looked * H + h, mask=looked < COUNT, other=0.0)
    if tl.max(spreads) > 2 * REACH:
        for chunk in range(first, tl.minimum(first + N, COUNT)):
            if tl.load(spread + chunk * H + h) > 2 * REACH:
                begin, count = tl.load(start + chunk), tl.load(length + chunk)
                here = row < count
                betas = tl.load(gates + (chunk * H + h) * 4 * C + row)
                p = tl.zeros([C, C], tl.float32)
                n, pt, nt = p, p, p
                for block in range((V + BV - 1) // BV):
                    cols = block * BV + tl.arange(0, BV)
                    uc = load_rows(u, begin, here, tl.program_id(1), heads, cols, V)
                    drc = load_rows(dr, begin, here, tl.program_id(1), heads, cols, V)
                    doc = load_rows(do, begin, here, h, H, cols, V).to(uc.dtype)
                    p = tl.dot(doc, tl.trans(uc), p, input_precision=PRECISION)
                    n = tl.dot(drc, tl.trans(uc), n, input_precision=PRECISION)
                    pt = tl.dot(uc, tl.trans(doc), pt, input_precision=PRECISION)
                    nt = tl.dot(uc, tl.trans(drc), nt, input_precision=PRECISION)
                work: tl.constexpr = u.dtype.element_ty
                p = tl.where(row[:, None] >= row[None, :], p * scale, 0.0).to(work)
                n = tl.where(row[:, None] > row[None, :], n, 0.0).to(work)
                pt = tl.where(row[:, None] <= row[None, :], pt * scale, 0.0).to(work)
                nt = tl.where(row[:, None] < row[None, :], nt * -betas[None, :], 0.0).to(work)
                d_betas = tl.zeros([C], tl.float32)
                for block in range((K + BK - 1) // BK):
                    cols = block * BK + tl.arange(0, BK)
                    qc = load_rows(q, begin, here, h // G, H // G, cols, K).to(tl.float32)
                    kc = load_rows(k, begin, here, h // G, H // G, cols, K).to(tl.float32)
                    g = load_rows(decay, begin, here, h, H, cols, K).to(tl.float32)
                    to_q, to_w, to_k, change = _within_chunk(
                        q,
                        k,
                        decay,
                        qc,
                        kc,
                        g,
                        p,
                        n,
                        pt,
                        nt,
                        betas,
                        begin,
                        here,
                        count,
                        h,
                        cols,
                        H,
                        G,
                        K,
                        REACH,
                        PRECISION,
                    )
                    add_rows(dq, to_q, begin, here, h, H, cols, K)
                    add_rows(dk, to_k - betas[:, None] * to_w, begin, here, h, H, cols, K)
                    add_rows(d_decay, tl.cumsum(change, axis=0, reverse=True), begin, here, h, H, cols, K)
                    d_betas -= tl.sum(kc * to_w, axis=1)
                add_rows(d_beta, d_betas[:, None], begin, here, h, H, tl.arange(0, 1), 1)


def steep_gradients(
    chunks: Tiles,
    q: Tensor,
    k: Tensor,
    do: Tensor,
    decay: Tensor,
    gates: Tensor,
    spread: Tensor,
    u: Tensor,
    dr: Tensor,
    found: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor],
    scale: float,
    config: DeltaConfig,
    head_range: range,
) -> None:
    """Adds to dq, dk, d_decay and d_beta of `found` (see `delta_grads.gradients`)."""
    dq, dk, _, d_decay, d_beta = found
    (heads, value_dim), (q_heads, key_dim) = do.shape[2:], q.shape[2:]
    _steep_gradients[triton.cdiv(chunks.count, CHUNKS), len(head_range)](
        q, k, do, decay, gates, spread, u, dr, dq, dk, d_decay, d_beta, chunks.start, chunks.length,
        scale, chunks.count, heads, heads // q_heads, head_range.start,
        K=key_dim, V=value_dim, BK=min(32, block_of(key_dim)), BV=min(64, block_of(value_dim)), C=chunks.size,
        N=CHUNKS, REACH=config.reach, PRECISION=config.precision, num_warps=8, num_stages=1,
    )  # fmt: skip
