"""The delta rule's walk up a tile for Hopper (see delta_states): each of two groups of warps has half of V's columns.

    r = beta (V - e^b K X)        u = T r        o = e^b Q X + P u        X <- e^{b_C} X + (K e^{b_C - b})ᵀ u

All is transposed, so that what one product yields is the next one's first operand, in registers, and the groups have
nothing to tell each other. Outputs compute P on their way, for themselves and for backward.
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

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.delta_config import OUTPUTS, STATES, SUMMARY, TRANSITION
from lasp.kernels.triton.gates import NONE
from lasp.kernels.triton.hopper.delta import fetch, load_gates, load_line, load_total
from lasp.kernels.triton.hopper.shared import (
    GATES_SHARED,
    HALF,
    HALF_LINES,
    LEFT,
    MMA,
    REGISTERS,
    ROWS,
    SHARED,
    SIZE,
    WIDE_LEFT,
    WIDE_MMA,
    WIDE_ROWS,
    C,
    barrier,
    clear_tail,
    half_columns,
    make_ring,
    rows_of,
    send_rows,
    state_rows_of,
)
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.overlap import await_previous


@gluon.jit
def _compute(
    shared,
    tensors,
    numbers,
    PART: gl.constexpr,  # the group of warps
    MODE: gl.constexpr,
    ENDS: gl.constexpr,
    DECAY: gl.constexpr,
):
    buffers, outputs, x_outputs, scores_copies, gates_copies, full, empty = shared
    q_rows, k_rows, v_rows, wy_rows, _ = buffers
    gates, entering, end, y, y_rows, states_rows, scores, scores_rows = tensors
    begin, count, chunk, h, row, scale, H, HEADS = numbers
    betas, passed = gates_copies.index(4 * PART), gates_copies.index(4 * PART + 1)
    from_starts, to_ends = gates_copies.index(4 * PART + 2), gates_copies.index(4 * PART + 3)
    STAGES: gl.constexpr = full.shape[0]
    dtype: gl.constexpr = k_rows.dtype
    at = (gl.program_id(0).to(gl.int64) * H + h) * SIZE * SIZE + half_columns(PART)
    if MODE == TRANSITION:
        row_of_x = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, WIDE_MMA))
        x = gl.where(row_of_x[:, None] == gl.arange(0, SIZE, layout=gl.SliceLayout(0, WIDE_MMA))[None, :], 1.0, 0.0)
    elif entering is None:
        x = gl.zeros([HALF, SIZE], gl.float32, WIDE_MMA)
    else:
        x = gl.convert_layout(gl.load(entering + at).permute((1, 0)), WIDE_MMA)
    if MODE == OUTPUTS:
        y += (begin * H + h) * SIZE + PART * HALF
        stride, col = H * SIZE, h * SIZE + PART * HALF
        scores += (begin * H + h) * C
        mine = scores_copies.index(PART)
        token = gl.arange(0, C, layout=gl.SliceLayout(1, MMA))
        token_before = gl.arange(0, C, layout=gl.SliceLayout(0, MMA))
    if MODE == STATES:
        y += (begin * HEADS + row) * SIZE + PART * HALF
        stride, col = HEADS * SIZE, row * SIZE + PART * HALF
    chunks = gl.cdiv(count, C)
    last = gl.maximum(chunks - 1, 0)
    beta = load_line(gates, chunk, h, H, 0)
    if DECAY != NONE:
        b, from_start, to_end = load_gates(gates, chunk, h, H)
        total = load_total(gates, chunk, h, H)
    for i in range(chunks):
        stage = i % STAGES
        kc, tc = k_rows.index(stage), wy_rows.index(stage)
        betas.store(beta)
        ahead = chunk + gl.minimum(i + 1, last)
        beta = load_line(gates, ahead, h, H, 0)
        if DECAY != NONE:
            if MODE == OUTPUTS:
                passed.store(b)
            from_starts.store(from_start)
            to_ends.store(to_end)
            b, from_start, to_end = load_gates(gates, ahead, h, H)
        before = x.to(dtype)
        if MODE == STATES:
            x_outputs.index(PART).store(before)
            fence_async_shared()
        if DECAY != NONE:
            x *= total
            total = load_total(gates, ahead, h, H)
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        if count - i * C < C:  # both groups write the same zeros
            clear_tail(kc, i, count, WIDE_ROWS)
            clear_tail(tc, i, count, ROWS)
            if MODE != TRANSITION:
                clear_tail(v_rows.index(2 * stage + PART), i, count, ROWS)
            if MODE == OUTPUTS:
                clear_tail(q_rows.index(stage), i, count, WIDE_ROWS)
            fence_async_shared()
        barrier()
        xl = gl.convert_layout(before, LEFT)
        nothing = gl.zeros([HALF, C], gl.float32, MMA)
        r = warpgroup_mma(xl, kc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if MODE == OUTPUTS:
            qc = q_rows.index(stage)
            p = warpgroup_mma(qc, kc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if MODE == STATES:
            state_row = (((chunk + i) * HEADS + row) * SIZE + PART * HALF).to(gl.int32)
            tma.async_copy_shared_to_global(states_rows, [state_row, 0], x_outputs.index(PART))
        bc = betas.load(gl.SliceLayout(0, MMA))
        r = warpgroup_mma_wait(1 if MODE == OUTPUTS else 0, deps=(r,))
        if DECAY != NONE:
            read = from_starts.load(gl.SliceLayout(0, MMA))
            r *= read[None, :]
        if MODE == TRANSITION:
            r *= -bc[None, :]
        else:
            r = bc[None, :] * (v_rows.index(2 * stage + PART).permute((1, 0)).load(MMA).to(gl.float32) - r)
        u = warpgroup_mma(
            gl.convert_layout(r.to(dtype), LEFT), tc.permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        if MODE == OUTPUTS:
            p = warpgroup_mma_wait(1, deps=(p,)) * scale
            if DECAY != NONE:
                down = passed.load(gl.SliceLayout(1, MMA))[:, None] - passed.load(gl.SliceLayout(0, MMA))[None, :]
                p *= gl.exp(gl.minimum(down, 0.0))
            mine.store(gl.where(token[:, None] >= token_before[None, :], p, 0.0).to(dtype))
            fence_async_shared()
            tma.store_wait(0)  # of the chunk before, whose buffer is written again
            barrier()
            if PART == 0:
                send_rows(scores, scores_rows, mine, begin, i, count, h * C, H * C, ROWS)
            yc = warpgroup_mma(xl, qc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        u = warpgroup_mma_wait(1 if MODE == OUTPUTS else 0, deps=(u,))
        written = u
        if DECAY != NONE:
            written = u * to_ends.load(gl.SliceLayout(0, MMA))[None, :]
        x = warpgroup_mma(gl.convert_layout(written.to(dtype), WIDE_LEFT), kc, x, is_async=True)
        if MODE == OUTPUTS:
            yc = warpgroup_mma_wait(1, deps=(yc,)) * scale
            if DECAY != NONE:
                yc *= read[None, :]
            yc = warpgroup_mma(gl.convert_layout(u.to(dtype), LEFT), mine.permute((1, 0)), yc, is_async=True)
            x = warpgroup_mma_wait(1, deps=(x,))
            yc = warpgroup_mma_wait(0, deps=(yc,))
            out = outputs.index(PART)
            out.permute((1, 0)).store(yc.to(dtype))
        else:
            x = warpgroup_mma_wait(0, deps=(x,))
        if MODE == STATES:
            out = outputs.index(2 * (i % 2) + PART)
            out.permute((1, 0)).store(u.to(dtype))
        if MODE >= OUTPUTS:
            fence_async_shared()
            tma.store_wait(0)  # of scores or states, and of u the chunk before
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        if MODE >= OUTPUTS:
            send_rows(y, y_rows, out, begin, i, count, col, stride, ROWS)
    if MODE >= OUTPUTS:
        tma.store_wait(0)
    if MODE == STATES:
        await_previous()
    if ENDS:
        gl.store(end + at, gl.convert_layout(x.permute((1, 0)), HALF_LINES))


@gluon.jit(do_not_specialize=["FIRST_HEAD"])
def _walk_up(
    q,  # rows of [tokens, H // G, SIZE], for OUTPUTS
    k,
    v,  # half rows of [tokens, H, SIZE], but for TRANSITION
    gates,  # [chunks, H, 4, C] fp32: beta, b, e^b, e^{b_C - b}
    wy,  # rows of [tokens, H, C]: T
    scores,  # [tokens, H, C]: P is written to it, for OUTPUTS
    scores_rows,  # rows of it
    entering,  # [M, H, SIZE, SIZE] fp32, for OUTPUTS and STATES, or None: zero
    end,  # likewise, the state at the tile's end, if ENDS
    y,  # o [tokens, H, SIZE] for OUTPUTS, u [tokens, HEADS, SIZE] for STATES
    y_rows,  # half rows of it
    states_rows,  # rows of [chunks, HEADS, V, K], for STATES: the state that enters each chunk, transposed
    start,
    length,
    first_chunk,  # [M]
    scale,
    H,
    G,
    FIRST_HEAD,
    MODE: gl.constexpr,
    ENDS: gl.constexpr,
    DECAY: gl.constexpr,
    STAGES: gl.constexpr,
):
    if MODE != STATES:  # see overlap
        await_previous()
    tile, row, HEADS = gl.program_id(0), gl.program_id(1), gl.num_programs(1)
    h = FIRST_HEAD + row
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    chunk = gl.load(first_chunk + tile)
    dtype: gl.constexpr = k.dtype
    k_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    wy_rows = gl.allocate_shared_memory(dtype, [STAGES, C, C], SHARED)
    v_rows = wy_rows if MODE == TRANSITION else gl.allocate_shared_memory(dtype, [2 * STAGES, C, HALF], SHARED)
    q_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED) if MODE == OUTPUTS else k_rows
    scores_copies = gl.allocate_shared_memory(dtype, [2, C, C], SHARED) if MODE == OUTPUTS else wy_rows
    writes: gl.constexpr = MODE >= OUTPUTS
    copies: gl.constexpr = 4 if MODE == STATES else 2
    outputs = gl.allocate_shared_memory(dtype, [copies, C, HALF], SHARED) if writes else wy_rows
    x_outputs = gl.allocate_shared_memory(dtype, [2, HALF, SIZE], SHARED) if MODE == STATES else k_rows
    gates_copies = gl.allocate_shared_memory(gl.float32, [8, C], GATES_SHARED)
    full, empty = make_ring(STAGES)
    rows: gl.constexpr = SIZE + C + (SIZE if MODE != TRANSITION else 0) + (SIZE if MODE == OUTPUTS else 0)
    buffers = (q_rows, k_rows, v_rows, wy_rows, wy_rows)
    shared = (buffers, outputs, x_outputs, scores_copies, gates_copies, full, empty)
    tensors = (gates, entering, end, y, y_rows, states_rows, scores, scores_rows)
    numbers = (begin, count, chunk, h, row, scale, H, HEADS)
    gl.warp_specialize(
        [
            (_compute, (shared, tensors, numbers, 0, MODE, ENDS, DECAY)),
            (_compute, (shared, tensors, numbers, 1, MODE, ENDS, DECAY)),
            (fetch, (q, k, v, wy, None, buffers, full, empty, begin, count, h, G, True, 2 * C * rows)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def walk_up(
    mode: int,
    tiles: Tiles,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    wy: Tensor,
    scores: Tensor | None,
    scale: float,
    entering: Tensor | None,
    end: Tensor | None,
    y: Tensor | None,
    states: Tensor | None,
    first_chunk: Tensor,
    decay: int,
    heads: range,
    overlaps: bool,
) -> None:
    """See delta_states.walk_up; y is o or u. `scores` is filled."""
    outputs = mode == OUTPUTS.value
    launch(
        _walk_up, (tiles.count, len(heads)),
        rows_of(q, SIZE.value) if outputs else None, rows_of(k, SIZE.value),
        None if mode == TRANSITION.value else rows_of(v, HALF.value), gates, rows_of(wy, C.value),
        *((scores, rows_of(scores, C.value)) if outputs and scores is not None else (None, None)), entering, end,
        y, None if y is None else rows_of(y, HALF.value), None if states is None else state_rows_of(states),
        tiles.start, tiles.length, first_chunk, scale, v.shape[2], v.shape[2] // k.shape[2], heads.start,
        MODE=mode, ENDS=end is not None, DECAY=decay, STAGES=3, num_warps=4,
        overlaps=overlaps,
    )  # fmt: skip
