"""The delta rule's forward scan for Hopper (see delta.forward_scan).

    r = beta (V - e^b K X)        u = T r        o = e^b Q X + P u        X <- e^{b_C} X + (K e^{b_C - b})ᵀ u

All is transposed, so that what one product yields is the next one's first operand, in registers. Summaries have the
tile's transition beside the state: it begins as the identity, and nothing is written to it. Outputs compute P on their
way, for themselves and for backward.
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
from lasp.kernels.triton.delta.backend import Cut, Terms
from lasp.kernels.triton.delta.config import OUTPUTS, STATES, SUMMARY, HopperLaunch, scan_decay
from lasp.kernels.triton.hopper.delta_shared import (
    channel_decays,
    columns_layout,
    fetch_gates,
    left_of,
    rows_layout,
    split_gates,
    state_layout,
    state_places,
    states_of,
    tokens_layout,
)
from lasp.kernels.triton.hopper.ring import make_ring
from lasp.kernels.triton.hopper.shared import (
    GATES_SHARED,
    SHARED,
    C,
    barrier,
    clear_tail,
    rows_of,
    send_rows,
    whole_decay,
)
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import DIAGONAL, NONE


@gluon.jit
def _fetch(sources, buffers, ring, numbers, K: gl.constexpr, V: gl.constexpr, MODE: gl.constexpr, DECAY: gl.constexpr):
    q, k, written, v, ut, scores, gates, ends = sources
    q_rows, k_rows, w_rows, v_rows, t_rows, p_rows, lines = buffers
    begin, count, chunk, h, v_column, H, G = numbers
    APART: gl.constexpr = DECAY == DIAGONAL
    row_bytes: gl.constexpr = 2 * (K + V + C + (K if MODE == OUTPUTS else 0) + (K if APART else 0))
    score_bytes: gl.constexpr = 2 * C if MODE == OUTPUTS and APART else 0
    for i in range(gl.cdiv(count, C)):
        at = begin.to(gl.int32) + i * C
        filled, stage = ring.acquire(i), i % ring.stages
        fetch_gates(gates, ends, chunk + i, h, H, lines.index(stage), filled, K, DECAY)
        mbarrier.expect(filled, C * (row_bytes + score_bytes))
        tma.async_copy_global_to_shared(k, [at, h // G * K], filled, k_rows.index(stage))
        tma.async_copy_global_to_shared(ut, [at, h * C], filled, t_rows.index(stage))
        tma.async_copy_global_to_shared(v, [at, v_column], filled, v_rows.index(stage))
        if MODE == OUTPUTS:
            tma.async_copy_global_to_shared(q, [at, h // G * K], filled, q_rows.index(stage))
        if APART:
            tma.async_copy_global_to_shared(written, [at, h // G * K], filled, w_rows.index(stage))
            if MODE == OUTPUTS:
                tma.async_copy_global_to_shared(scores, [at, h * C], filled, p_rows.index(stage))


@gluon.jit
def _compute(
    shared, tensors, numbers,
    K: gl.constexpr, V: gl.constexpr, WIDTH: gl.constexpr, MODE: gl.constexpr, FINAL: gl.constexpr,
    DECAY: gl.constexpr,
):  # fmt: skip
    STATE: gl.constexpr = state_layout(K, V)
    COLUMNS: gl.constexpr = columns_layout(K, V)
    SCORES: gl.constexpr = tokens_layout(K, V, C)
    STATE_LEFT: gl.constexpr = left_of(STATE)
    COLUMNS_LEFT: gl.constexpr = left_of(COLUMNS)
    K_ROWS: gl.constexpr = rows_layout(K, V, K)
    V_ROWS: gl.constexpr = rows_layout(K, V, V)
    SCORE_ROWS: gl.constexpr = rows_layout(K, V, C)
    buffers, given, given_x, given_p, ring = shared
    q_rows, k_rows, w_rows, v_rows, t_rows, p_rows, lines = buffers
    SCALARS: gl.constexpr = DECAY != NONE and DECAY != DIAGONAL
    SCORING: gl.constexpr = MODE == OUTPUTS and DECAY != DIAGONAL  # else they are there
    initial, final, transitions, y, y_rows, states, scores, scores_rows = tensors
    begin, count, chunk, h, part, row, scale, H, HEADS = numbers
    dtype: gl.constexpr = k_rows.dtype
    x = gl.zeros([V, K], gl.float32, STATE)
    if initial is not None:
        places, there = state_places(gl.program_id(0), h, H, part, K, V, WIDTH)
        x = gl.load(initial + places, mask=there, other=0.0)
    if MODE == SUMMARY:
        row_of_a = part * V + gl.arange(0, V, layout=gl.SliceLayout(1, STATE))
        a = gl.where(row_of_a[:, None] == gl.arange(0, K, layout=gl.SliceLayout(0, STATE))[None, :], 1.0, 0.0)
    if MODE == OUTPUTS:
        y_column, y_width = h * WIDTH + part * V, H * WIDTH
        scores += (begin * H + h) * C
        token, past = (
            gl.arange(0, C, layout=gl.SliceLayout(1, SCORES)),
            gl.arange(0, C, layout=gl.SliceLayout(0, SCORES)),
        )
        none = gl.zeros([C, C], gl.float32, SCORES)
    if MODE == STATES:
        y_column, y_width = row * V, HEADS * V
    if MODE >= OUTPUTS:
        y += begin * y_width + y_column
    nothing = gl.zeros([V, C], gl.float32, COLUMNS)
    for i in range(gl.cdiv(count, C)):
        stage = i % ring.stages
        kc, tc, wc = k_rows.index(stage), t_rows.index(stage), w_rows.index(stage)
        pc = p_rows.index(stage) if MODE == OUTPUTS and DECAY == DIAGONAL else given_p
        betas, passed, from_starts, to_ends = split_gates(lines.index(stage))
        before = x.to(dtype)
        if MODE == STATES:
            given_x.store(before)
            fence_async_shared()
            barrier()
            state = ((chunk + i) * HEADS + row) * V
            tma.async_copy_shared_to_global(states, [state.to(gl.int32), 0], given_x)
        ring.wait(i)
        if SCALARS:
            x *= whole_decay(from_starts, gl.SliceLayout(1, STATE))[:, None]
        if count - i * C < C:
            clear_tail(kc, i, count, K_ROWS)
            clear_tail(tc, i, count, SCORE_ROWS)
            clear_tail(v_rows.index(stage), i, count, V_ROWS)
            if MODE == OUTPUTS:
                clear_tail(q_rows.index(stage), i, count, K_ROWS)
            if DECAY == DIAGONAL:
                clear_tail(wc, i, count, K_ROWS)
                if MODE == OUTPUTS:
                    clear_tail(pc, i, count, SCORE_ROWS)
            fence_async_shared()
            barrier()
        left = gl.convert_layout(before, COLUMNS_LEFT)
        r = warpgroup_mma(left, kc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if MODE == OUTPUTS:
            qc = q_rows.index(stage)
        if SCORING:
            p = warpgroup_mma(qc, kc.permute((1, 0)), none, use_acc=False, is_async=True)
        beta = betas.load(gl.SliceLayout(0, COLUMNS))
        r = warpgroup_mma_wait(1 if SCORING else 0, deps=(r,))
        if SCALARS:
            read = from_starts.load(gl.SliceLayout(0, COLUMNS))
            r *= read[None, :]
        r = beta[None, :] * (v_rows.index(stage).permute((1, 0)).load(COLUMNS).to(gl.float32) - r)
        r = gl.convert_layout(r.to(dtype), COLUMNS_LEFT)
        u = warpgroup_mma(r, tc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if SCORING:
            p = warpgroup_mma_wait(1, deps=(p,)) * scale
            if DECAY != NONE:
                down = passed.load(gl.SliceLayout(1, SCORES))[:, None] - passed.load(gl.SliceLayout(0, SCORES))[None, :]
                p *= gl.exp(gl.minimum(down, 0.0))
            given_p.store(gl.where(token[:, None] >= past[None, :], p, 0.0).to(dtype))
            fence_async_shared()
            tma.store_wait(0)  # of the chunk before, whose buffer is written again
            barrier()
            if part == 0:
                send_rows(scores, scores_rows, given_p, begin, i, count, h * C, H * C, SCORE_ROWS)
        if MODE == OUTPUTS:
            yc = warpgroup_mma(left, qc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if DECAY == DIAGONAL:
            x *= channel_decays(lines.index(stage), K, STATE)
        u = warpgroup_mma_wait(1 if MODE == OUTPUTS else 0, deps=(u,))
        written = u
        if SCALARS:
            written = u * to_ends.load(gl.SliceLayout(0, COLUMNS))[None, :]
        x = warpgroup_mma(gl.convert_layout(written.to(dtype), STATE_LEFT), wc, x, is_async=True)
        if MODE == SUMMARY:
            left = gl.convert_layout(a.to(dtype), COLUMNS_LEFT)
            erased = warpgroup_mma(left, kc.permute((1, 0)), nothing, use_acc=False, is_async=True)
            if SCALARS:
                a *= whole_decay(from_starts, gl.SliceLayout(1, STATE))[:, None]
            if DECAY == DIAGONAL:
                a *= channel_decays(lines.index(stage), K, STATE)
            x, erased = warpgroup_mma_wait(0, deps=(x, erased))
            forget = -betas.load(gl.SliceLayout(0, COLUMNS))
            if SCALARS:
                forget *= from_starts.load(gl.SliceLayout(0, COLUMNS))
            erased = gl.convert_layout((forget[None, :] * erased).to(dtype), COLUMNS_LEFT)
            erased = warpgroup_mma(erased, tc.permute((1, 0)), nothing, use_acc=False, is_async=True)
            erased = warpgroup_mma_wait(0, deps=(erased,))
            if SCALARS:
                erased *= to_ends.load(gl.SliceLayout(0, COLUMNS))[None, :]
            a = warpgroup_mma(gl.convert_layout(erased.to(dtype), STATE_LEFT), wc, a, is_async=True)
            a = warpgroup_mma_wait(0, deps=(a,))
        if MODE == OUTPUTS:
            yc = warpgroup_mma_wait(1, deps=(yc,)) * scale
            if SCALARS:
                yc *= read[None, :]
            u = gl.convert_layout(u.to(dtype), COLUMNS_LEFT)
            yc = warpgroup_mma(u, pc.permute((1, 0)), yc, is_async=True)
            x = warpgroup_mma_wait(1, deps=(x,))
            yc = warpgroup_mma_wait(0, deps=(yc,))
            out = given.index(0)
            out.permute((1, 0)).store(yc.to(dtype))
        if MODE == STATES:
            x = warpgroup_mma_wait(0, deps=(x,))
            out = given.index(i % 2)
            out.permute((1, 0)).store(u.to(dtype))
        if MODE >= OUTPUTS:
            fence_async_shared()
            tma.store_wait(0)  # of P or the state, and of u the chunk before
        barrier()
        ring.release(i)
        if MODE >= OUTPUTS:
            send_rows(y, y_rows, out, begin, i, count, y_column, y_width, V_ROWS)
    if MODE >= OUTPUTS:
        tma.store_wait(0)
    if MODE == STATES:
        griddepcontrol_wait()
    if FINAL:
        places, there = state_places(gl.program_id(0), h, H, part, K, V, WIDTH)
        gl.store(final + places, x, mask=there)
    if MODE == SUMMARY:
        places, there = state_places(gl.program_id(0), h, H, part, K, V, K)
        gl.store(transitions + places, a, mask=there)


@gluon.jit(do_not_specialize=["FIRST_HEAD", "STEP"])
def _forward_scan(
    q,  # rows of [tokens, H // G, K], for OUTPUTS; q⁺, k⁺, k⁻ if DIAGONAL
    k,
    written,
    v,  # rows of [tokens, H, WIDTH], V at a time
    gates,  # [chunks, H, 4, C] fp32: beta, b, e^b, e^{b_C - b}
    ends,  # [chunks, H, K] fp32: b_C, if DIAGONAL
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
    FINAL: gl.constexpr, DECAY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    if MODE != STATES:  # see pdl
        griddepcontrol_wait()
    tile, row, HEADS = gl.program_id(0), gl.program_id(1), gl.num_programs(1)
    h, part = (FIRST_HEAD + row * STEP) // PARTS, (FIRST_HEAD + row * STEP) % PARTS
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    chunk = gl.load(first_chunk + tile)
    dtype: gl.constexpr = k.dtype
    k_rows = gl.allocate_shared_memory(dtype, [STAGES, C, K], SHARED)
    t_rows = gl.allocate_shared_memory(dtype, [STAGES, C, C], SHARED)
    lines = gl.allocate_shared_memory(gl.float32, [STAGES, 4 * C], GATES_SHARED)
    v_rows = gl.allocate_shared_memory(dtype, [STAGES, C, V], SHARED)
    q_rows = gl.allocate_shared_memory(dtype, [STAGES, C, K], SHARED) if MODE == OUTPUTS else k_rows
    copies: gl.constexpr = 2 if MODE == STATES else 1
    given = gl.allocate_shared_memory(dtype, [copies, C, V], SHARED) if MODE >= OUTPUTS else k_rows
    given_x = gl.allocate_shared_memory(dtype, [V, K], SHARED) if MODE == STATES else k_rows
    w_rows = gl.allocate_shared_memory(dtype, [STAGES, C, K], SHARED) if DECAY == DIAGONAL else k_rows
    p_rows, given_p = k_rows, k_rows
    if MODE == OUTPUTS:
        if DECAY == DIAGONAL:
            p_rows = gl.allocate_shared_memory(dtype, [STAGES, C, C], SHARED)
        else:
            given_p = gl.allocate_shared_memory(dtype, [C, C], SHARED)
    ring = make_ring(STAGES, 1)
    buffers = (q_rows, k_rows, w_rows, v_rows, t_rows, p_rows, lines)
    shared = (buffers, given, given_x, given_p, ring)
    tensors = (initial, final, transitions, y, y_rows, states, scores, scores_rows)
    numbers = (begin, count, chunk, h, part, row, scale, H, HEADS)
    sources = (q, k, written, v, ut, scores_rows, gates, ends)
    where = (begin, count, chunk, h, h * WIDTH + part * V, H, G)
    gl.warp_specialize(
        [
            (_compute, (shared, tensors, numbers, K, V, WIDTH, MODE, FINAL, DECAY)),
            (_fetch, (sources, buffers, ring, where, K, V, MODE, DECAY)),
        ],
        [1],
        [24],
    )


def forward_scan(
    mode: gl.constexpr,
    cut: Cut,
    x: DeltaInputs,
    terms: Terms,
    how: HopperLaunch,
    *,
    initial: Tensor | None = None,
    final: Tensor | None = None,
    transitions: Tensor | None = None,
    y: Tensor | None = None,
    states: Tensor | None = None,
    rows: range | None = None,
    pdl: bool = True,
) -> None:
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
        terms.gates, terms.factors.ends, rows_of(terms.ut, C.value),
        scores, None if scores is None else rows_of(scores, C.value), initial, final, transitions,
        y, None if y is None else rows_of(y, how.columns), None if states is None else states_of(states),
        cut.tiles.start, cut.tiles.length, cut.first_chunk, x.scale,
        heads, heads // q_heads, rows.start, rows.step,
        K=key_dim, V=how.columns, WIDTH=value_dim, PARTS=parts, MODE=mode.value, FINAL=final is not None,
        DECAY=scan_decay(x.decay).value, STAGES=stages, pdl=pdl, **how.options,
    )  # fmt: skip
