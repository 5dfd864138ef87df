"""The delta rule's gradients chunk by chunk, given the state X that enters each and the gradient G of what leaves it.

With u and dr from the two scans, e_ij = e^{b_i - b_j}, and w_i = e^{b_i} X dr_i + Σ_{j<i} e_ij (dr_i·u_j) k_j:

    dq_i = e^{b_i} X do_i + Σ_{j<=i} e_ij (do_i·u_j) k_j                    dv_i = beta_i dr_i
    dk_i = -beta_i w_i  +  e^{b_C - b_i} G u_i + Σ_{j>=i} e_ji (do_j·u_i) q_j - Σ_{j>i} beta_j e_ji (dr_j·u_i) k_j
    dbeta_i = dr_i·v_i - k_i·w_i
    db_i = q_i·dq_i + k_i·(the first part of dk_i - the rest)               dg_t = Σ_{i>=t} db_i + <X', G>

With a diagonal decay e, q, k have channels, and so has db. It is q̃ = q e^{b - b_C/2} and k e^{b - b_C/2} that then meet
k̃ = k e^{b_C/2 - b}, unless a channel decays by more than e^{-2 max_ln_decay} in the chunk (see `secondary`).
X' is the state that leaves the chunk: the sum in dg never spans more than a chunk (math §2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.inputs import DeltaInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.delta.backend import Grads, Recomputed, Terms
from lasp.kernels.triton.delta.config import DeltaConfig, scan_decay
from lasp.kernels.triton.delta.rescale import channel_sums
from lasp.kernels.triton.device import block_of
from lasp.kernels.triton.diagonal.gradients import gate_sums
from lasp.kernels.triton.diagonal.rescale import load_half
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.shared.decay import DIAGONAL, SCALAR, unless_shut
from lasp.kernels.triton.shared.rows import load_decays, store_rows
from lasp.kernels.triton.shared.tiles import CHUNK


@triton.jit(do_not_specialize=["FIRST_HEAD", "STEP"])
def _gradients(
    q,  # [tokens, Hq, K]
    k,
    v,  # [tokens, H, V]
    do,
    decay,  # [tokens, H], or [tokens, H, K] if DIAGONAL
    ln_chunk_decay,  # [chunks, H] fp32, if DIAGONAL
    gates,  # [chunks, H, 4, C]: beta, b, e^b, e^{b_C - b}
    u,  # [tokens, HEADS, V]
    dr,
    states,  # [chunks, HEADS, V, K]: X
    grads,  # [chunks, HEADS, V, K]: G
    dq,  # [tokens, H // STEP, K]
    dk,
    dv,  # [tokens, H, V]
    d_decay,  # [tokens, H], or [tokens, H, K] if DIAGONAL
    d_beta,
    start,
    length,
    scale,
    H,
    G,
    FIRST_HEAD,
    STEP,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    LEARNED: tl.constexpr,
    ADD: tl.constexpr,  # to the dq and dk of heads before
    MAX_LN_DECAY: tl.constexpr, BY_PRODUCTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk, row, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    h = FIRST_HEAD + row * STEP
    begin, count = tl.load(start + chunk), tl.load(length + chunk)
    i = tl.arange(0, C)
    here, tokens = i < count, begin + i
    work = u.dtype.element_ty
    q_at, k_at = q + (begin * (H // G) + h // G) * K, k + (begin * (H // G) + h // G) * K
    v += (begin * H + h) * V
    do += (begin * H + h) * V
    dv += (begin * H + h) * V
    u += (begin * heads + row) * V
    dr += (begin * heads + row) * V
    dq += (begin * (H // STEP) + h // STEP) * K
    dk += (begin * (H // STEP) + h // STEP) * K
    states += (chunk * heads + row) * K * V
    grads += (chunk * heads + row) * K * V
    gates += (chunk * H + h) * 4 * C
    betas = tl.load(gates + i).to(tl.float32)

    upto, below = i[:, None] >= i[None, :], i[:, None] > i[None, :]
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    rows = tl.arange(0, BV)
    uc, doc, drc, here_v = _values(u, do, dr, i, here, rows, heads * V, H * V, V)

    p = tl.zeros([C, C], tl.float32)  # [i, j]: do_i·u_j
    n, pt, nt = p, p, p  # dr_i·u_j; both transposed, computed anew: [j, i]
    d_betas = tl.zeros([C], tl.float32)
    for block in tl.static_range(BLOCKS):
        if block > 0:
            rows = block * BV + tl.arange(0, BV)
            uc, doc, drc, here_v = _values(u, do, dr, i, here, rows, heads * V, H * V, V)
        vc = tl.load(v + (i * (H * V))[:, None] + rows[None, :], mask=here_v, other=0.0)
        d_betas += tl.sum(drc.to(tl.float32) * vc.to(tl.float32), axis=1)
        dvc = betas[:, None] * drc.to(tl.float32)
        tl.store(dv + (i * (H * V))[:, None] + rows[None, :], dvc.to(dv.dtype.element_ty), mask=here_v)
        p = tl.dot(doc, tl.trans(uc), p, input_precision=PRECISION)
        n = tl.dot(drc, tl.trans(uc), n, input_precision=PRECISION)
        pt = tl.dot(uc, tl.trans(doc), pt, input_precision=PRECISION)
        nt = tl.dot(uc, tl.trans(drc), nt, input_precision=PRECISION)
    nt *= -betas[None, :]
    if DECAY == SCALAR:
        b = tl.load(gates + C + i)
        from_start, to_end = tl.load(gates + 2 * C + i).to(tl.float32), tl.load(gates + 3 * C + i).to(tl.float32)
        total = tl.load(gates + 3 * C - 1).to(tl.float32)
        down, up = (b[:, None] - b[None, :]).to(tl.float32), (b[None, :] - b[:, None]).to(tl.float32)
        down, up = tl.minimum(down, 0.0), tl.minimum(up, 0.0)
        p, n, pt, nt = p * tl.exp(down), n * tl.exp(down), pt * tl.exp(up), nt * tl.exp(up)
    if DECAY == DIAGONAL:  # what the tokens of such a chunk give each other is left to secondary
        half = load_half(ln_chunk_decay, chunk * H + h, 2 * MAX_LN_DECAY)
        upto, below = upto & (half > 0.0), below & (half > 0.0)
    p = tl.where(upto, p * scale, 0.0).to(work)
    n = tl.where(below, n, 0.0).to(work)
    pt = tl.where(tl.trans(upto), pt * scale, 0.0).to(work)
    nt = tl.where(tl.trans(below), nt, 0.0).to(work)

    # In fp32 dg is the sum of what does not cancel: what enters and is read, what is written and leaves, and pairs.
    PAIRS: tl.constexpr = LEARNED and DECAY != DIAGONAL and work == tl.float32
    qk = tl.zeros([C, C], tl.float32)
    kk, leaving = qk, tl.zeros([C], tl.float32)
    change = leaving  # db
    carried = tl.zeros([BK], tl.float32)  # <X', G>
    for block_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        cols = block_k * BK + tl.arange(0, BK)
        dqc = tl.zeros([C, BK], tl.float32)
        wc, dkc = dqc, dqc
        overlap = tl.zeros([BK], tl.float32)  # rowsum(X ⊙ G)
        for block in tl.static_range(BLOCKS):
            rows = block * BV + tl.arange(0, BV)
            if BLOCKS > 1:
                uc, doc, drc, here_v = _values(u, do, dr, i, here, rows, heads * V, H * V, V)
            inside = (rows < V)[:, None] & (cols < K)[None, :]
            xc = tl.load(states + rows[:, None] * K + cols[None, :], mask=inside, other=0.0)
            gc = tl.load(grads + rows[:, None] * K + cols[None, :], mask=inside, other=0.0)
            dqc = tl.dot(doc, xc, dqc, input_precision=PRECISION)
            wc = tl.dot(drc, xc, wc, input_precision=PRECISION)
            dkc = tl.dot(uc, gc, dkc, input_precision=PRECISION)
            if LEARNED:
                overlap += tl.sum(xc.to(tl.float32) * gc.to(tl.float32), axis=0)
        here_k = here[:, None] & (cols < K)[None, :]
        qc = tl.load(q_at + (i * (H // G * K))[:, None] + cols[None, :], mask=here_k, other=0.0).to(work)
        kc = tl.load(k_at + (i * (H // G * K))[:, None] + cols[None, :], mask=here_k, other=0.0).to(work)
        q32, k32 = qc.to(tl.float32), kc.to(tl.float32)
        dqc *= scale
        if DECAY == DIAGONAL:
            g = load_decays(decay, begin, here, h, H, cols, K)
            end = half * tl.sum(g, axis=0)[None, :]
            up, down = channel_sums(g, BY_PRODUCTS)
            reading, writing = tl.exp(up - end), tl.exp(down - end)
            q_read, k_read = (q32 * reading).to(work), (k32 * reading).to(work)
            written = (k32 * writing).to(work)
            between = tl.exp(end)
            dkc *= between
            kept = written.to(tl.float32) * dkc
            dqc = tl.dot(p, written, dqc * between, input_precision=PRECISION)
            wc = tl.dot(n, written, wc * between, input_precision=PRECISION)
            dkc = tl.dot(pt, q_read, dkc, input_precision=PRECISION)
            dkc = tl.dot(nt, k_read, dkc, input_precision=PRECISION)
            db = q_read.to(tl.float32) * dqc - betas[:, None] * (k_read.to(tl.float32) * wc)
            db -= written.to(tl.float32) * dkc - kept
            dg = gate_sums(db, kept, BY_PRODUCTS) + (tl.exp(tl.sum(g, axis=0)) * overlap)[None, :]
            store_rows(d_decay, unless_shut(dg, g), begin, here, h, H, cols, K)
            dqc, wc, dkc = reading * dqc, reading * wc, writing * dkc
        else:
            if DECAY == SCALAR:
                dqc *= from_start[:, None]
                wc *= from_start[:, None]
                dkc *= to_end[:, None]
            if PAIRS:
                carried += total * overlap
                leaving += tl.sum(k32 * dkc, axis=1)
                change += tl.sum(q32 * dqc, axis=1) - betas * tl.sum(k32 * wc, axis=1)
                qk = tl.dot(qc, tl.trans(kc), qk, input_precision=PRECISION)
                kk = tl.dot(kc, tl.trans(kc), kk, input_precision=PRECISION)
            elif LEARNED:
                carried += total * overlap + tl.sum(k32 * dkc, axis=0)
            dqc = tl.dot(p, kc, dqc, input_precision=PRECISION)
            wc = tl.dot(n, kc, wc, input_precision=PRECISION)
            dkc = tl.dot(pt, qc, dkc, input_precision=PRECISION)
            dkc = tl.dot(nt, kc, dkc, input_precision=PRECISION)
        k_w = tl.sum(k32 * wc, axis=1)
        d_betas -= k_w
        if LEARNED and DECAY != DIAGONAL and not PAIRS:
            change += tl.sum(q32 * dqc - k32 * dkc, axis=1) - betas * k_w
        dkc -= betas[:, None] * wc
        at = (i * (H // STEP * K))[:, None] + cols[None, :]
        if ADD:
            dqc += tl.load(dq + at, mask=here_k, other=0.0).to(tl.float32)
            dkc += tl.load(dk + at, mask=here_k, other=0.0).to(tl.float32)
        tl.store(dq + at, dqc.to(dq.dtype.element_ty), mask=here_k)
        tl.store(dk + at, dkc.to(dk.dtype.element_ty), mask=here_k)
    tl.store(d_beta + tokens * H + h, d_betas.to(d_beta.dtype.element_ty), mask=here)
    if LEARNED and DECAY != DIAGONAL:
        if PAIRS:
            pairs = tl.where(below, p * qk - betas[:, None] * (n * kk), 0.0)
            change += tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)
        dg = tl.sum(tl.where(upto, change[:, None], leaving[:, None]), axis=0) + tl.sum(carried, axis=0)
        g = tl.load(decay + tokens * H + h, mask=here, other=0.0)
        tl.store(d_decay + tokens * H + h, unless_shut(dg, g).to(d_decay.dtype.element_ty), mask=here)


@triton.jit
def _values(u, do, dr, i, here, rows, u_stride, v_stride, V: tl.constexpr):
    """A block of columns of u, do and dr, and which of its places there are. One block alone is loaded once."""
    here_v = here[:, None] & (rows < V)[None, :]
    at_u = (i * u_stride)[:, None] + rows[None, :]
    uc = tl.load(u + at_u, mask=here_v, other=0.0)
    doc = tl.load(do + (i * v_stride)[:, None] + rows[None, :], mask=here_v, other=0.0).to(uc.dtype)
    return uc, doc, tl.load(dr + at_u, mask=here_v, other=0.0), here_v


def gradients(
    chunks: Tiles, x: DeltaInputs, do: Tensor, terms: Terms, recomputed: Recomputed, dr: Tensor, d_states: Tensor,
    grads: Grads, config: DeltaConfig, heads: range,
) -> None:  # fmt: skip
    """Fills `grads` for the heads of `heads`."""
    (all_heads, value_dim), (q_heads, key_dim) = x.v.shape[2:], x.k.shape[2:]
    how, (u, states) = config.gradients, recomputed
    block_k, block_v = how.block, min(block_of(value_dim), how.block_v)
    if key_dim <= block_k and u.dtype != torch.float32:  # no loop: ptxas 12.8 makes code of narrow products then that
        block_k = block_of(key_dim)  # reads a descriptor which nothing has written (tests/kernels/machine_code.py)
    launch(
        _gradients, (chunks.count, len(heads)),
        x.q, x.k, x.v, do, x.decay, terms.factors.ln_chunk_decay, terms.gates, u, dr, states, d_states, *grads,
        chunks.start, chunks.length, x.scale, all_heads, all_heads // q_heads, heads.start, heads.step,
        K=key_dim, V=value_dim, BK=block_k, BV=block_v, C=CHUNK, DECAY=scan_decay(x.decay).value,
        LEARNED=grads.d_decay is not None, ADD=grads.are_added(heads), MAX_LN_DECAY=config.max_ln_decay,
        BY_PRODUCTS=config.sums_by_products, PRECISION=config.precision, STAGES=how.stages, num_warps=how.warps,
    )  # fmt: skip
