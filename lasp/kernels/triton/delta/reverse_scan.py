"""The delta rule's reverse scan over the chunks of a tile: summaries, or what the gradients of chunks need.

    du = Pᵀ do + e^{b_C - b} K G        dr = Tᵀ du        G <- e^{b_C} G + (Q e^b)ᵀ do - (K e^b)ᵀ beta dr

The mirror image of `forward_scan`, transposed in the same way; G, the gradient of the state, stays in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Cut
from lasp.kernels.triton.delta.backend import Terms
from lasp.kernels.triton.delta.config import STATES, SUMMARY, DeltaConfig
from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.shared.decay import DIAGONAL, NONE, SCALAR
from lasp.kernels.triton.shared.reach import tile_in_reach
from lasp.kernels.triton.shared.tiles import CHUNK


@triton.jit(do_not_specialize=["FIRST_HEAD", "STEP"])
def _reverse_scan(
    q,  # [tokens, Hq, K]; q⁺, k⁺, k⁻ [tokens, H, K] if DIAGONAL
    k,
    written,
    ln_ends,  # [chunks, H, K] fp32: b_C, if DIAGONAL
    do,  # [tokens, H, V]
    gates,
    log2_bounds,  # [chunks, H], for SUMMARY: see Terms; or None
    ut,
    scores,
    d_final,  # [M, H, K, V] fp32, for STATES, or None: zero
    d_initial,  # [M, H, K, V] fp32, if FINAL: the gradient of the state at the tile's start
    dr,  # [tokens, HEADS, V], for STATES: the gradient of r
    d_states,  # [chunks, HEADS, V, K], for STATES: the gradient of the state that leaves each chunk, transposed
    start, length, first_chunk, scale, H, G, FIRST_HEAD, STEP,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, MODE: tl.constexpr,
    FINAL: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, row, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    h = FIRST_HEAD + row * STEP
    begin, count, chunk = tl.load(start + tile), tl.load(length + tile), tl.load(first_chunk + tile)
    if log2_bounds is not None:
        begin, count, chunk = tile_in_reach(tl.arange(0, C), log2_bounds, begin, count, chunk, h, H, C, True)
    cols, rows = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    in_k, in_v = cols < K, rows < V
    c = tl.arange(0, C)
    work = ut.dtype.element_ty
    ut += (begin * H + h) * C  # within a tile 32 bits are enough
    k += (begin * (H // G) + h // G) * K
    written += (begin * (H // G) + h // G) * K
    q += (begin * (H // G) + h // G) * K
    scores += (begin * H + h) * C
    do += (begin * H + h) * V
    if MODE == STATES:
        dr += (begin * heads + row) * V
    inside = in_v[:, None] & in_k[None, :]
    at_state = (tile * H + h) * K * V + cols[None, :] * V + rows[:, None]
    grad = tl.zeros([BV, BK], tl.float32)
    if d_final is not None:
        grad += tl.load(d_final + at_state, mask=inside, other=0.0)
    chunks = tl.cdiv(count, C)
    total_next = 0.0  # loaded ahead: two programs just fit a multiprocessor's shared memory
    if DECAY == SCALAR:
        last = gates + ((chunk + chunks - 1) * H + h) * 4 * C + 3 * C - 1
        total_next = tl.load(last, mask=count > 0, other=0.0).to(tl.float32)
    for step in tl.range(0, chunks, num_stages=STAGES):
        i = chunks - 1 - step
        place = i * C + c
        here = place < count
        at_k = (place * (H // G * K))[:, None] + cols[None, :]
        at_v = (place * (H * V))[None, :] + rows[:, None]
        here_k = here[:, None] if K == BK else here[:, None] & in_k[None, :]
        here_v = here[None, :] if V % BV == 0 else in_v[:, None] & here[None, :]
        qc = tl.load(q + at_k, mask=here_k, other=0.0).to(work)
        kc = tl.load(k + at_k, mask=here_k, other=0.0).to(work)
        tc = tl.load(ut + (place * (H * C))[:, None] + c[None, :], mask=here[:, None], other=0.0)
        dot = tl.load(do + at_v, mask=here_v, other=0.0).to(work)
        gate = gates + ((chunk + i) * H + h) * 4 * C + c
        betas = tl.load(gate).to(tl.float32)
        if MODE == STATES:
            tl.store(
                d_states + ((chunk + i) * heads + row) * K * V + rows[:, None] * K + cols[None, :],
                grad.to(d_states.dtype.element_ty),
                mask=inside,
            )
        wc = kc if DECAY != DIAGONAL else tl.load(written + at_k, mask=here_k, other=0.0).to(work)
        pc = tl.load(scores + (place * (H * C))[:, None] + c[None, :], mask=here[:, None], other=0.0)
        dut = tl.dot(grad.to(work), tl.trans(wc), input_precision=PRECISION)
        if DECAY == DIAGONAL:
            total = tl.exp(tl.load(ln_ends + ((chunk + i) * H + h) * K + cols, mask=in_k, other=0.0))[None, :]
        elif DECAY != NONE:
            from_start, to_end = tl.load(gate + 2 * C).to(tl.float32), tl.load(gate + 3 * C).to(tl.float32)
            total = total_next
            last = gates + ((chunk + i - 1) * H + h) * 4 * C + 3 * C - 1
            total_next = tl.load(last, mask=i > 0, other=0.0).to(tl.float32)
            dut *= to_end[None, :]
            betas *= from_start
        dut = tl.dot(dot, pc, dut, input_precision=PRECISION)
        drt = tl.dot(dut.to(work), tc, input_precision=PRECISION)
        if MODE == STATES:
            tl.store(dr + (place * (heads * V))[None, :] + rows[:, None], drt.to(work), mask=here_v)
        read = dot.to(tl.float32) * scale
        if DECAY != NONE:
            grad *= total
        if DECAY == SCALAR:
            read *= from_start[None, :]
        grad = tl.dot(read.to(work), qc, grad, input_precision=PRECISION)
        grad = tl.dot((-betas[None, :] * drt).to(work), kc, grad, input_precision=PRECISION)
    if FINAL:
        tl.store(d_initial + at_state, grad, mask=inside)


def reverse_scan(
    mode: tl.constexpr,
    cut: Cut,
    terms: Terms,
    do: Tensor,
    config: DeltaConfig,
    decay: Decay,
    scale: float,
    *,
    d_final: Tensor | None = None,
    d_initial: Tensor | None = None,
    dr: Tensor | None = None,
    d_states: Tensor | None = None,
    heads: range | None = None,
) -> None:
    """Scans every tile and head (of `heads`): `mode` is SUMMARY or STATES."""
    (all_heads, value_dim), (q_heads, key_dim) = do.shape[2:], terms.factors.k.shape[2:]
    how = config.reverse
    block_v = min(block_of(value_dim), how.block)
    heads = heads or range(all_heads)
    q, k, written, ln_ends, _ = terms.factors
    launch(
        _reverse_scan, (cut.tiles.count, len(heads), cdiv(value_dim, block_v)),
        q, k, written, ln_ends, do, terms.gates, terms.log2_bounds if mode is SUMMARY else None, terms.ut, terms.scores,
        d_final, d_initial, dr, d_states,
        cut.tiles.start, cut.tiles.length, cut.first_chunk, scale, all_heads, all_heads // q_heads, heads.start,
        heads.step, K=key_dim, V=value_dim, BK=block_of(key_dim), BV=block_v, C=CHUNK, MODE=mode,
        FINAL=d_initial is not None, DECAY=decay.value, PRECISION=config.precision, STAGES=how.stages,
        num_warps=how.warps,
    )  # fmt: skip
