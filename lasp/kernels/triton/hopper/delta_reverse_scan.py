"""The delta rule's reverse scan for Hopper: summaries (see delta.reverse_scan), or gradients (see delta.gradients).

    du = Pᵀ do + e^{b_C - b} K G        dr = Tᵀ du        G <- e^{b_C} G + (Q e^b)ᵀ do - (K e^b)ᵀ beta dr

is the mirror image of delta_forward_scan. For gradients a chunk has a second part (delta_gradients), which has G and dr
from the first: they are never written. With a vector gate they are, if EACH, for diagonal_gradients.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lasp.kernels.decay import Decay
from lasp.kernels.inputs import DeltaInputs
from lasp.kernels.triton.delta.backend import Cut, Grads, Recomputed, Terms
from lasp.kernels.triton.delta.config import HopperLaunch, scan_decay
from lasp.kernels.triton.hopper.delta_gradients import SUMS, add_up, stage_gradients
from lasp.kernels.triton.hopper.delta_shared import (
    channel_decays,
    columns_layout,
    fetch_gates,
    give_tokens,
    left_of,
    rows_layout,
    split_gates,
    state_layout,
    state_places,
    states_of,
    warp_groups,
)
from lasp.kernels.triton.hopper.ring import make_ring
from lasp.kernels.triton.hopper.shared import (
    GATES_SHARED,
    SHARED,
    C,
    barrier,
    clear_tail,
    rows_of,
    store_tokens,
    whole_decay,
)
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import DIAGONAL, NONE


@gluon.jit
def _fetch(
    sources, buffers, rings, numbers, K: gl.constexpr, V: gl.constexpr, GRADIENTS: gl.constexpr, DECAY: gl.constexpr
):
    """k, do, P and gates come some chunks ahead. So do T and q for summaries; gradients have room for one chunk's T and
    q, and u, X and v, which come while the chunk's first part runs."""
    q, k, written, v, do, u, ut, scores, states, gates, ends = sources
    k_rows, w_rows, do_rows, p_rows, lines, t_rows, q_rows, u_rows, v_rows, xs = buffers
    row_bytes: gl.constexpr = 2 * (K + V + C + (K if DECAY == DIAGONAL else 0))
    ring, rest_ring, late_ring = rings
    begin, count, chunk, h, v_column, row, H, HEADS, G = numbers
    chunks = gl.cdiv(count, C)
    for step in range(chunks + 1):
        if step > 0:
            i = chunks - step
            at = begin.to(gl.int32) + i * C
            filled, stage = rest_ring.acquire(step - 1), (step - 1) % rest_ring.stages
            mbarrier.expect(filled, 2 * C * (C + K))
            tma.async_copy_global_to_shared(ut, [at, h * C], filled, t_rows.index(stage))
            tma.async_copy_global_to_shared(q, [at, h // G * K], filled, q_rows.index(stage))
            if GRADIENTS:
                late = late_ring.full.index(0)  # its buffers are free where those of the rest are
                mbarrier.expect(late, 2 * (2 * C * V + V * K))
                tma.async_copy_global_to_shared(u, [at, row * V], late, u_rows.index(0))
                state = ((chunk + i) * HEADS + row) * V
                tma.async_copy_global_to_shared(states, [state.to(gl.int32), 0], late, xs.index(0))
                tma.async_copy_global_to_shared(v, [at, v_column], late, v_rows.index(0))
        if step < chunks:
            i = chunks - 1 - step
            at = begin.to(gl.int32) + i * C
            filled, stage = ring.acquire(step), step % ring.stages
            fetch_gates(gates, ends, chunk + i, h, H, lines.index(stage), filled, K, DECAY)
            mbarrier.expect(filled, C * row_bytes)
            tma.async_copy_global_to_shared(k, [at, h // G * K], filled, k_rows.index(stage))
            if DECAY == DIAGONAL:
                tma.async_copy_global_to_shared(written, [at, h // G * K], filled, w_rows.index(stage))
            tma.async_copy_global_to_shared(do, [at, v_column], filled, do_rows.index(stage))
            tma.async_copy_global_to_shared(scores, [at, h * C], filled, p_rows.index(stage))


@gluon.jit
def _compute(
    shared, tensors, scanned, numbers,
    K: gl.constexpr, V: gl.constexpr, WIDTH: gl.constexpr, GRADIENTS: gl.constexpr, EACH: gl.constexpr,
    ADD: gl.constexpr, FINAL: gl.constexpr, DECAY: gl.constexpr,
):  # fmt: skip
    STATE: gl.constexpr = state_layout(K, V)
    COLUMNS: gl.constexpr = columns_layout(K, V)
    STATE_LEFT: gl.constexpr = left_of(STATE)
    COLUMNS_LEFT: gl.constexpr = left_of(COLUMNS)
    K_ROWS: gl.constexpr = rows_layout(K, V, K)
    V_ROWS: gl.constexpr = rows_layout(K, V, V)
    SCORE_ROWS: gl.constexpr = rows_layout(K, V, C)
    buffers, gs, more, drs, sums, rings = shared
    k_rows, w_rows, do_rows, p_rows, lines, t_rows, q_rows, u_rows, v_rows, xs = buffers
    SCALARS: gl.constexpr = DECAY != NONE and DECAY != DIAGONAL
    ring, rest_ring, late_ring, sums_ring = rings
    dr_at, dr_stride, d_states, state_row, state_step = scanned
    d_final, d_initial, dq, dq_rows, dk, dk_rows, dv, dv_rows, d_decay = tensors
    start, begin, count, h, part, slot, scale, H, SLOTS = numbers
    dtype: gl.constexpr = k_rows.dtype
    grad = gl.zeros([V, K], gl.float32, STATE)
    if d_final is not None:
        places, there = state_places(gl.program_id(0), h, H, part, K, V, WIDTH)
        grad = gl.load(d_final + places, mask=there, other=0.0)
    nothing = gl.zeros([V, C], gl.float32, COLUMNS)
    chunks = gl.cdiv(count, C)
    for step in range(chunks):
        i = chunks - 1 - step
        stage = step % ring.stages
        zero = step >> 20  # which the compiler does not know: addresses that never change it keeps, and so spills
        rest = zero if GRADIENTS else step % rest_ring.stages
        cut = count - i * C < C
        wc = w_rows.index(stage)
        kc, doc, pc = k_rows.index(stage), do_rows.index(stage), p_rows.index(stage)
        tc, qc = t_rows.index(rest), q_rows.index(rest)
        betas, passed, from_starts, to_ends = split_gates(lines.index(stage))
        before = grad.to(dtype)
        ring.wait(step)
        if SCALARS:
            grad *= whole_decay(from_starts, gl.SliceLayout(1, STATE))[:, None]
        if DECAY == DIAGONAL:
            grad *= channel_decays(lines.index(stage), K, STATE)
        if cut:
            clear_tail(kc, i, count, K_ROWS)
            if DECAY == DIAGONAL:
                clear_tail(wc, i, count, K_ROWS)
            clear_tail(doc, i, count, V_ROWS)
            clear_tail(pc, i, count, SCORE_ROWS)
            fence_async_shared()
            barrier()
        left = gl.convert_layout(before, COLUMNS_LEFT)
        du = warpgroup_mma(left, wc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if GRADIENTS:
            tma.store_wait(0)  # what was given of the chunk before has been read
            barrier()
            gs.index(0).store(before)
        if EACH:
            tma.store_wait(0)
            barrier()
            gs.index(0).store(before)
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(d_states, [state_row + i * state_step, 0], gs.index(0))
        reading = gl.full([C], scale, gl.float32, gl.SliceLayout(0, STATE_LEFT))
        if SCALARS:
            reading *= from_starts.load(gl.SliceLayout(0, STATE_LEFT))
        read = (doc.permute((1, 0)).load(STATE_LEFT).to(gl.float32) * reading[None, :]).to(dtype)
        du = warpgroup_mma_wait(0, deps=(du,))
        if SCALARS:
            du *= to_ends.load(gl.SliceLayout(0, COLUMNS))[None, :]
        du = warpgroup_mma(doc.permute((1, 0)), pc, du, is_async=True)
        rest_ring.wait(step)
        if cut:
            clear_tail(tc, i, count, SCORE_ROWS)
            clear_tail(qc, i, count, K_ROWS)
            fence_async_shared()
            barrier()
        grad = warpgroup_mma(read, qc, grad, is_async=True)
        du = warpgroup_mma_wait(1, deps=(du,))
        du = gl.convert_layout(du.to(dtype), COLUMNS_LEFT)
        dr = warpgroup_mma(du, tc, nothing, use_acc=False, is_async=True)
        forget = -betas.load(gl.SliceLayout(0, COLUMNS))
        if SCALARS:
            forget *= from_starts.load(gl.SliceLayout(0, COLUMNS))
        dr, grad = warpgroup_mma_wait(0, deps=(dr, grad))
        forgotten = gl.convert_layout((forget[None, :] * dr).to(dtype), STATE_LEFT)
        grad = warpgroup_mma(forgotten, kc, grad, is_async=True)
        if GRADIENTS:
            uc, drc = u_rows.index(zero), drs.index(zero)
            drc.permute((1, 0)).store(dr.to(dtype))
            late_ring.wait(step)
            if cut:
                clear_tail(uc, i, count, V_ROWS)
            fence_async_shared()
            barrier()
            chunk_rows = (qc, kc, v_rows.index(zero), doc, uc, drc, xs.index(zero), gs.index(zero), pc, tc)
            gates = (betas, passed, from_starts, to_ends)
            dq_out = gs._reinterpret(dtype, [V // C, C, K], SHARED).index(zero)
            dk_out = more.index(zero) if V == C else gs._reinterpret(dtype, [V // C, C, K], SHARED).index(zero + 1)
            grad = stage_gradients(
                grad,
                chunk_rows,
                gates,
                (dq_out, dk_out),
                sums,
                sums_ring,
                step,
                scale,
                K,
                V,
                d_decay is not None,
                DECAY,
            )
        else:
            if EACH:
                drs.index(0).permute((1, 0)).store(dr.to(dtype))
                fence_async_shared()
            grad = warpgroup_mma_wait(0, deps=(grad,))
        barrier()
        ring.release(step)
        rest_ring.release(step)
        if GRADIENTS:
            mbarrier.arrive(sums_ring.full.index(0), count=1)
            if ADD or cut:
                first = gl.load(start + gl.program_id(0), volatile=True)  # anew, so that nothing is kept for this case
                mine = (first * SLOTS + slot) * K
                give_tokens(dq + mine, dq_out, i, count, SLOTS * K, K_ROWS, ADD)
                give_tokens(dk + mine, dk_out, i, count, SLOTS * K, K_ROWS, ADD)
            else:
                at = begin.to(gl.int32) + i * C
                tma.async_copy_shared_to_global(dq_rows, [at, slot * K], dq_out)
                tma.async_copy_shared_to_global(dk_rows, [at, slot * K], dk_out)
            v_column = h * WIDTH + part * V
            if cut:
                first = gl.load(start + gl.program_id(0), volatile=True)
                store_tokens(dv + first * H * WIDTH + v_column, drc, i, count, H * WIDTH, V_ROWS)
            else:
                tma.async_copy_shared_to_global(dv_rows, [begin.to(gl.int32) + i * C, v_column], drc)
        if EACH:
            store_tokens(dr_at, drs.index(0), i, count, dr_stride, V_ROWS)
    if GRADIENTS or EACH:
        tma.store_wait(0)
    if FINAL:
        places, there = state_places(gl.program_id(0), h, H, part, K, V, WIDTH)
        gl.store(d_initial + places, grad, mask=there)


@gluon.jit(do_not_specialize=["FIRST_HEAD", "STEP"])
def _reverse_scan(
    q,  # rows of [tokens, H // G, K]; q⁺, k⁺, k⁻ if DIAGONAL
    k,
    written,
    do,  # rows of [tokens, H, WIDTH], V at a time
    gates,  # [chunks, H, 4, C] fp32: beta, b, e^b, e^{b_C - b}
    ends,  # [chunks, H, K] fp32: b_C, if DIAGONAL
    ut,  # rows of [tokens, H, C]: T
    scores,  # rows of [tokens, H, C]: P, scaled
    d_final,  # [M, H, K, WIDTH] fp32, or None: zero
    d_initial,  # likewise, if FINAL: the gradient of the state at the tile's start
    # For EACH:
    dr,  # [tokens, HEADS, V]: the gradient of r
    d_states,  # [chunks, HEADS, V, K], one by one: G of what leaves each chunk, transposed
    # For GRADIENTS:
    v,  # rows of [tokens, H, WIDTH]
    u,  # rows of [tokens, HEADS, V]
    states,  # [chunks, HEADS, V, K], one by one: the state X that enters each chunk, transposed
    dq,  # [tokens, H * PARTS // STEP, K]
    dq_rows,  # rows of it
    dk,
    dk_rows,
    dv,  # [tokens, H, WIDTH]
    dv_rows,
    decay,  # [tokens, H], if it is learned
    d_decay,
    d_beta,  # [tokens, H]
    start,
    length,
    first_chunk,  # [M]
    scale,
    H,
    G,
    FIRST_HEAD,
    STEP,
    K: gl.constexpr,
    V: gl.constexpr,
    WIDTH: gl.constexpr,
    PARTS: gl.constexpr,
    GRADIENTS: gl.constexpr,
    EACH: gl.constexpr,
    ADD: gl.constexpr,  # to the dq and dk of heads before
    ADD_PARTS: gl.constexpr,  # to what parts before know of the gradients of beta and of the decay
    FINAL: gl.constexpr,
    DECAY: gl.constexpr,
    STAGES: gl.constexpr,
):
    griddepcontrol_wait()
    tile, row, HEADS = gl.program_id(0), gl.program_id(1), gl.num_programs(1)
    place = FIRST_HEAD + row * STEP
    h, part = place // PARTS, place % PARTS
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    chunk = gl.load(first_chunk + tile)
    dtype: gl.constexpr = k.dtype
    REST: gl.constexpr = 1 if GRADIENTS else STAGES
    k_rows = gl.allocate_shared_memory(dtype, [STAGES, C, K], SHARED)
    do_rows = gl.allocate_shared_memory(dtype, [STAGES, C, V], SHARED)
    p_rows = gl.allocate_shared_memory(dtype, [STAGES, C, C], SHARED)
    lines = gl.allocate_shared_memory(gl.float32, [STAGES, 4 * C], GATES_SHARED)
    t_rows = gl.allocate_shared_memory(dtype, [REST, C, C], SHARED)
    q_rows = gl.allocate_shared_memory(dtype, [REST, C, K], SHARED)
    u_rows = gl.allocate_shared_memory(dtype, [1, C, V], SHARED) if GRADIENTS else k_rows
    v_rows = gl.allocate_shared_memory(dtype, [1, C, V], SHARED) if GRADIENTS else k_rows
    xs = gl.allocate_shared_memory(dtype, [1, V, K], SHARED) if GRADIENTS else k_rows
    gs = gl.allocate_shared_memory(dtype, [1, V, K], SHARED) if GRADIENTS or EACH else k_rows
    w_rows = gl.allocate_shared_memory(dtype, [STAGES, C, K], SHARED) if DECAY == DIAGONAL else k_rows
    # dq and dk take the place of G, in which there may be room for one alone.
    more = gl.allocate_shared_memory(dtype, [1, C, K], SHARED) if GRADIENTS and V == C else gs
    drs = gl.allocate_shared_memory(dtype, [1, C, V], SHARED) if GRADIENTS or EACH else k_rows
    sums = gl.allocate_shared_memory(gl.float32, [3, warp_groups(K, V), C], SUMS) if GRADIENTS else lines
    ring, rest_ring, late_ring, sums_ring = make_ring(STAGES, 1), make_ring(REST, 1), make_ring(1, 1), make_ring(1, 1)
    buffers = (k_rows, w_rows, do_rows, p_rows, lines, t_rows, q_rows, u_rows, v_rows, xs)
    shared = (buffers, gs, more, drs, sums, (ring, rest_ring, late_ring, sums_ring))
    tensors = (d_final, d_initial, dq, dq_rows, dk, dk_rows, dv, dv_rows, d_decay)
    scanned = (0, 0, 0, 0, 0)
    if EACH:
        at_state = (chunk * HEADS + row) * V
        scanned = (dr + (begin * HEADS + row) * V, HEADS * V, d_states, at_state.to(gl.int32), HEADS * V)
    sources = (q, k, written, v, do, u, ut, scores, states, gates, ends)
    numbers = (start, begin, count, h, part, place // STEP, scale, H, H * PARTS // STEP)
    arriving, where = (ring, rest_ring, late_ring), (begin, count, chunk, h, h * WIDTH + part * V, row, H, HEADS, G)
    if GRADIENTS:
        gl.warp_specialize(
            [
                (_compute, (shared, tensors, scanned, numbers, K, V, WIDTH, GRADIENTS, EACH, ADD, FINAL, DECAY)),
                (_fetch, (sources, buffers, arriving, where, K, V, GRADIENTS, DECAY)),
                (add_up, (sums, sums_ring, decay, d_decay, d_beta, (begin, count, h, H), ADD_PARTS)),
            ],
            [1, 1],
            [24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (shared, tensors, scanned, numbers, K, V, WIDTH, GRADIENTS, EACH, ADD, FINAL, DECAY)),
                (_fetch, (sources, buffers, arriving, where, K, V, GRADIENTS, DECAY)),
            ],
            [1],
            [24],
        )


def reverse_scan(
    cut: Cut,
    x: DeltaInputs,
    terms: Terms,
    do: Tensor,
    how: HopperLaunch,
    *,
    d_final: Tensor | None = None,
    d_initial: Tensor | None = None,
    rows: range | None = None,
    recomputed: Recomputed | None = None,
    grads: Grads | None = None,
    each: Recomputed | None = None,
) -> None:
    """Scans every tile and part of a head (of `rows`) in reverse. With what was `recomputed` of them it fills `grads`;
    `each` is filled with dr and the gradients of chunks' final states."""
    (heads, value_dim), (q_heads, key_dim) = x.v.shape[2:], terms.factors.k.shape[2:]
    rows = rows or range(heads * how.parts)
    dq, dk, dv, d_decay, d_beta = grads or (None,) * 5
    u, states = recomputed or (None, None)
    assert terms.scores is not None
    add = grads is not None and grads.are_added(rows)
    dq_rows, dk_rows = (None, None) if add or dq is None or dk is None else (rows_of(dq, key_dim), rows_of(dk, key_dim))
    u_rows, v_rows, dv_rows = (
        None if y is None else rows_of(y, how.columns) for y in (u, x.v if recomputed else None, dv)
    )
    factors, (dr, d_states) = terms.factors, each or (None, None)
    diagonal = scan_decay(x.decay) == Decay.DIAGONAL
    launch(
        _reverse_scan, (cut.tiles.count, len(rows)),
        rows_of(factors.q, key_dim), rows_of(factors.k, key_dim),
        rows_of(factors.written, key_dim) if diagonal else None,
        rows_of(do, how.columns), terms.gates, factors.ends,
        rows_of(terms.ut, C.value), rows_of(terms.scores, C.value), d_final, d_initial,
        dr, None if d_states is None else states_of(d_states),
        v_rows, u_rows, None if states is None else states_of(states), dq, dq_rows, dk, dk_rows, dv, dv_rows,
        None if d_decay is None else x.decay, d_decay, d_beta,
        cut.tiles.start, cut.tiles.length, cut.first_chunk, x.scale, heads, heads // q_heads, rows.start, rows.step,
        K=key_dim, V=how.columns, WIDTH=value_dim, PARTS=how.parts, GRADIENTS=recomputed is not None,
        EACH=each is not None, ADD=add, ADD_PARTS=rows.start % how.parts > 0 and recomputed is not None,
        FINAL=d_initial is not None,
        DECAY=scan_decay(x.decay).value, STAGES=how.reverse_stages(recomputed is not None or diagonal), pdl=True,
        **how.options,
    )  # fmt: skip
