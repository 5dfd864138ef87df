"""The delta rule's forward scan for Hopper (see delta.forward_scan).

    r = beta (V - e^b K X)        u = T r        o = e^b Q X + P u        X <- e^{b_C} X + (K e^{b_C - b})ᵀ u

All is transposed, so that what one product yields is the next one's first operand, in registers. Summaries have the
tile's transition beside the state: it begins as the identity, and nothing is written to it. Outputs compute P on their
way, for themselves and for backward.
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from lasp.kernels.decay import Decay
from lasp.kernels.inputs import DeltaInputs
from lasp.kernels.segments import Cut
from lasp.kernels.triton.delta.backend import Terms
from lasp.kernels.triton.delta.config import OUTPUTS, STATES, SUMMARY, HopperLaunch, scan_decay
from lasp.kernels.triton.hopper.delta_rows import Program, Rows, fetch_gates, split_gates, states_of
from lasp.kernels.triton.hopper.delta_shared import (
    channel_decays,
    chunk_numbers,
    left_of,
    state_layout,
    state_places,
)
from lasp.kernels.triton.hopper.layouts import GATES_SHARED, SHARED, C, mma_layout
from lasp.kernels.triton.hopper.products import add_product, product
from lasp.kernels.triton.hopper.ring import make_ring
from lasp.kernels.triton.hopper.shared import barrier, clear_tail, publish, rows_of, send_rows, whole_decay
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import DIAGONAL, NONE
from lasp.kernels.triton.shared.reach import tile_in_reach


class _Outputs(NamedTuple):
    """What a scan writes, where MODE says so, and how it goes; in the shared memory of `staged` until it has gone."""

    y: gl.tensor
    y_rows: gl.tensor
    states: gl.tensor
    scores: gl.tensor
    scores_rows: gl.tensor
    final: gl.tensor
    transitions: gl.tensor


class _Staged(NamedTuple):
    y: gl.shared_memory_descriptor  # [1 or 2, C, V]
    state: gl.shared_memory_descriptor  # [V, K]
    scores: gl.shared_memory_descriptor  # [C, C]


@gluon.jit
def _fetch(sources, gates, ln_ends, chunks, lines, ring, place, MODE: gl.constexpr, DECAY: gl.constexpr):
    APART: gl.constexpr = DECAY == DIAGONAL
    K: gl.constexpr = chunks.k.shape[2]
    V: gl.constexpr = chunks.v.shape[2]
    row_bytes: gl.constexpr = 2 * (K + V + C + (K if MODE == OUTPUTS else 0) + (K if APART else 0))
    score_bytes: gl.constexpr = 2 * C if MODE == OUTPUTS and APART else 0
    h, G = place.h, place.G
    for i in range(gl.cdiv(place.length, C)):
        at = place.begin.to(gl.int32) + i * C
        filled, stage = ring.acquire(i), i % ring.stages
        fetch_gates(gates, ln_ends, place, i, lines.index(stage), filled, K, DECAY)
        mbarrier.expect(filled, C * (row_bytes + score_bytes))
        tma.async_copy_global_to_shared(sources.k, [at, h // G * K], filled, chunks.k.index(stage))
        tma.async_copy_global_to_shared(sources.ut, [at, h * C], filled, chunks.ut.index(stage))
        tma.async_copy_global_to_shared(sources.v, [at, place.column], filled, chunks.v.index(stage))
        if MODE == OUTPUTS:
            tma.async_copy_global_to_shared(sources.q, [at, h // G * K], filled, chunks.q.index(stage))
        if APART:
            tma.async_copy_global_to_shared(sources.written, [at, h // G * K], filled, chunks.written.index(stage))
            if MODE == OUTPUTS:
                tma.async_copy_global_to_shared(sources.scores, [at, h * C], filled, chunks.scores.index(stage))


@gluon.jit
def _compute(
    chunks, lines, ring, staged, initial, outputs, place, scale,
    WIDTH: gl.constexpr, MODE: gl.constexpr, DECAY: gl.constexpr,
):  # fmt: skip
    K: gl.constexpr = chunks.k.shape[2]
    V: gl.constexpr = chunks.v.shape[2]
    STATE: gl.constexpr = state_layout(V, K, gl.num_warps())
    COLUMNS: gl.constexpr = state_layout(V, C, gl.num_warps())
    SCORES: gl.constexpr = mma_layout(C, gl.num_warps())
    STATE_LEFT: gl.constexpr = left_of(STATE)
    COLUMNS_LEFT: gl.constexpr = left_of(COLUMNS)
    SCALARS: gl.constexpr = DECAY != NONE and DECAY != DIAGONAL
    SCORING: gl.constexpr = MODE == OUTPUTS and DECAY != DIAGONAL  # else they are there
    dtype: gl.constexpr = chunks.k.dtype
    begin, count, h, H = place.begin, place.length, place.h, place.H
    y, scores = outputs.y, outputs.scores
    x = gl.zeros([V, K], gl.float32, STATE)
    if initial is not None:
        places, there = state_places(place, STATE, K, V, WIDTH)
        x = gl.load(initial + places, mask=there, other=0.0)
    if MODE == SUMMARY:
        row_of_a = place.part * V + gl.arange(0, V, layout=gl.SliceLayout(1, STATE))
        a = gl.where(row_of_a[:, None] == gl.arange(0, K, layout=gl.SliceLayout(0, STATE))[None, :], 1.0, 0.0)
    if MODE == OUTPUTS:
        y_column, y_width = h * WIDTH + place.part * V, H * WIDTH
        scores += (begin * H + h) * C
        token = gl.arange(0, C, layout=gl.SliceLayout(1, SCORES))
        past = gl.arange(0, C, layout=gl.SliceLayout(0, SCORES))
    if MODE == STATES:
        y_column, y_width = place.row * V, place.rows * V
    if MODE >= OUTPUTS:
        y += begin * y_width + y_column
    for i in range(gl.cdiv(count, C)):
        stage = i % ring.stages
        kc, tc, wc = chunks.k.index(stage), chunks.ut.index(stage), chunks.written.index(stage)
        pc = chunks.scores.index(stage) if MODE == OUTPUTS and DECAY == DIAGONAL else staged.scores
        gates = split_gates(lines.index(stage))
        before = x.to(dtype)
        if MODE == STATES:
            staged.state.store(before)
            publish()
            state = ((place.chunk + i) * place.rows + place.row) * V
            tma.async_copy_shared_to_global(outputs.states, [state.to(gl.int32), 0], staged.state)
        ring.wait(i)
        if SCALARS:
            x *= whole_decay(gates.from_start, gl.SliceLayout(1, STATE))[:, None]
        if count - i * C < C:
            clear_tail(kc, i, count)
            clear_tail(tc, i, count)
            clear_tail(chunks.v.index(stage), i, count)
            if MODE == OUTPUTS:
                clear_tail(chunks.q.index(stage), i, count)
            if DECAY == DIAGONAL:
                clear_tail(wc, i, count)
                if MODE == OUTPUTS:
                    clear_tail(pc, i, count)
            publish()
        left = gl.convert_layout(before, COLUMNS_LEFT)
        r = product(left, kc.permute((1, 0)), COLUMNS)  # K X
        if MODE == OUTPUTS:
            qc = chunks.q.index(stage)
        if SCORING:
            p = product(qc, kc.permute((1, 0)), SCORES)  # Q Kᵀ
        beta = gates.beta.load(gl.SliceLayout(0, COLUMNS))
        r = warpgroup_mma_wait(1 if SCORING else 0, deps=(r,))
        if SCALARS:
            read = gates.from_start.load(gl.SliceLayout(0, COLUMNS))
            r *= read[None, :]
        r = beta[None, :] * (chunks.v.index(stage).permute((1, 0)).load(COLUMNS).to(gl.float32) - r)
        r = gl.convert_layout(r.to(dtype), COLUMNS_LEFT)
        u = product(r, tc.permute((1, 0)), COLUMNS)  # T r
        if SCORING:
            p = warpgroup_mma_wait(1, deps=(p,)) * scale
            if DECAY != NONE:
                b = gates.ln_passed
                down = b.load(gl.SliceLayout(1, SCORES))[:, None] - b.load(gl.SliceLayout(0, SCORES))[None, :]
                p *= gl.exp(gl.minimum(down, 0.0))
            staged.scores.store(gl.where(token[:, None] >= past[None, :], p, 0.0).to(dtype))
            fence_async_shared()
            tma.store_wait(0)  # of the chunk before, whose buffer is written again
            barrier()
            if place.part == 0:
                send_rows(scores, outputs.scores_rows, staged.scores, begin, i, count, h * C, H * C)
        if MODE == OUTPUTS:
            yc = product(left, qc.permute((1, 0)), COLUMNS)  # Q X
        if DECAY == DIAGONAL:
            x *= channel_decays(lines.index(stage), K, STATE)
        u = warpgroup_mma_wait(1 if MODE == OUTPUTS else 0, deps=(u,))
        written = u
        if SCALARS:
            written = u * gates.to_end.load(gl.SliceLayout(0, COLUMNS))[None, :]
        x = add_product(x, gl.convert_layout(written.to(dtype), STATE_LEFT), wc)  # e^{b_C} X + (K e^{b_C - b})ᵀ u
        if MODE == SUMMARY:  # A likewise: what u is without v
            left = gl.convert_layout(a.to(dtype), COLUMNS_LEFT)
            erased = product(left, kc.permute((1, 0)), COLUMNS)  # K A
            if SCALARS:
                a *= whole_decay(gates.from_start, gl.SliceLayout(1, STATE))[:, None]
            if DECAY == DIAGONAL:
                a *= channel_decays(lines.index(stage), K, STATE)
            x, erased = warpgroup_mma_wait(0, deps=(x, erased))
            forget = -gates.beta.load(gl.SliceLayout(0, COLUMNS))
            if SCALARS:
                forget *= gates.from_start.load(gl.SliceLayout(0, COLUMNS))
            erased = gl.convert_layout((forget[None, :] * erased).to(dtype), COLUMNS_LEFT)
            erased = product(erased, tc.permute((1, 0)), COLUMNS)  # -T beta e^b K A
            erased = warpgroup_mma_wait(0, deps=(erased,))
            if SCALARS:
                erased *= gates.to_end.load(gl.SliceLayout(0, COLUMNS))[None, :]
            a = add_product(a, gl.convert_layout(erased.to(dtype), STATE_LEFT), wc)
            a = warpgroup_mma_wait(0, deps=(a,))
        if MODE == OUTPUTS:
            yc = warpgroup_mma_wait(1, deps=(yc,)) * scale
            if SCALARS:
                yc *= read[None, :]
            u = gl.convert_layout(u.to(dtype), COLUMNS_LEFT)
            yc = add_product(yc, u, pc.permute((1, 0)))  # e^b Q X + P u
            x = warpgroup_mma_wait(1, deps=(x,))
            yc = warpgroup_mma_wait(0, deps=(yc,))
            if not SCORING:
                tma.store_wait(0)  # of the chunk before, whose buffer is written again
                barrier()
            out = staged.y.index(0)
            out.permute((1, 0)).store(yc.to(dtype))
        if MODE == STATES:
            x = warpgroup_mma_wait(0, deps=(x,))
            out = staged.y.index(i % 2)
            out.permute((1, 0)).store(u.to(dtype))
        if MODE >= OUTPUTS:
            fence_async_shared()
            tma.store_wait(0)  # of P or the state, and of u the chunk before
        barrier()
        ring.release(i)
        if MODE >= OUTPUTS:
            send_rows(y, outputs.y_rows, out, begin, i, count, y_column, y_width)
    if MODE >= OUTPUTS:
        tma.store_wait(0)
    if MODE == STATES:
        griddepcontrol_wait()
    if outputs.final is not None:
        places, there = state_places(place, STATE, K, V, WIDTH)
        gl.store(outputs.final + places, x, mask=there)
    if MODE == SUMMARY:
        places, there = state_places(place, STATE, K, V, K)
        gl.store(outputs.transitions + places, a, mask=there)


@gluon.jit(do_not_specialize=["FIRST_HEAD", "STEP"])
def _forward_scan(
    q,  # rows of [tokens, H // G, K], for OUTPUTS; q⁺, k⁺, k⁻ if DIAGONAL
    k,
    written,
    v,  # rows of [tokens, H, WIDTH], V at a time
    gates,  # [chunks, H, 4, C] fp32: beta, b, e^b, e^{b_C - b}
    log2_bounds,  # [chunks, H], for SUMMARY: see Terms; or None
    ln_ends,  # [chunks, H, K] fp32: b_C, if DIAGONAL
    ut,  # rows of [tokens, H, C]: T
    scores,  # [tokens, H, C]: P, for OUTPUTS, written unless DIAGONAL
    scores_rows,  # rows of it
    initial,  # [M, H, K, WIDTH] fp32, for OUTPUTS and STATES, or None: zero
    final,  # likewise, the state at the tile's end, if FINAL
    transitions,  # [M, H, K, K] fp32, for SUMMARY: A of the tile
    y,  # o [tokens, H, WIDTH] for OUTPUTS, u [tokens, HEADS, V] for STATES
    y_rows,  # rows of it
    states,  # [chunks, HEADS, V, K], one by one, for STATES: the state that enters each chunk, transposed
    start,
    length,
    first_chunk,  # [M]
    scale, H, G, FIRST_HEAD, STEP,
    K: gl.constexpr, V: gl.constexpr, WIDTH: gl.constexpr, PARTS: gl.constexpr, MODE: gl.constexpr,
    DECAY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    if MODE != STATES:  # see pdl
        griddepcontrol_wait()
    tile, row = gl.program_id(0), gl.program_id(1)
    h, part = (FIRST_HEAD + row * STEP) // PARTS, (FIRST_HEAD + row * STEP) % PARTS
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    chunk = gl.load(first_chunk + tile)
    if log2_bounds is not None:
        begin, count, chunk = tile_in_reach(chunk_numbers(), log2_bounds, begin, count, chunk, h, H, C, False)
    dtype: gl.constexpr = k.dtype
    k_rows = gl.allocate_shared_memory(dtype, [STAGES, C, K], SHARED)
    t_rows = gl.allocate_shared_memory(dtype, [STAGES, C, C], SHARED)
    lines = gl.allocate_shared_memory(gl.float32, [STAGES, 4 * C], GATES_SHARED)
    v_rows = gl.allocate_shared_memory(dtype, [STAGES, C, V], SHARED)
    q_rows = gl.allocate_shared_memory(dtype, [STAGES, C, K], SHARED) if MODE == OUTPUTS else k_rows
    copies: gl.constexpr = 2 if MODE == STATES else 1
    staged_y = gl.allocate_shared_memory(dtype, [copies, C, V], SHARED) if MODE >= OUTPUTS else k_rows
    staged_state = gl.allocate_shared_memory(dtype, [V, K], SHARED) if MODE == STATES else k_rows
    w_rows = gl.allocate_shared_memory(dtype, [STAGES, C, K], SHARED) if DECAY == DIAGONAL else k_rows
    p_rows, staged_scores = k_rows, k_rows
    if MODE == OUTPUTS:
        if DECAY == DIAGONAL:
            p_rows = gl.allocate_shared_memory(dtype, [STAGES, C, C], SHARED)
        else:
            staged_scores = gl.allocate_shared_memory(dtype, [C, C], SHARED)
    ring = make_ring(STAGES, 1)
    chunks = Rows(q_rows, k_rows, w_rows, v_rows, t_rows, p_rows)
    sources = Rows(q, k, written, v, ut, scores_rows)
    staged = _Staged(staged_y, staged_state, staged_scores)
    outputs = _Outputs(y, y_rows, states, scores, scores_rows, final, transitions)
    place = Program(begin, count, chunk, h, part, h * WIDTH + part * V, row, gl.num_programs(1), H, G)
    gl.warp_specialize(
        [
            (_compute, (chunks, lines, ring, staged, initial, outputs, place, scale, WIDTH, MODE, DECAY)),
            (_fetch, (sources, gates, ln_ends, chunks, lines, ring, place, MODE, DECAY)),
        ],
        [1],
        [24],
    )


def forward_scan(
    mode: gl.constexpr, cut: Cut, x: DeltaInputs, terms: Terms, how: HopperLaunch, *, initial: Tensor | None = None,
    final: Tensor | None = None, transitions: Tensor | None = None, y: Tensor | None = None,
    states: Tensor | None = None, rows: range | None = None, pdl: bool = True,
) -> None:  # fmt: skip
    """Scans every tile and part of a head (of `rows`); `mode` says which of the tensors it fills: y is o or u. OUTPUTS
    fill terms.scores."""
    outputs, (heads, value_dim), (q_heads, key_dim) = mode is OUTPUTS, x.v.shape[2:], terms.factors.k.shape[2:]
    diagonal = scan_decay(x.decay) == Decay.DIAGONAL
    stages = 2 if diagonal and mode is not SUMMARY else how.stages(mode)
    scores = terms.scores if outputs else None
    parts = max(value_dim, key_dim) // how.columns if mode is SUMMARY else how.parts
    rows = rows or range(heads * parts)
    launch(
        _forward_scan, (cut.tiles.count, len(rows)),
        rows_of(terms.factors.q, key_dim) if outputs else None, rows_of(terms.factors.k, key_dim),
        rows_of(terms.factors.written, key_dim) if diagonal else None, rows_of(x.v, how.columns),
        terms.gates, terms.log2_bounds if mode is SUMMARY else None, terms.factors.ln_ends, rows_of(terms.ut, C.value),
        scores, None if scores is None else rows_of(scores, C.value), initial, final, transitions,
        y, None if y is None else rows_of(y, how.columns), None if states is None else states_of(states),
        cut.tiles.start, cut.tiles.length, cut.first_chunk, x.scale,
        heads, heads // q_heads, rows.start, rows.step,
        K=key_dim, V=how.columns, WIDTH=value_dim, PARTS=parts, MODE=mode.value,
        DECAY=scan_decay(x.decay).value, STAGES=stages, pdl=pdl, **how.options,
    )  # fmt: skip
