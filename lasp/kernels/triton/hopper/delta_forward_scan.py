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

from lasp.kernels.inputs import DeltaInputs
from lasp.kernels.triton.delta.backend import Cut, Terms
from lasp.kernels.triton.delta.config import OUTPUTS, STATES, SUMMARY, scan_decay
from lasp.kernels.triton.hopper.delta_shared import (
    COLUMNS,
    COLUMNS_LEFT,
    SCORE_ROWS,
    SCORES,
    STATE,
    STATE_LEFT,
    TOKEN_ROWS,
    fetch_gates,
    split_gates,
    state_places,
)
from lasp.kernels.triton.hopper.ring import make_ring
from lasp.kernels.triton.hopper.shared import (
    GATES_SHARED,
    SHARED,
    SIZE,
    C,
    barrier,
    clear_tail,
    rows_of,
    send_rows,
    states_of,
    whole_decay,
)
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import NONE


@gluon.jit
def _fetch(sources, buffers, ring, numbers, MODE: gl.constexpr):
    q, k, v, ut, gates = sources
    q_rows, k_rows, v_rows, t_rows, lines = buffers
    begin, count, chunk, h, H, G = numbers
    row_bytes: gl.constexpr = 2 * (2 * SIZE + C + (SIZE if MODE == OUTPUTS else 0))
    for i in range(gl.cdiv(count, C)):
        at = begin.to(gl.int32) + i * C
        filled, stage = ring.acquire(i), i % ring.stages
        fetch_gates(gates, chunk + i, h, H, lines.index(stage), filled)
        mbarrier.expect(filled, C * row_bytes)
        tma.async_copy_global_to_shared(k, [at, h // G * SIZE], filled, k_rows.index(stage))
        tma.async_copy_global_to_shared(ut, [at, h * C], filled, t_rows.index(stage))
        tma.async_copy_global_to_shared(v, [at, h * SIZE], filled, v_rows.index(stage))
        if MODE == OUTPUTS:
            tma.async_copy_global_to_shared(q, [at, h // G * SIZE], filled, q_rows.index(stage))


@gluon.jit
def _compute(shared, tensors, numbers, MODE: gl.constexpr, FINAL: gl.constexpr, DECAY: gl.constexpr):
    buffers, given, given_x, given_p, ring = shared
    q_rows, k_rows, v_rows, t_rows, lines = buffers
    initial, final, transitions, y, y_rows, states, scores, scores_rows = tensors
    begin, count, chunk, h, row, scale, H, HEADS = numbers
    dtype: gl.constexpr = k_rows.dtype
    x = gl.zeros([SIZE, SIZE], gl.float32, STATE)
    if initial is not None:
        x = gl.load(initial + state_places(gl.program_id(0), h, H))
    if MODE == SUMMARY:
        row_of_a = gl.arange(0, SIZE, layout=gl.SliceLayout(1, STATE))
        a = gl.where(row_of_a[:, None] == gl.arange(0, SIZE, layout=gl.SliceLayout(0, STATE))[None, :], 1.0, 0.0)
    if MODE == OUTPUTS:
        heads, head = H, h
        scores += (begin * H + h) * C
        token, past = (
            gl.arange(0, C, layout=gl.SliceLayout(1, SCORES)),
            gl.arange(0, C, layout=gl.SliceLayout(0, SCORES)),
        )
        none = gl.zeros([C, C], gl.float32, SCORES)
    if MODE == STATES:
        heads, head = HEADS, row
    if MODE >= OUTPUTS:
        y += (begin * heads + head) * SIZE
    nothing = gl.zeros([SIZE, C], gl.float32, COLUMNS)
    for i in range(gl.cdiv(count, C)):
        stage = i % ring.stages
        kc, tc = k_rows.index(stage), t_rows.index(stage)
        betas, passed, from_starts, to_ends = split_gates(lines.index(stage))
        before = x.to(dtype)
        if MODE == STATES:
            given_x.store(before)
            fence_async_shared()
            barrier()
            state = ((chunk + i) * HEADS + row) * SIZE
            tma.async_copy_shared_to_global(states, [state.to(gl.int32), 0], given_x)
        ring.wait(i)
        if DECAY != NONE:
            x *= whole_decay(from_starts, gl.SliceLayout(1, STATE))[:, None]
        if count - i * C < C:
            clear_tail(kc, i, count, TOKEN_ROWS)
            clear_tail(tc, i, count, SCORE_ROWS)
            clear_tail(v_rows.index(stage), i, count, TOKEN_ROWS)
            if MODE == OUTPUTS:
                clear_tail(q_rows.index(stage), i, count, TOKEN_ROWS)
            fence_async_shared()
            barrier()
        left = gl.convert_layout(before, COLUMNS_LEFT)
        r = warpgroup_mma(left, kc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if MODE == OUTPUTS:
            qc = q_rows.index(stage)
            p = warpgroup_mma(qc, kc.permute((1, 0)), none, use_acc=False, is_async=True)
        beta = betas.load(gl.SliceLayout(0, COLUMNS))
        r = warpgroup_mma_wait(1 if MODE == OUTPUTS else 0, deps=(r,))
        if DECAY != NONE:
            read = from_starts.load(gl.SliceLayout(0, COLUMNS))
            r *= read[None, :]
        r = beta[None, :] * (v_rows.index(stage).permute((1, 0)).load(COLUMNS).to(gl.float32) - r)
        r = gl.convert_layout(r.to(dtype), COLUMNS_LEFT)
        u = warpgroup_mma(r, tc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if MODE == OUTPUTS:
            p = warpgroup_mma_wait(1, deps=(p,)) * scale
            if DECAY != NONE:
                down = passed.load(gl.SliceLayout(1, SCORES))[:, None] - passed.load(gl.SliceLayout(0, SCORES))[None, :]
                p *= gl.exp(gl.minimum(down, 0.0))
            given_p.store(gl.where(token[:, None] >= past[None, :], p, 0.0).to(dtype))
            fence_async_shared()
            tma.store_wait(0)  # of the chunk before, whose buffer is written again
            barrier()
            send_rows(scores, scores_rows, given_p, begin, i, count, h * C, H * C, SCORE_ROWS)
            yc = warpgroup_mma(left, qc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        u = warpgroup_mma_wait(1 if MODE == OUTPUTS else 0, deps=(u,))
        written = u
        if DECAY != NONE:
            written = u * to_ends.load(gl.SliceLayout(0, COLUMNS))[None, :]
        x = warpgroup_mma(gl.convert_layout(written.to(dtype), STATE_LEFT), kc, x, is_async=True)
        if MODE == SUMMARY:
            left = gl.convert_layout(a.to(dtype), COLUMNS_LEFT)
            erased = warpgroup_mma(left, kc.permute((1, 0)), nothing, use_acc=False, is_async=True)
            if DECAY != NONE:
                a *= whole_decay(from_starts, gl.SliceLayout(1, STATE))[:, None]
            x, erased = warpgroup_mma_wait(0, deps=(x, erased))
            forget = -betas.load(gl.SliceLayout(0, COLUMNS))
            if DECAY != NONE:
                forget *= from_starts.load(gl.SliceLayout(0, COLUMNS))
            erased = gl.convert_layout((forget[None, :] * erased).to(dtype), COLUMNS_LEFT)
            erased = warpgroup_mma(erased, tc.permute((1, 0)), nothing, use_acc=False, is_async=True)
            erased = warpgroup_mma_wait(0, deps=(erased,))
            if DECAY != NONE:
                erased *= to_ends.load(gl.SliceLayout(0, COLUMNS))[None, :]
            a = warpgroup_mma(gl.convert_layout(erased.to(dtype), STATE_LEFT), kc, a, is_async=True)
            a = warpgroup_mma_wait(0, deps=(a,))
        if MODE == OUTPUTS:
            yc = warpgroup_mma_wait(1, deps=(yc,)) * scale
            if DECAY != NONE:
                yc *= read[None, :]
            u = gl.convert_layout(u.to(dtype), COLUMNS_LEFT)
            yc = warpgroup_mma(u, given_p.permute((1, 0)), yc, is_async=True)
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
            send_rows(y, y_rows, out, begin, i, count, head * SIZE, heads * SIZE, TOKEN_ROWS)
    if MODE >= OUTPUTS:
        tma.store_wait(0)
    if MODE == STATES:
        griddepcontrol_wait()
    if FINAL:
        gl.store(final + state_places(gl.program_id(0), h, H), x)
    if MODE == SUMMARY:
        gl.store(transitions + state_places(gl.program_id(0), h, H), a)


@gluon.jit(do_not_specialize=["FIRST_HEAD", "STEP"])
def _forward_scan(
    q,  # rows of [tokens, H // G, SIZE], for OUTPUTS
    k,
    v,  # rows of [tokens, H, SIZE]
    gates,  # [chunks, H, 4, C] fp32: beta, b, e^b, e^{b_C - b}
    ut,  # rows of [tokens, H, C]: T
    scores,  # [tokens, H, C]: P is written to it, for OUTPUTS
    scores_rows,  # rows of it
    initial,  # [M, H, SIZE, SIZE] fp32, for OUTPUTS and STATES, or None: zero
    final,  # likewise, the state at the tile's end, if FINAL
    transitions,  # likewise, for SUMMARY: A of the tile
    y,  # o [tokens, H, SIZE] for OUTPUTS, u [tokens, HEADS, SIZE] for STATES
    y_rows,  # rows of it
    states,  # [chunks, HEADS, V, K], one by one, for STATES: the state that enters each chunk, transposed
    start,
    length,
    first_chunk,  # [M]
    scale,
    H,
    G,
    FIRST_HEAD,
    STEP,
    MODE: gl.constexpr,
    FINAL: gl.constexpr,
    DECAY: gl.constexpr,
    STAGES: gl.constexpr,
):
    if MODE != STATES:  # see pdl
        griddepcontrol_wait()
    tile, row, HEADS = gl.program_id(0), gl.program_id(1), gl.num_programs(1)
    h = FIRST_HEAD + row * STEP
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    chunk = gl.load(first_chunk + tile)
    dtype: gl.constexpr = k.dtype
    k_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    t_rows = gl.allocate_shared_memory(dtype, [STAGES, C, C], SHARED)
    lines = gl.allocate_shared_memory(gl.float32, [STAGES, 4 * C], GATES_SHARED)
    v_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    q_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED) if MODE == OUTPUTS else k_rows
    copies: gl.constexpr = 2 if MODE == STATES else 1
    given = gl.allocate_shared_memory(dtype, [copies, C, SIZE], SHARED) if MODE >= OUTPUTS else k_rows
    given_x = gl.allocate_shared_memory(dtype, [SIZE, SIZE], SHARED) if MODE == STATES else k_rows
    given_p = gl.allocate_shared_memory(dtype, [C, C], SHARED) if MODE == OUTPUTS else k_rows
    ring = make_ring(STAGES, 1)
    buffers = (q_rows, k_rows, v_rows, t_rows, lines)
    shared = (buffers, given, given_x, given_p, ring)
    tensors = (initial, final, transitions, y, y_rows, states, scores, scores_rows)
    numbers = (begin, count, chunk, h, row, scale, H, HEADS)
    gl.warp_specialize(
        [
            (_compute, (shared, tensors, numbers, MODE, FINAL, DECAY)),
            (_fetch, ((q, k, v, ut, gates), buffers, ring, (begin, count, chunk, h, H, G), MODE)),
        ],
        [1],
        [24],
    )


def forward_scan(
    mode: gl.constexpr,
    cut: Cut,
    x: DeltaInputs,
    terms: Terms,
    *,
    initial: Tensor | None = None,
    final: Tensor | None = None,
    transitions: Tensor | None = None,
    y: Tensor | None = None,
    states: Tensor | None = None,
    heads: range | None = None,
    pdl: bool = True,
) -> None:
    """Scans every tile and head (of `heads`); `mode` says which of the tensors it fills: y is o or u. OUTPUTS fill
    terms.scores."""
    outputs, (all_heads, q_heads) = mode is OUTPUTS, (x.v.shape[2], x.k.shape[2])
    heads, scores = heads or range(all_heads), terms.scores
    launch(
        _forward_scan, (cut.tiles.count, len(heads)),
        rows_of(x.q, SIZE.value) if outputs else None, rows_of(x.k, SIZE.value),
        rows_of(x.v, SIZE.value), terms.gates, rows_of(terms.ut, C.value),
        *((scores, rows_of(scores, C.value)) if outputs and scores is not None else (None, None)), initial, final,
        transitions, y, None if y is None else rows_of(y, SIZE.value), None if states is None else states_of(states),
        cut.tiles.start, cut.tiles.length, cut.first_chunk, x.scale, all_heads, all_heads // q_heads, heads.start,
        heads.step, MODE=mode.value, FINAL=final is not None, DECAY=scan_decay(x.decay).value, STAGES=3, num_warps=8,
        pdl=pdl,
    )  # fmt: skip
