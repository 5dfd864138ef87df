"""The delta rule's walk down a tile for Hopper (see delta_costates): the mirror image of delta_up.

du = Pᵀ do + e^{b_C - b} K G        dr = Tᵀ du        G <- e^{b_C} G + (Q e^b)ᵀ do - (K e^b)ᵀ beta dr
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
from lasp.kernels.triton.delta_config import STATES
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
    buffers, outputs, x_outputs, gates_copies, full, empty = shared
    q_rows, k_rows, do_rows, wy_rows, scores_rows = buffers
    gates, leaving, end, dr, dr_rows, grads_rows = tensors
    begin, count, chunk, h, row, scale, H, HEADS = numbers
    forgets = gates_copies.index(3 * PART)
    from_starts, to_ends = gates_copies.index(3 * PART + 1), gates_copies.index(3 * PART + 2)
    STAGES: gl.constexpr = full.shape[0]
    dtype: gl.constexpr = k_rows.dtype
    at = (gl.program_id(0).to(gl.int64) * H + h) * SIZE * SIZE + half_columns(PART)
    chunks = gl.cdiv(count, C)
    last = gl.maximum(chunks - 1, 0)
    grad = gl.zeros([HALF, SIZE], gl.float32, WIDE_MMA)
    if MODE == STATES:
        grad = gl.convert_layout(gl.load(leaving + at).permute((1, 0)), WIDE_MMA)
        dr += (begin * HEADS + row) * SIZE + PART * HALF
    beta = load_line(gates, chunk + last, h, H, 0)
    if DECAY != NONE:
        _, from_start, to_end = load_gates(gates, chunk + last, h, H)
        total = load_total(gates, chunk + last, h, H)
    for step in range(chunks):
        i = chunks - 1 - step
        stage = step % STAGES
        qc, kc, doc = q_rows.index(stage), k_rows.index(stage), do_rows.index(2 * stage + PART)
        tc, pc = wy_rows.index(stage), scores_rows.index(stage)
        ahead = chunk + gl.maximum(i - 1, 0)
        if DECAY == NONE:
            forgets.store(beta)
        else:
            forgets.store(beta * from_start)
            from_starts.store(from_start)
            to_ends.store(to_end)
            _, from_start, to_end = load_gates(gates, ahead, h, H)
        beta = load_line(gates, ahead, h, H, 0)
        before = grad.to(dtype)
        if MODE == STATES:
            x_outputs.index(PART).store(before)
            fence_async_shared()
        if DECAY != NONE:
            grad *= total
            total = load_total(gates, ahead, h, H)
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        if count - i * C < C:  # both groups write the same zeros
            clear_tail(kc, i, count, WIDE_ROWS)
            clear_tail(tc, i, count, ROWS)
            clear_tail(doc, i, count, ROWS)
            clear_tail(qc, i, count, WIDE_ROWS)
            clear_tail(pc, i, count, ROWS)
            fence_async_shared()
        barrier()
        nothing = gl.zeros([HALF, C], gl.float32, MMA)
        du = warpgroup_mma(gl.convert_layout(before, LEFT), kc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if MODE == STATES:
            grad_row = (((chunk + i) * HEADS + row) * SIZE + PART * HALF).to(gl.int32)
            tma.async_copy_shared_to_global(grads_rows, [grad_row, 0], x_outputs.index(PART))
        read = doc.permute((1, 0)).load(WIDE_LEFT).to(gl.float32) * scale
        if DECAY != NONE:
            read *= from_starts.load(gl.SliceLayout(0, WIDE_LEFT))[None, :]
        du = warpgroup_mma_wait(0, deps=(du,))
        if DECAY != NONE:
            du *= to_ends.load(gl.SliceLayout(0, MMA))[None, :]
        du = warpgroup_mma(doc.permute((1, 0)), pc, du, is_async=True)
        grad = warpgroup_mma(read.to(dtype), qc, grad, is_async=True)
        du = warpgroup_mma_wait(1, deps=(du,))
        drc = warpgroup_mma(gl.convert_layout(du.to(dtype), LEFT), tc, nothing, use_acc=False, is_async=True)
        forget = forgets.load(gl.SliceLayout(0, MMA))
        drc = warpgroup_mma_wait(0, deps=(drc,))
        forgotten = gl.convert_layout((-forget[None, :] * drc).to(dtype), WIDE_LEFT)
        grad = warpgroup_mma_wait(0, deps=(grad,))
        grad = warpgroup_mma(forgotten, kc, grad, is_async=True)
        if MODE == STATES:
            out = outputs.index(2 * (i % 2) + PART)
            out.permute((1, 0)).store(drc.to(dtype))
        grad = warpgroup_mma_wait(0, deps=(grad,))
        if MODE == STATES:
            fence_async_shared()
            tma.store_wait(0)  # of this chunk's gradient, and of dr the chunk before
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        if MODE == STATES:
            send_rows(dr, dr_rows, out, begin, i, count, row * SIZE + PART * HALF, HEADS * SIZE, ROWS)
    if MODE == STATES:
        tma.store_wait(0)
    if ENDS:
        gl.store(end + at, gl.convert_layout(grad.permute((1, 0)), HALF_LINES))


@gluon.jit(do_not_specialize=["FIRST_HEAD"])
def _walk_down(
    q,  # rows of [tokens, H // G, SIZE]
    k,
    do,  # half rows of [tokens, H, SIZE]
    gates,  # [chunks, H, 4, C] fp32: beta, b, e^b, e^{b_C - b}
    wy,  # rows of [tokens, H, C]: T
    scores,  # rows of [tokens, H, C]: P
    leaving,  # [M, H, SIZE, SIZE] fp32, for STATES
    end,  # likewise, if ENDS: the gradient of the state at the tile's start
    dr,  # [tokens, HEADS, SIZE], for STATES: the gradient of r
    dr_rows,  # half rows of it
    grads_rows,  # rows of [chunks, HEADS, V, K], for STATES: the gradient of what leaves each chunk, transposed
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
    await_previous()
    tile, row, HEADS = gl.program_id(0), gl.program_id(1), gl.num_programs(1)
    h = FIRST_HEAD + row
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    chunk = gl.load(first_chunk + tile)
    dtype: gl.constexpr = k.dtype
    q_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    k_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    do_rows = gl.allocate_shared_memory(dtype, [2 * STAGES, C, HALF], SHARED)
    wy_rows = gl.allocate_shared_memory(dtype, [STAGES, C, C], SHARED)
    scores_rows = gl.allocate_shared_memory(dtype, [STAGES, C, C], SHARED)
    outputs = gl.allocate_shared_memory(dtype, [4, C, HALF], SHARED) if MODE == STATES else wy_rows
    x_outputs = gl.allocate_shared_memory(dtype, [2, HALF, SIZE], SHARED) if MODE == STATES else k_rows
    gates_copies = gl.allocate_shared_memory(gl.float32, [6, C], GATES_SHARED)
    full, empty = make_ring(STAGES)
    bytes: gl.constexpr = 2 * C * (3 * SIZE + 2 * C)
    buffers = (q_rows, k_rows, do_rows, wy_rows, scores_rows)
    shared = (buffers, outputs, x_outputs, gates_copies, full, empty)
    tensors = (gates, leaving, end, dr, dr_rows, grads_rows)
    numbers = (begin, count, chunk, h, row, scale, H, HEADS)
    gl.warp_specialize(
        [
            (_compute, (shared, tensors, numbers, 0, MODE, ENDS, DECAY)),
            (_compute, (shared, tensors, numbers, 1, MODE, ENDS, DECAY)),
            (fetch, (q, k, do, wy, scores, buffers, full, empty, begin, count, h, G, False, bytes)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def walk_down(
    mode: int,
    tiles: Tiles,
    q: Tensor,
    k: Tensor,
    do: Tensor,
    gates: Tensor,
    wy: Tensor,
    scores: Tensor,
    scale: float,
    leaving: Tensor | None,
    end: Tensor | None,
    dr: Tensor | None,
    grads: Tensor | None,
    first_chunk: Tensor,
    decay: int,
    heads: range,
) -> None:
    """See delta_costates.walk_down."""
    launch(
        _walk_down, (tiles.count, len(heads)),
        rows_of(q, SIZE.value), rows_of(k, SIZE.value), rows_of(do, HALF.value), gates, rows_of(wy, C.value),
        rows_of(scores, C.value), leaving, end, dr, None if dr is None else rows_of(dr, HALF.value),
        None if grads is None else state_rows_of(grads),
        tiles.start, tiles.length, first_chunk, scale, do.shape[2], do.shape[2] // k.shape[2], heads.start,
        MODE=mode, ENDS=end is not None, DECAY=decay, STAGES=2, num_warps=4,
        overlaps=True,
    )  # fmt: skip
