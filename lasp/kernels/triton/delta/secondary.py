"""The delta rule with a diagonal decay, secondary chunking: scores and gradients of chunks that decay by more than
2 `max_ln_decay` (math §8).

`rescale` and `gradients` leave out what the tokens of such a chunk give each other; here it is put in, in
sub-chunks of 16: exponents are split at the start of i's sub-chunk. Those of keys before it fall to zero or below;
within it they rise, up to `max_ln_decay`, and where a gate decays more than that, the sub-chunk's own scores come one
diagonal at a time in fp32. Most often there is no such chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.inputs import DeltaInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.delta.backend import Grads, Terms
from lasp.kernels.triton.delta.config import DeltaConfig
from lasp.kernels.triton.delta.rescale import store_scores
from lasp.kernels.triton.device import cdiv
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.shared.decay import unless_shut
from lasp.kernels.triton.shared.rows import add_rows, load_decays, load_rows

SUB = tl.constexpr(16)
CHUNKS = 8  # that one program looks at


@triton.jit
def sub_chunk_sums(g):
    """Gates [C, BK] from a sub-chunk's start up to each token, and from after each token to the sub-chunk's end."""
    shape: tl.constexpr = [g.shape[0] // SUB, SUB, g.shape[1]]
    parts = tl.reshape(g, shape)
    up = tl.reshape(tl.cumsum(parts, axis=1), g.shape)
    return up, tl.reshape(tl.cumsum(parts, axis=1, reverse=True), g.shape) - g


@triton.jit
def key_weights(past, up, n, largest, MAX_LN_DECAY: tl.constexpr):
    """[C, BK]: e^{b at the start of sub-chunk n - b_j} for the keys that its queries meet by products, else zero."""
    now = (tl.arange(0, up.shape[0]) // SUB == n)[:, None]
    return past + tl.where(now, tl.exp(tl.minimum(-up, MAX_LN_DECAY)), 0.0) * tl.where(largest > MAX_LN_DECAY, 0.0, 1.0)


@triton.jit
def advance_weights(past, g, down, n):
    """The weights of past keys, rescaled to the start of the next sub-chunk."""
    now = (tl.arange(0, g.shape[0]) // SUB == n)[:, None]
    return past * tl.exp(tl.sum(tl.where(now, g, 0.0), axis=0))[None, :] + tl.where(now, tl.exp(down), 0.0)


@triton.jit
def _any_secondary(ln_chunk_decay, first, COUNT, h, H, N: tl.constexpr, MAX_LN_DECAY: tl.constexpr):
    chunk = first + tl.arange(0, N)
    return tl.max(tl.load(ln_chunk_decay + chunk * H + h, mask=chunk < COUNT, other=0.0)) > 2 * MAX_LN_DECAY


@triton.jit
def _secondary_scores(
    q,  # [tokens, Hq, K]
    k,
    decay,  # [tokens, H, K]
    ln_chunk_decay,  # [chunks, H] fp32
    scores,  # [tokens, H, C]
    products,  # [tokens, H, C] fp32
    start, length, scale, COUNT, H, G,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, N: tl.constexpr, MAX_LN_DECAY: tl.constexpr,
    WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, h, row = tl.program_id(0).to(tl.int64) * N, tl.program_id(1), tl.arange(0, C)
    if _any_secondary(ln_chunk_decay, first, COUNT, h, H, N, MAX_LN_DECAY):
        for chunk in range(first, tl.minimum(first + N, COUNT)):
            if tl.load(ln_chunk_decay + chunk * H + h) > 2 * MAX_LN_DECAY:
                begin, count = tl.load(start + chunk), tl.load(length + chunk)
                here = row < count
                p, m = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
                for block in range((K + BK - 1) // BK):
                    cols = block * BK + tl.arange(0, BK)
                    qc = load_rows(q, begin, here, h // G, H // G, cols, K).to(tl.float32)
                    kc = load_rows(k, begin, here, h // G, H // G, cols, K).to(tl.float32)
                    g = load_decays(decay, begin, here, h, H, cols, K)
                    up, down = sub_chunk_sums(g)
                    largest = tl.max(-(up + down))
                    e_up = tl.exp(up)
                    past = tl.zeros([C, BK], tl.float32)
                    for n in range(C // SUB):
                        now = (row // SUB == n)[:, None]
                        kt = tl.trans((kc * key_weights(past, up, n, largest, MAX_LN_DECAY)).to(WORK))
                        p = tl.dot(tl.where(now, qc * e_up, 0.0).to(WORK), kt, p, input_precision=PRECISION)
                        m = tl.dot(tl.where(now, kc * e_up, 0.0).to(WORK), kt, m, input_precision=PRECISION)
                        past = advance_weights(past, g, down, n)
                    if largest > MAX_LN_DECAY:
                        gap = tl.zeros([C, BK], tl.float32)
                        for d in range(SUB):
                            behind = here & (row % SUB >= d)
                            k_behind = load_rows(k, begin - d, behind, h // G, H // G, cols, K).to(tl.float32)
                            k_behind *= tl.exp(gap)
                            at = row[None, :] == row[:, None] - d
                            p += tl.where(at, tl.sum(qc * k_behind, axis=1)[:, None], 0.0)
                            m += tl.where(at, tl.sum(kc * k_behind, axis=1)[:, None], 0.0)
                            gap += load_decays(decay, begin - d, behind, h, H, cols, K)
                store_scores(scores, products, p, m, scale, begin, here, h, H)


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
    betas, begin, here, count, h, cols, H, G,
    K: tl.constexpr, MAX_LN_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk's tokens give each other: of dq_i, of w_i, of dk_j as far as it is written, and of db.

    What cancels in db is the same rounded numbers, whether it comes from the query's or the key's side.
    """
    row = tl.arange(0, qc.shape[0])
    work: tl.constexpr = p.dtype
    up, down = sub_chunk_sums(g)
    largest = tl.max(-(up + down))
    e_up = tl.exp(up)
    zero = tl.zeros_like(qc)
    dq, w, dk, change, past = zero, zero, zero, zero, zero
    for i in range(qc.shape[0] // SUB):
        now = (row // SUB == i)[:, None]
        weight = key_weights(past, up, i, largest, MAX_LN_DECAY)
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
    if largest > MAX_LN_DECAY:
        gap, gap_ahead = zero, zero
        for d in range(SUB):  # i with j = i - d, and j with i = j + d
            behind, ahead = here & (row % SUB >= d), (row % SUB + d < SUB) & (row + d < count)
            at_behind, at_ahead = row[None, :] == row[:, None] - d, row[None, :] == row[:, None] + d
            if d > 0:
                gap_ahead += load_decays(decay, begin + d, ahead, h, H, cols, K)
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
            gap += load_decays(decay, begin - d, behind, h, H, cols, K)
    return dq, w, dk, change


@triton.jit(do_not_specialize=["FIRST_HEAD", "STEP"])
def _secondary_gradients(
    q,  # [tokens, Hq, K]
    k,
    do,  # [tokens, H, V]
    decay,  # [tokens, H, K]
    gates,  # [chunks, H, 4, C]: beta first
    ln_chunk_decay,  # [chunks, H] fp32
    u,  # [tokens, HEADS, V]
    dr,
    dq,  # [tokens, H // STEP, K]
    dk,
    d_decay,  # [tokens, H, K]
    d_beta,  # [tokens, H]
    start, length, scale, COUNT, H, G, FIRST_HEAD, STEP,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    MAX_LN_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, heads, row = tl.program_id(0).to(tl.int64) * N, tl.num_programs(1), tl.arange(0, C)
    h = FIRST_HEAD + tl.program_id(1) * STEP
    if _any_secondary(ln_chunk_decay, first, COUNT, h, H, N, MAX_LN_DECAY):
        for chunk in range(first, tl.minimum(first + N, COUNT)):
            if tl.load(ln_chunk_decay + chunk * H + h) > 2 * MAX_LN_DECAY:
                begin, count = tl.load(start + chunk), tl.load(length + chunk)
                here = row < count
                betas = tl.load(gates + (chunk * H + h) * 4 * C + row).to(tl.float32)
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
                    g = load_decays(decay, begin, here, h, H, cols, K)
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
                        MAX_LN_DECAY,
                        PRECISION,
                    )
                    add_rows(dq, to_q, begin, here, h // STEP, H // STEP, cols, K)
                    add_rows(dk, to_k - betas[:, None] * to_w, begin, here, h // STEP, H // STEP, cols, K)
                    dg = unless_shut(tl.cumsum(change, axis=0, reverse=True), g)
                    add_rows(d_decay, dg, begin, here, h, H, cols, K)
                    d_betas -= tl.sum(kc * to_w, axis=1)
                add_rows(d_beta, d_betas[:, None], begin, here, h, H, tl.arange(0, 1), 1)


def secondary_scores(
    chunks: Tiles,
    q: Tensor,
    k: Tensor,
    decay: Tensor,
    ln_chunk_decay: Tensor,
    scores: Tensor,
    products: Tensor,
    scale: float,
    config: DeltaConfig,
) -> None:
    """Writes P and the products for T of such chunks (see `rescale`)."""
    (heads, key_dim), q_heads = decay.shape[2:], q.shape[2]
    launch(
        _secondary_scores, (cdiv(chunks.count, CHUNKS), heads),
        q, k, decay, ln_chunk_decay, scores, products, chunks.start, chunks.length,
        scale, chunks.count, heads, heads // q_heads,
        K=key_dim, BK=32, C=chunks.size, N=CHUNKS, MAX_LN_DECAY=config.max_ln_decay,
        WORK=tl.bfloat16 if scores.dtype == torch.bfloat16 else tl.float32, PRECISION=config.precision,
        num_warps=4, num_stages=1,
    )  # fmt: skip


def secondary_gradients(
    chunks: Tiles,
    x: DeltaInputs,
    do: Tensor,
    terms: Terms,
    u: Tensor,
    dr: Tensor,
    grads: Grads,
    config: DeltaConfig,
    heads: range,
) -> None:
    """Adds to dq, dk, d_decay and d_beta of `grads` (see `gradients`)."""
    (all_heads, value_dim), (q_heads, key_dim) = do.shape[2:], x.q.shape[2:]
    launch(
        _secondary_gradients, (cdiv(chunks.count, CHUNKS), len(heads)),
        x.q, x.k, do, x.decay, terms.gates, terms.factors.ln_chunk_decay, u, dr, grads.dq, grads.dk, grads.d_decay,
        grads.d_beta, chunks.start, chunks.length, x.scale, chunks.count, all_heads, all_heads // q_heads, heads.start,
        heads.step, K=key_dim, V=value_dim, BK=32, BV=32, C=chunks.size, N=CHUNKS, MAX_LN_DECAY=config.max_ln_decay,
        PRECISION=config.precision, num_warps=8, num_stages=1,
    )  # fmt: skip
