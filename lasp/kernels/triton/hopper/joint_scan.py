"""The reverse scan over a tile for every gradient at once, given the states X before its chunks (scalar.chunk_states):
see chunk_step, with G the gradient of the state behind a chunk.

    dv_j = w_j Gᵀk_j + scale · Σ_{i>=j} w_ij (q_i·k_j) do_i       G <- w G + scale · Σ_i w_i q_i do_iᵀ
    dk_j = w_j G v_j + scale · Σ_{i>=j} w_ij (do_i·v_j) q_i
    dq_i = scale · (w_i X do_i + Σ_{j<=i} w_ij (do_i·v_j) k_j)

Three groups of warps, which hardly wait for each other: one holds G / scale and hands a copy to the one for dv and dk,
which hands the scores of dq to the third.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.hopper.chunk_step import scales, write_copy
from lasp.kernels.triton.hopper.layouts import GATES_SHARED, MMA, SHARED, SIZE, WIDE_LEFT, WIDE_MMA, C
from lasp.kernels.triton.hopper.reverse_step import head_room, pairs_of, sum_of_pairs, written
from lasp.kernels.triton.hopper.ring import make_ring
from lasp.kernels.triton.hopper.scalar_shared import load_gates, load_initial_state
from lasp.kernels.triton.hopper.shared import barrier, clear_tail, rows_of, send_rows, whole_decay
from lasp.kernels.triton.hopper.tiles import Initial
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.scalar.chunk_states import ChunkStates
from lasp.kernels.triton.shared.state_passing import InitialStates

ROW = gl.constexpr(gl.SliceLayout(1, WIDE_MMA))


@gluon.jit
def _fetch(q, k, v, do, before, buffers, rings, begin, count, chunk, h, H, G):
    q_rows, k_rows, v_rows, do_rows, x_rows = buffers
    ring, x_ring, _, _ = rings
    chunks = gl.cdiv(count, C)
    for step in range(chunks):
        i = chunks - 1 - step
        row = begin.to(gl.int32) + i * C
        filled, stage = ring.acquire(step), step % ring.stages
        mbarrier.expect(filled, 2 * C * SIZE * 4)
        tma.async_copy_global_to_shared(k, [row, h // G * SIZE], filled, k_rows.index(stage))
        tma.async_copy_global_to_shared(q, [row, h // G * SIZE], filled, q_rows.index(stage))
        tma.async_copy_global_to_shared(v, [row, h * SIZE], filled, v_rows.index(stage))
        tma.async_copy_global_to_shared(do, [row, h * SIZE], filled, do_rows.index(stage))
        filled = x_ring.acquire(step)
        mbarrier.expect(filled, 2 * SIZE * SIZE)
        at = ((chunk + i) * H + h) * SIZE
        tma.async_copy_global_to_shared(before, [at.to(gl.int32), 0], filled, x_rows)


@gluon.jit
def _take(rings, buffers, step, i, count):
    """Waits for a chunk. All groups write the same zeros."""
    rings[0].wait(step)
    if count - i * C < C:
        for n in gl.static_range(4):
            clear_tail(buffers[n].index(step % rings[0].stages), i, count)
        fence_async_shared()
        barrier()


@gluon.jit
def _walk(buffers, rings, gs, copied, gates, initial, before_ups, products, numbers, DECAY: gl.constexpr):
    """G / scale."""
    q_rows, _, _, do_rows, x_rows = buffers
    ring, x_ring, copies, _ = rings
    copy, copy_up = copied
    begin, count, chunk, h, scale, H = numbers
    dtype: gl.constexpr = copy.dtype
    chunks = gl.cdiv(count, C)
    row, col = gl.arange(0, SIZE, layout=ROW), gl.arange(0, SIZE, layout=gl.SliceLayout(0, WIDE_MMA))
    at = row[:, None] * SIZE + col[None, :]
    x = load_initial_state(initial, at, gl.program_id(0).to(gl.int64), h, H) / scale
    room = gl.zeros([1], gl.float32, ROW)
    g, _ = load_gates(gates, begin, gl.maximum(chunks - 1, 0), count, h, H, DECAY)
    gs.store(g)
    barrier()
    for step in range(chunks):
        i = chunks - 1 - step
        stage = step % ring.stages
        g, _ = load_gates(gates, begin, gl.maximum(i - 1, 0), count, h, H, DECAY)
        x_up = 1.0
        if dtype == gl.float16:
            x_up = gl.load(before_ups + (chunk + i) * H + h)
        told = copies.acquire(step)
        up = write_copy(x, copy)
        if dtype == gl.float16:
            copy_up.store(gl.exp2(room) * up)
        fence_async_shared()
        barrier()
        mbarrier.arrive(told, count=1)
        x_ring.wait(step)
        passed = gl.sum(x_rows.load(WIDE_MMA).to(gl.float32) * x, axis=1)
        gl.store(products + ((chunk + i) * H + h) * SIZE + row, passed * (gl.exp2(room) * scale * x_up))
        barrier()
        x_ring.release(step)
        _take(rings, buffers, step, i, count)
        taken = head_room(gs, ROW, dtype)
        x *= gl.exp2(whole_decay(gs, ROW) - taken + room)[:, None]
        room = taken
        x = warpgroup_mma(written(q_rows.index(stage), gs, WIDE_LEFT), do_rows.index(stage), x, is_async=True)
        x = warpgroup_mma_wait(0, deps=(x,))
        gs.store(g)
        barrier()
        ring.release(step)


@gluon.jit
def _keys(buffers, rings, gs, copied, out, dq_out, gates, outputs, numbers, DECAY: gl.constexpr):
    """dv and dk."""
    q_rows, k_rows, v_rows, do_rows, _ = buffers
    ring, _, copies, handed = rings
    dv, dk, dv_rows, dk_rows, writes = outputs
    copy, copy_up = copied
    begin, count, _, h, scale, H = numbers
    dtype: gl.constexpr = out.dtype
    within, after = scales(scale, dtype)
    TOKEN: gl.constexpr = gl.SliceLayout(1, MMA)
    row, col = gl.arange(0, C, layout=TOKEN), gl.arange(0, C, layout=gl.SliceLayout(0, MMA))
    seen = row[:, None] <= col[None, :]
    chunks = gl.cdiv(count, C)
    dv += (begin * H + h) * SIZE
    dk += (begin * H + h) * SIZE
    g, _ = load_gates(gates, begin, gl.maximum(chunks - 1, 0), count, h, H, DECAY)
    gs.store(g)
    barrier()
    for step in range(chunks):
        i = chunks - 1 - step
        stage = step % ring.stages
        qc, kc, vc, doc = q_rows.index(stage), k_rows.index(stage), v_rows.index(stage), do_rows.index(stage)
        g, _ = load_gates(gates, begin, gl.maximum(i - 1, 0), count, h, H, DECAY)
        _take(rings, buffers, step, i, count)
        nothing = gl.zeros([C, C], gl.float32, MMA)
        scores = warpgroup_mma(kc, qc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        others = warpgroup_mma(vc, doc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        gap = gs.load(gl.SliceLayout(0, MMA))[None, :] - gs.load(TOKEN)[:, None]
        weights = gl.exp2(gl.where(seen, gap, float("-inf"))) * within
        write = gl.exp2(whole_decay(gs, ROW) - gs.load(ROW)) * within
        scores, others = warpgroup_mma_wait(0, deps=(scores, others))
        scores *= weights
        other_left = (others * weights).to(dtype)
        left = gl.convert_layout(scores.to(dtype), WIDE_LEFT)
        told = handed.acquire(step)
        dq_out.slice(0, C, dim=1).store(other_left)
        fence_async_shared()
        barrier()
        mbarrier.arrive(told, count=1)
        copies.wait(step)
        if dtype == gl.float16:
            write *= copy_up.load(ROW)
        none = gl.zeros([C, SIZE], gl.float32, WIDE_MMA)
        yc = warpgroup_mma(kc, copy, none, use_acc=False, is_async=True)
        sums = sum_of_pairs(pairs_of(scores, others))
        yc = warpgroup_mma_wait(0, deps=(yc,)) * write[:, None]
        sums += gl.convert_layout(gl.sum(vc.load(WIDE_MMA).to(gl.float32) * yc, axis=1), TOKEN)
        gl.store(writes + (begin + i * C + row) * H + h, sums * after, mask=i * C + row < count)
        yc = warpgroup_mma(left, doc, yc, is_async=True)
        yc = warpgroup_mma_wait(0, deps=(yc,))
        tma.store_wait(0)
        barrier()
        out.store((yc * after).to(dtype))
        fence_async_shared()
        barrier()
        send_rows(dv, dv_rows, out, begin, i, count, h * SIZE, H * SIZE)
        yc = warpgroup_mma(vc, copy.permute((1, 0)), none, use_acc=False, is_async=True)
        yc = warpgroup_mma_wait(0, deps=(yc,)) * write[:, None]
        yc = warpgroup_mma(gl.convert_layout(other_left, WIDE_LEFT), qc, yc, is_async=True)
        yc = warpgroup_mma_wait(0, deps=(yc,))
        gs.store(g)
        tma.store_wait(0)
        barrier()
        copies.release(step)
        ring.release(step)
        out.store((yc * after).to(dtype))
        fence_async_shared()
        barrier()
        send_rows(dk, dk_rows, out, begin, i, count, h * SIZE, H * SIZE)
    tma.store_wait(0)


@gluon.jit
def _queries(buffers, rings, gs, out, gates, before_ups, outputs, numbers, DECAY: gl.constexpr):
    """dq."""
    q_rows, k_rows, _, do_rows, x_rows = buffers
    ring, x_ring, _, handed = rings
    dq, dq_rows, reads = outputs
    begin, count, chunk, h, scale, H = numbers
    within, after = scales(scale, out.dtype)
    chunks = gl.cdiv(count, C)
    dq += (begin * H + h) * SIZE
    g, _ = load_gates(gates, begin, gl.maximum(chunks - 1, 0), count, h, H, DECAY)
    gs.store(g)
    barrier()
    for step in range(chunks):
        i = chunks - 1 - step
        stage = step % ring.stages
        qc, kc, doc = q_rows.index(stage), k_rows.index(stage), do_rows.index(stage)
        g, _ = load_gates(gates, begin, gl.maximum(i - 1, 0), count, h, H, DECAY)
        up = within
        if out.dtype == gl.float16:
            up = gl.load(before_ups + (chunk + i) * H + h)
        _take(rings, buffers, step, i, count)
        x_ring.wait(step)
        none = gl.zeros([C, SIZE], gl.float32, WIDE_MMA)
        yc = warpgroup_mma(doc, x_rows.permute((1, 0)), none, use_acc=False, is_async=True)
        read = gl.exp2(gs.load(ROW)) * up
        yc = warpgroup_mma_wait(0, deps=(yc,)) * read[:, None]
        barrier()
        x_ring.release(step)
        place = i * C + gl.arange(0, C, layout=ROW)
        sums = gl.sum(qc.load(WIDE_MMA).to(gl.float32) * yc, axis=1)
        gl.store(reads + (begin + place) * H + h, sums * after, mask=place < count)
        handed.wait(step)
        yc = warpgroup_mma(out.slice(0, C, dim=1).permute((1, 0)), kc, yc, is_async=True)
        yc = warpgroup_mma_wait(0, deps=(yc,))
        gs.store(g)
        barrier()
        ring.release(step)
        out.store((yc * after).to(out.dtype))
        fence_async_shared()
        barrier()
        send_rows(dq, dq_rows, out, begin, i, count, h * SIZE, H * SIZE)
        tma.store_wait(0)
        barrier()
        handed.release(step)


@gluon.jit
def _joint_scan(
    q,  # rows of [tokens, H // G, SIZE]
    k,
    v,  # rows of [tokens, H, SIZE]
    do,
    before,  # [chunks, H, SIZE, SIZE] by rows: X
    before_ups,  # [chunks, H]: its factors, if it is fp16
    gates,  # see gates.cumulate
    local,  # [M, H, SIZE, SIZE]: G before the scan, with the next two: see InitialStates
    incoming,  # [N, H, SIZE, SIZE]
    passed,  # [M, H]
    dq,  # [tokens, H, SIZE]
    dk,
    dv,
    dq_rows,  # rows of them
    dk_rows,
    dv_rows,
    reads,  # [tokens, H]: see chunk_step
    writes,
    products,  # [chunks, H, SIZE]: those of X and G, by rows
    owner,
    start,
    length,
    first_chunk,  # [M]
    scale,
    H,
    G,
    DECAY: gl.constexpr,
    STAGES: gl.constexpr,
):
    griddepcontrol_wait()
    tile, h = gl.program_id(0), gl.program_id(1)
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    chunk = gl.load(first_chunk + tile)
    dtype: gl.constexpr = q.dtype
    q_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    k_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    v_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    do_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    x_rows = gl.allocate_shared_memory(dtype, [SIZE, SIZE], SHARED)
    copy = gl.allocate_shared_memory(dtype, [SIZE, SIZE], SHARED)
    outs = gl.allocate_shared_memory(dtype, [2, C, SIZE], SHARED)
    gates_copies = gl.allocate_shared_memory(gl.float32, [3, C], GATES_SHARED)
    copy_up = gl.allocate_shared_memory(gl.float32, [1], GATES_SHARED)
    rings = (make_ring(STAGES, 3), make_ring(1, 2), make_ring(1, 1), make_ring(1, 1))
    buffers = (q_rows, k_rows, v_rows, do_rows, x_rows)
    numbers = (begin, count, chunk, h, scale, H)
    initial = Initial(local, incoming, passed, owner)
    copied = (copy, copy_up)
    gl.warp_specialize(
        [
            (
                _keys,
                (
                    buffers, rings, gates_copies.index(0), copied, outs.index(0), outs.index(1), gates,
                    (dv, dk, dv_rows, dk_rows, writes), numbers, DECAY,
                ),
            ),
            (
                _walk,
                (buffers, rings, gates_copies.index(1), copied, gates, initial, before_ups, products, numbers, DECAY),
            ),
            (
                _queries,
                (
                    buffers, rings, gates_copies.index(2), outs.index(1), gates, before_ups, (dq, dq_rows, reads),
                    numbers, DECAY,
                ),
            ),
            (_fetch, (q, k, v, do, before, buffers, rings, begin, count, chunk, h, H, G)),
        ],
        [4, 4, 1],
        [192, 104, 24],
    )  # fmt: skip


def joint_scan(
    tiles: Tiles,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    gates: Tensor,
    before: ChunkStates,
    d_final: InitialStates,
    first_chunk: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """dq, dk, dv [B, T, H, SIZE], and what gates need: reads and writes [1, B, T, H], products [1, chunks, H, SIZE]."""
    batch, tokens, heads = v.shape[:3]
    dq, dk, dv = (v.new_empty(v.shape) for _ in range(3))
    reads, writes = (d_final.local.new_empty(1, batch, tokens, heads) for _ in range(2))
    products = reads.new_empty(1, len(before.states), heads, SIZE.value)
    states = TensorDescriptor.from_tensor(before.states.flatten(0, 2), [SIZE.value, SIZE.value], SHARED.value)
    launch(
        _joint_scan, (tiles.count, heads),
        *(rows_of(x, SIZE.value) for x in (q, k, v, do)), states, before.ups, gates, *d_final,
        dq, dk, dv, *(rows_of(x, SIZE.value) for x in (dq, dk, dv)), reads, writes, products,
        tiles.owner, tiles.start, tiles.length, first_chunk, scale, heads, heads // q.shape[2],
        DECAY=Decay.of(gates).value, STAGES=2, num_warps=4, pdl=True,
    )  # fmt: skip
    return dq, dk, dv, reads, writes, products
