"""The delta rule's reverse scan for Hopper: summaries (see delta.reverse_scan), or gradients (see delta.gradients).

    du = Pᵀ do + e^{b_C - b} K G        dr = Tᵀ du        G <- e^{b_C} G + (Q e^b)ᵀ do - (K e^b)ᵀ beta dr

is the mirror image of delta_forward_scan. For gradients a chunk has a second part (delta_gradients), which has G and dr
from the first: they are never written. With a vector gate they are, if EACH, for diagonal_gradients.
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from lasp.kernels.decay import Decay
from lasp.kernels.inputs import DeltaInputs
from lasp.kernels.segments import Cut
from lasp.kernels.triton.delta.backend import Grads, Recomputed, Terms
from lasp.kernels.triton.delta.config import HopperLaunch, scan_decay
from lasp.kernels.triton.hopper.delta_gradients import SUMS, add_up, stage_gradients
from lasp.kernels.triton.hopper.delta_rows import Program, Rows, fetch_gates, split_gates, states_of
from lasp.kernels.triton.hopper.delta_shared import (
    channel_decays,
    chunk_numbers,
    left_of,
    state_layout,
    state_places,
)
from lasp.kernels.triton.hopper.layouts import GATES_SHARED, SHARED, C
from lasp.kernels.triton.hopper.products import add_product, product
from lasp.kernels.triton.hopper.ring import Ring, make_ring
from lasp.kernels.triton.hopper.shared import barrier, clear_tail, publish, rows_of, store_tokens, whole_decay
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import DIAGONAL, NONE
from lasp.kernels.triton.shared.reach import tile_in_reach


class _Rings(NamedTuple):
    rows: Ring
    rest: Ring  # of what is needed later in a chunk
    late: Ring  # and later still
    sums: Ring


class _Staged(NamedTuple):
    """What a chunk leaves in shared memory for its second part, or until it has gone."""

    grad: gl.shared_memory_descriptor  # [1, V, K]: G, later dq and dk
    dk: gl.shared_memory_descriptor  # [1, C, K]: where there is no room for both
    dr: gl.shared_memory_descriptor  # [1, C, V], later dv
    sums: gl.shared_memory_descriptor  # [3, groups of warps, C]: see delta_gradients


class _Outputs(NamedTuple):
    """What a scan writes, and how it goes."""

    d_initial: gl.tensor
    dr: gl.tensor
    d_states: gl.tensor
    dq: gl.tensor
    dq_rows: gl.tensor
    dk: gl.tensor
    dk_rows: gl.tensor
    slot: gl.tensor  # of the head in dq and dk
    slots: gl.tensor
    dv: gl.tensor
    dv_rows: gl.tensor
    d_decay: gl.tensor  # which add_up writes


@gluon.jit
def _fetch(sources, gates, ln_ends, chunks, lines, rings, place, DECAY: gl.constexpr):
    """k, do, P and gates come some chunks ahead. So do T and q for summaries; gradients have room for one chunk's T and
    q, and u, X and v, which come while the chunk's first part runs."""
    K: gl.constexpr = chunks.k.shape[2]
    V: gl.constexpr = chunks.do.shape[2]
    row_bytes: gl.constexpr = 2 * (K + V + C + (K if DECAY == DIAGONAL else 0))
    h, G = place.h, place.G
    count = gl.cdiv(place.length, C)
    for step in range(count + 1):
        if step > 0:
            i = count - step
            at = place.begin.to(gl.int32) + i * C
            filled, stage = rings.rest.acquire(step - 1), (step - 1) % rings.rest.stages
            mbarrier.expect(filled, 2 * C * (C + K))
            tma.async_copy_global_to_shared(sources.ut, [at, h * C], filled, chunks.ut.index(stage))
            tma.async_copy_global_to_shared(sources.q, [at, h // G * K], filled, chunks.q.index(stage))
            if sources.u is not None:
                late = rings.late.full.index(0)  # its buffers are free where those of the rest are
                mbarrier.expect(late, 2 * (2 * C * V + V * K))
                tma.async_copy_global_to_shared(sources.u, [at, place.row * V], late, chunks.u.index(0))
                state = ((place.chunk + i) * place.rows + place.row) * V
                tma.async_copy_global_to_shared(sources.states, [state.to(gl.int32), 0], late, chunks.states.index(0))
                tma.async_copy_global_to_shared(sources.v, [at, place.column], late, chunks.v.index(0))
        if step < count:
            i = count - 1 - step
            at = place.begin.to(gl.int32) + i * C
            filled, stage = rings.rows.acquire(step), step % rings.rows.stages
            fetch_gates(gates, ln_ends, place, i, lines.index(stage), filled, K, DECAY)
            mbarrier.expect(filled, C * row_bytes)
            tma.async_copy_global_to_shared(sources.k, [at, h // G * K], filled, chunks.k.index(stage))
            if DECAY == DIAGONAL:
                tma.async_copy_global_to_shared(sources.written, [at, h // G * K], filled, chunks.written.index(stage))
            tma.async_copy_global_to_shared(sources.do, [at, place.column], filled, chunks.do.index(stage))
            tma.async_copy_global_to_shared(sources.scores, [at, h * C], filled, chunks.scores.index(stage))


@gluon.jit
def _compute(
    chunks, lines, rings, staged, d_final, outputs, start, place, scale,
    WIDTH: gl.constexpr, ADD: gl.constexpr, DECAY: gl.constexpr,
):  # fmt: skip
    K: gl.constexpr = chunks.k.shape[2]
    V: gl.constexpr = chunks.do.shape[2]
    STATE: gl.constexpr = state_layout(V, K, gl.num_warps())
    COLUMNS: gl.constexpr = state_layout(V, C, gl.num_warps())
    STATE_LEFT: gl.constexpr = left_of(STATE)
    COLUMNS_LEFT: gl.constexpr = left_of(COLUMNS)
    GRADIENTS: gl.constexpr = outputs.dq is not None
    EACH: gl.constexpr = outputs.dr is not None
    SCALARS: gl.constexpr = DECAY != NONE and DECAY != DIAGONAL
    dtype: gl.constexpr = chunks.k.dtype
    begin, count, h, H = place.begin, place.length, place.h, place.H
    staged_grad, staged_dr = staged.grad.index(0), staged.dr.index(0)
    if EACH:
        dr_at, dr_stride = outputs.dr + (begin * place.rows + place.row) * V, place.rows * V
        state_row = ((place.chunk * place.rows + place.row) * V).to(gl.int32)
    grad = gl.zeros([V, K], gl.float32, STATE)
    if d_final is not None:
        places, there = state_places(place, STATE, K, V, WIDTH)
        grad = gl.load(d_final + places, mask=there, other=0.0)
    last = gl.cdiv(count, C) - 1
    for step in range(last + 1):
        i = last - step
        stage = step % rings.rows.stages
        zero = step >> 20  # which the compiler does not know: addresses that never change it keeps, and so spills
        rest = zero if GRADIENTS else step % rings.rest.stages
        cut = count - i * C < C
        kc, wc, doc = chunks.k.index(stage), chunks.written.index(stage), chunks.do.index(stage)
        pc, tc, qc = chunks.scores.index(stage), chunks.ut.index(rest), chunks.q.index(rest)
        gates = split_gates(lines.index(stage))
        before = grad.to(dtype)
        rings.rows.wait(step)
        if SCALARS:
            grad *= whole_decay(gates.from_start, gl.SliceLayout(1, STATE))[:, None]
        if DECAY == DIAGONAL:
            grad *= channel_decays(lines.index(stage), K, STATE)
        if cut:
            clear_tail(kc, i, count)
            if DECAY == DIAGONAL:
                clear_tail(wc, i, count)
            clear_tail(doc, i, count)
            clear_tail(pc, i, count)
            publish()
        du = product(gl.convert_layout(before, COLUMNS_LEFT), wc.permute((1, 0)), COLUMNS)  # K G
        if GRADIENTS:
            tma.store_wait(0)  # of the chunk before, which has left these buffers
            barrier()
            staged_grad.store(before)
        if EACH:
            tma.store_wait(0)
            barrier()
            staged_grad.store(before)
            publish()
            tma.async_copy_shared_to_global(outputs.d_states, [state_row + i * dr_stride, 0], staged_grad)
        reading = gl.full([C], scale, gl.float32, gl.SliceLayout(0, STATE_LEFT))
        if SCALARS:
            reading *= gates.from_start.load(gl.SliceLayout(0, STATE_LEFT))
        read = (doc.permute((1, 0)).load(STATE_LEFT).to(gl.float32) * reading[None, :]).to(dtype)
        du = warpgroup_mma_wait(0, deps=(du,))
        if SCALARS:
            du *= gates.to_end.load(gl.SliceLayout(0, COLUMNS))[None, :]
        du = add_product(du, doc.permute((1, 0)), pc)  # e^{b_C - b} K G + Pᵀ do
        rings.rest.wait(step)
        if cut:
            clear_tail(tc, i, count)
            clear_tail(qc, i, count)
            publish()
        grad = add_product(grad, read, qc)  # e^{b_C} G + (Q e^b)ᵀ do
        du = warpgroup_mma_wait(1, deps=(du,))
        dr = product(gl.convert_layout(du.to(dtype), COLUMNS_LEFT), tc, COLUMNS)  # Tᵀ du
        forget = -gates.beta.load(gl.SliceLayout(0, COLUMNS))
        if SCALARS:
            forget *= gates.from_start.load(gl.SliceLayout(0, COLUMNS))
        dr, grad = warpgroup_mma_wait(0, deps=(dr, grad))
        forgotten = gl.convert_layout((forget[None, :] * dr).to(dtype), STATE_LEFT)
        grad = add_product(grad, forgotten, kc)  # … - (K e^b)ᵀ beta dr
        if GRADIENTS:
            # Their places, anew in each chunk: see `zero`.
            uc, drc = chunks.u.index(zero), staged.dr.index(zero)
            drc.permute((1, 0)).store(dr.to(dtype))
            rings.late.wait(step)
            if cut:
                clear_tail(uc, i, count)
            publish()
            chunk = Rows(qc, kc, wc, chunks.v.index(zero), tc, pc, doc, uc, chunks.states.index(zero))
            dq_out = staged.grad._reinterpret(dtype, [V // C, C, K], SHARED).index(zero)
            if V == C:
                dk_out = staged.dk.index(zero)
            else:
                dk_out = staged.grad._reinterpret(dtype, [V // C, C, K], SHARED).index(zero + 1)
            grad = stage_gradients(
                grad, chunk, drc, staged.grad.index(zero), gates, dq_out, dk_out, staged.sums, rings.sums, step, scale,
                outputs.d_decay is not None, DECAY,
            )  # fmt: skip
        else:
            if EACH:
                staged_dr.permute((1, 0)).store(dr.to(dtype))
                fence_async_shared()
            grad = warpgroup_mma_wait(0, deps=(grad,))
        barrier()
        rings.rows.release(step)
        rings.rest.release(step)
        if GRADIENTS:
            rings.sums.fill(step)
            if ADD or cut:
                first = gl.load(start + gl.program_id(0), volatile=True)  # anew, so that nothing is kept for this case
                mine = (first * outputs.slots + outputs.slot) * K
                store_tokens(outputs.dq + mine, dq_out, i, count, outputs.slots * K, ADD)
                store_tokens(outputs.dk + mine, dk_out, i, count, outputs.slots * K, ADD)
            else:
                at = begin.to(gl.int32) + i * C
                tma.async_copy_shared_to_global(outputs.dq_rows, [at, outputs.slot * K], dq_out)
                tma.async_copy_shared_to_global(outputs.dk_rows, [at, outputs.slot * K], dk_out)
            v_column = h * WIDTH + place.part * V
            if cut:
                first = gl.load(start + gl.program_id(0), volatile=True)
                store_tokens(outputs.dv + first * H * WIDTH + v_column, drc, i, count, H * WIDTH)
            else:
                tma.async_copy_shared_to_global(outputs.dv_rows, [begin.to(gl.int32) + i * C, v_column], drc)
        if EACH:
            store_tokens(dr_at, staged_dr, i, count, dr_stride)
    if GRADIENTS or EACH:
        tma.store_wait(0)
    if outputs.d_initial is not None:
        places, there = state_places(place, STATE, K, V, WIDTH)
        gl.store(outputs.d_initial + places, grad, mask=there)


@gluon.jit(do_not_specialize=["FIRST_HEAD", "STEP"])
def _reverse_scan(
    q,  # rows of [tokens, H // G, K]; q⁺, k⁺, k⁻ if DIAGONAL
    k, written,
    do,  # rows of [tokens, H, WIDTH], V at a time
    gates,  # [chunks, H, 4, C] fp32: beta, b, e^b, e^{b_C - b}
    log2_bounds,  # [chunks, H], for summaries: see Terms; or None
    ln_ends,  # [chunks, H, K] fp32: b_C, if DIAGONAL
    ut,  # rows of [tokens, H, C]: T
    scores,  # rows of [tokens, H, C]: P, scaled
    d_final,  # [M, H, K, WIDTH] fp32, or None: zero
    d_initial,  # likewise, or None: the gradient of the state at the tile's start
    # For EACH:
    dr,  # [tokens, HEADS, V]: the gradient of r
    d_states,  # [chunks, HEADS, V, K], one by one: G of what leaves each chunk, transposed
    # For GRADIENTS:
    v,  # rows of [tokens, H, WIDTH]
    u,  # rows of [tokens, HEADS, V]
    states,  # [chunks, HEADS, V, K], one by one: the state X that enters each chunk, transposed
    dq,  # [tokens, H * PARTS // STEP, K]
    dq_rows,  # rows of it
    dk, dk_rows,
    dv, dv_rows,  # [tokens, H, WIDTH]
    decay, d_decay,  # [tokens, H], if it is learned
    d_beta,  # [tokens, H]
    start, length,
    first_chunk,  # [M]
    scale, H, G, FIRST_HEAD, STEP, K: gl.constexpr, V: gl.constexpr, WIDTH: gl.constexpr, PARTS: gl.constexpr,
    ADD: gl.constexpr,  # to the dq and dk of heads before
    ADD_PARTS: gl.constexpr,  # to what parts before know of the gradients of beta and of the decay
    DECAY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    griddepcontrol_wait()
    tile, row = gl.program_id(0), gl.program_id(1)
    head_part = FIRST_HEAD + row * STEP
    h, part = head_part // PARTS, head_part % PARTS
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    chunk = gl.load(first_chunk + tile)
    if log2_bounds is not None:
        begin, count, chunk = tile_in_reach(chunk_numbers(), log2_bounds, begin, count, chunk, h, H, C, True)
    dtype: gl.constexpr = k.dtype
    GRADIENTS: gl.constexpr = u is not None
    EACH: gl.constexpr = dr is not None
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
    staged_dk = gl.allocate_shared_memory(dtype, [1, C, K], SHARED) if GRADIENTS and V == C else gs
    drs = gl.allocate_shared_memory(dtype, [1, C, V], SHARED) if GRADIENTS or EACH else k_rows
    groups: gl.constexpr = gl.num_warps() // 4
    sums = gl.allocate_shared_memory(gl.float32, [3, groups, C], SUMS) if GRADIENTS else lines
    rings = _Rings(make_ring(STAGES, 1), make_ring(REST, 1), make_ring(1, 1), make_ring(1, 1))
    chunks = Rows(q_rows, k_rows, w_rows, v_rows, t_rows, p_rows, do_rows, u_rows, xs)
    sources = Rows(q, k, written, v, ut, scores, do, u, states)
    staged = _Staged(gs, staged_dk, drs, sums)
    slot, slots = head_part // STEP, H * PARTS // STEP
    outputs = _Outputs(d_initial, dr, d_states, dq, dq_rows, dk, dk_rows, slot, slots, dv, dv_rows, d_decay)
    place = Program(begin, count, chunk, h, part, h * WIDTH + part * V, row, gl.num_programs(1), H, G)
    if GRADIENTS:
        gl.warp_specialize(
            [
                (_compute, (chunks, lines, rings, staged, d_final, outputs, start, place, scale, WIDTH, ADD, DECAY)),
                (_fetch, (sources, gates, ln_ends, chunks, lines, rings, place, DECAY)),
                (add_up, (sums, rings.sums, decay, d_decay, d_beta, place, ADD_PARTS)),
            ],
            [1, 1],
            [24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (chunks, lines, rings, staged, d_final, outputs, start, place, scale, WIDTH, ADD, DECAY)),
                (_fetch, (sources, gates, ln_ends, chunks, lines, rings, place, DECAY)),
            ],
            [1],
            [24],
        )


def reverse_scan(
    cut: Cut, x: DeltaInputs, terms: Terms, do: Tensor, how: HopperLaunch, *, d_final: Tensor | None = None,
    d_initial: Tensor | None = None, rows: range | None = None, recomputed: Recomputed | None = None,
    grads: Grads | None = None, each: Recomputed | None = None,
) -> None:  # fmt: skip
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
    log2_bounds = terms.log2_bounds if recomputed is None and each is None else None
    diagonal = scan_decay(x.decay) == Decay.DIAGONAL
    launch(
        _reverse_scan, (cut.tiles.count, len(rows)),
        rows_of(factors.q, key_dim), rows_of(factors.k, key_dim),
        rows_of(factors.written, key_dim) if diagonal else None,
        rows_of(do, how.columns), terms.gates, log2_bounds, factors.ln_ends,
        rows_of(terms.ut, C.value), rows_of(terms.scores, C.value), d_final, d_initial,
        dr, None if d_states is None else states_of(d_states),
        v_rows, u_rows, None if states is None else states_of(states), dq, dq_rows, dk, dk_rows, dv, dv_rows,
        None if d_decay is None else x.decay, d_decay, d_beta,
        cut.tiles.start, cut.tiles.length, cut.first_chunk, x.scale, heads, heads // q_heads, rows.start, rows.step,
        K=key_dim, V=how.columns, WIDTH=value_dim, PARTS=how.parts, ADD=add,
        ADD_PARTS=rows.start % how.parts > 0 and recomputed is not None, DECAY=scan_decay(x.decay).value,
        STAGES=how.reverse_stages(recomputed is not None or diagonal), pdl=True, **how.options,
    )  # fmt: skip
