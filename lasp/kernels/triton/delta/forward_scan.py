"""The delta rule's forward scan over the chunks of a tile: summaries, outputs, or the state of every chunk.

    r = beta (V - e^b K X)        u = T r        o = e^b Q X + P u        X <- e^{b_C} X + (K e^{b_C - b})ᵀ u

T comes from `ut_transform`, P_ij = e^{b_i - b_j} q_i·k_j for j <= i. The state X stays in registers. Its columns (of V)
are independent of each other, so a program holds some of them; all is transposed, so that what one product yields is
the next one's first operand. The same scan from X = I with V = 0 gives the tile's transition. With a diagonal decay q
and k come with e^b, and k to be written with e^{b_C - b} (`rescale`).
"""

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Cut
from lasp.kernels.triton.delta.backend import Terms
from lasp.kernels.triton.delta.config import OUTPUTS, STATES, SUMMARY, TRANSITION, DeltaConfig
from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import DIAGONAL, NONE, SCALAR
from lasp.kernels.triton.shared.reach import tile_in_reach
from lasp.kernels.triton.shared.tiles import CHUNK


@triton.jit(do_not_specialize=["FIRST_HEAD", "STEP"])
def _forward_scan(
    q,  # [tokens, Hq, K]; q⁺, k⁺, k⁻ [tokens, H, K] if DIAGONAL
    k,
    written,
    ln_ends,  # [chunks, H, K] fp32: b_C, if DIAGONAL
    v,  # [tokens, H, V]
    gates,  # [chunks, H, 4, C]: beta, b, e^b, e^{b_C - b}
    log2_bounds,  # [chunks, H], for SUMMARY and TRANSITION: see Terms; or None
    ut,  # [tokens, H, C]: T
    scores,  # [tokens, H, C]: P, for OUTPUTS
    initial,  # [M, H, K, V] fp32, for OUTPUTS and STATES, or None: zero
    final,  # [M, H, K, V] fp32, the state at the tile's end, if FINAL
    o,  # [tokens, H, V], for OUTPUTS
    u,  # [tokens, HEADS, V], for STATES
    states,  # [chunks, HEADS, V, K], for STATES: the state that enters each chunk, transposed
    start,
    length,
    first_chunk,  # [M]
    scale, H, G, FIRST_HEAD, STEP,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, MODE: tl.constexpr,
    FINAL: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if MODE != STATES:  # see pdl
        griddepcontrol_wait()
    tile, row, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    h = FIRST_HEAD + row * STEP
    begin, count, chunk = tl.load(start + tile), tl.load(length + tile), tl.load(first_chunk + tile)
    if log2_bounds is not None:
        begin, count, chunk = tile_in_reach(tl.arange(0, C), log2_bounds, begin, count, chunk, h, H, C, False)
    cols, rows = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    in_k, in_v = cols < K, rows < V
    c = tl.arange(0, C)
    work = ut.dtype.element_ty
    ut += (begin * H + h) * C  # within a tile 32 bits are enough
    k += (begin * (H // G) + h // G) * K
    written += (begin * (H // G) + h // G) * K
    if MODE != TRANSITION:
        v += (begin * H + h) * V
    if MODE == OUTPUTS:
        q += (begin * (H // G) + h // G) * K
        scores += (begin * H + h) * C
        o += (begin * H + h) * V
    if MODE == STATES:
        u += (begin * heads + row) * V
    inside = in_v[:, None] & in_k[None, :]
    at_state = (tile * H + h) * K * V + cols[None, :] * V + rows[:, None]
    if MODE == TRANSITION:
        x = tl.where(inside & (rows[:, None] == cols[None, :]), 1.0, 0.0)
    elif initial is None:
        x = tl.zeros([BV, BK], tl.float32)
    else:
        x = tl.load(initial + at_state, mask=inside, other=0.0)
    if MODE != TRANSITION:
        v_next = tl.load(
            v + (c * (H * V))[None, :] + rows[:, None], mask=(c < count)[None, :] & in_v[:, None], other=0.0
        )
    for i in tl.range(0, tl.cdiv(count, C), num_stages=STAGES):
        place = i * C + c
        here = place < count
        at_k = (place * (H // G * K))[:, None] + cols[None, :]
        at_v = (place * (H * V))[None, :] + rows[:, None]
        here_k = here[:, None] if K == BK else here[:, None] & in_k[None, :]
        kc = tl.load(k + at_k, mask=here_k, other=0.0).to(work)
        wc = kc
        tc = tl.load(ut + (place * (H * C))[:, None] + c[None, :], mask=here[:, None], other=0.0)
        ahead = place + C < count
        gate = gates + ((chunk + i) * H + h) * 4 * C + c
        betas = tl.load(gate).to(tl.float32)
        if DECAY == DIAGONAL:
            wc = tl.load(written + at_k, mask=here_k, other=0.0).to(work)
            total = tl.exp(tl.load(ln_ends + ((chunk + i) * H + h) * K + cols, mask=in_k, other=0.0))[None, :]
        elif DECAY != NONE:
            from_start, to_end = tl.load(gate + 2 * C).to(tl.float32), tl.load(gate + 3 * C).to(tl.float32)
            total = tl.load(gates + ((chunk + i) * H + h) * 4 * C + 3 * C - 1).to(tl.float32)
        if MODE != TRANSITION:
            v_t = v_next
            v_next = tl.load(v + at_v + C * H * V, mask=ahead[None, :] & in_v[:, None], other=0.0)
        if MODE == STATES:
            tl.store(
                states + ((chunk + i) * heads + row) * K * V + rows[:, None] * K + cols[None, :],
                x.to(states.dtype.element_ty),
                mask=inside,
            )
        r = tl.dot(x.to(work), tl.trans(kc), input_precision=PRECISION)
        here_v = here[None, :] if V % BV == 0 else in_v[:, None] & here[None, :]
        if DECAY == SCALAR:
            r *= from_start[None, :]
        if MODE == TRANSITION:
            r *= -betas[None, :]
        else:
            r = betas[None, :] * (v_t.to(tl.float32) - r)
        u_t = tl.dot(r.to(work), tl.trans(tc), input_precision=PRECISION)
        if MODE == OUTPUTS:
            q_t = tl.trans(tl.load(q + at_k, mask=here_k, other=0.0).to(work))
            pc = tl.load(scores + (place * (H * C))[:, None] + c[None, :], mask=here[:, None], other=0.0)
            o_t = tl.dot(x.to(work), q_t, input_precision=PRECISION) * scale
            if DECAY == SCALAR:
                o_t *= from_start[None, :]
            o_t = tl.dot(u_t.to(work), tl.trans(pc), o_t, input_precision=PRECISION)
            tl.store(o + at_v, o_t.to(o.dtype.element_ty), mask=here_v)
        if MODE == STATES:
            tl.store(u + (place * (heads * V))[None, :] + rows[:, None], u_t.to(work), mask=here_v)
        if DECAY != NONE:
            x *= total
        if DECAY == SCALAR:
            u_t *= to_end[None, :]
        x = tl.dot(u_t.to(work), wc, x, input_precision=PRECISION)
    if MODE == STATES:
        griddepcontrol_wait()
    if FINAL:
        tl.store(final + at_state, x, mask=inside)


def forward_scan(
    mode: tl.constexpr,
    cut: Cut,
    terms: Terms,
    v: Tensor,
    config: DeltaConfig,
    decay: Decay,
    *,
    scale: float = 1.0,
    initial: Tensor | None = None,
    final: Tensor | None = None,
    o: Tensor | None = None,
    recomputed: tuple[Tensor | None, Tensor | None] = (None, None),
    heads: range | None = None,
    pdl: bool = True,
) -> None:
    """Scans every tile and head (of `heads`); `mode` says which of the tensors it fills.

    pdl: if STATES, nothing that it reads or writes has to do with the kernel before (lasp.kernels.triton.pdl).
    """
    (all_heads, value_dim), (q_heads, key_dim) = v.shape[2:], terms.factors.k.shape[2:]
    value_dim = key_dim if mode is TRANSITION else value_dim
    how = config.outputs if mode is OUTPUTS else config.states
    block_v = min(block_of(value_dim), how.block)
    heads = heads or range(all_heads)
    q, k, written, ln_ends, _ = terms.factors
    launch(
        _forward_scan, (cut.tiles.count, len(heads), cdiv(value_dim, block_v)),
        q, k, written, ln_ends, v, terms.gates, terms.log2_bounds if mode in (SUMMARY, TRANSITION) else None,
        terms.ut, terms.scores, initial, final, o, *recomputed,
        cut.tiles.start, cut.tiles.length, cut.first_chunk, scale, all_heads, all_heads // q_heads, heads.start,
        heads.step, K=key_dim, V=value_dim, BK=block_of(key_dim), BV=block_v, C=CHUNK, MODE=mode,
        FINAL=final is not None, DECAY=decay.value, PRECISION=config.precision, STAGES=how.stages, num_warps=how.warps,
        pdl=pdl,
    )  # fmt: skip
