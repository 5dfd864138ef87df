"""The forward scan over a tile's chunks, for o, with gates: one group of warps holds the state, and hands copies of it
to the other, which finds the outputs meanwhile. See chunk_scan, whose groups share the state's columns.

    o_i = scale · (w_i Xᵀ q_i + Σ_{j<=i} w_ij (q_i·k_j) v_j)          X <- w X + Σ_j w_j k_j v_jᵀ
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
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.hopper.chunk_step import scales, write_copy
from lasp.kernels.triton.hopper.ring import make_ring
from lasp.kernels.triton.hopper.shared import (
    GATES_SHARED,
    MMA,
    REGISTERS,
    SHARED,
    SIZE,
    WIDE_LEFT,
    WIDE_MMA,
    WIDE_ROWS,
    C,
    barrier,
    clear_tail,
    load_gates,
    load_initial_state,
    rows_of,
    send_rows,
    whole_decay,
)
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.state_passing import InitialStates

COPIES = gl.constexpr(2)  # of the state, which so may be a chunk ahead
ROW = gl.constexpr(gl.SliceLayout(1, WIDE_MMA.value))


@gluon.jit
def _fetch(q, k, v, buffers, ring, begin, count, h, G):
    for step in range(gl.cdiv(count, C)):
        row = begin.to(gl.int32) + step * C
        filled, stage = ring.acquire(step), step % ring.stages
        mbarrier.expect(filled, 3 * 2 * C * SIZE)
        tma.async_copy_global_to_shared(q, [row, h // G * SIZE], filled, buffers[0].index(stage))
        tma.async_copy_global_to_shared(k, [row, h // G * SIZE], filled, buffers[1].index(stage))
        tma.async_copy_global_to_shared(v, [row, h * SIZE], filled, buffers[2].index(stage))


@gluon.jit
def _take(ring, buffers, step, count):
    """Waits for a chunk. Both groups write the same zeros."""
    ring.wait(step)
    if count - step * C < C:
        for n in gl.static_range(3):
            clear_tail(buffers[n].index(step % ring.stages), step, count, WIDE_ROWS)
        fence_async_shared()
        barrier()


@gluon.jit
def _written(keys, gs):
    """w_j k_j, a product's first operand."""
    PLACE: gl.constexpr = gl.SliceLayout(0, WIDE_LEFT)
    weights = gl.exp2(whole_decay(gs, PLACE) - gs.load(PLACE))
    return (keys.permute((1, 0)).load(WIDE_LEFT) * weights[None, :]).to(keys.dtype)


@gluon.jit
def _walk(buffers, rings, gs, copied, gates, initial, numbers, DECAY: gl.constexpr):
    """X."""
    _, k_rows, v_rows = buffers
    ring, copies = rings
    x_copies, x_ups = copied
    begin, count, h, _, H = numbers
    row, col = gl.arange(0, SIZE, layout=ROW), gl.arange(0, SIZE, layout=gl.SliceLayout(0, WIDE_MMA))
    chunks = gl.cdiv(count, C)
    last = gl.maximum(chunks - 1, 0)
    x = load_initial_state(initial, row[:, None] * SIZE + col[None, :], gl.program_id(0).to(gl.int64), h, H)
    g, _ = load_gates(gates, begin, 0, count, h, H, DECAY)
    gs.store(g)
    barrier()
    for i in range(chunks):
        stage = i % ring.stages
        g, _ = load_gates(gates, begin, gl.minimum(i + 1, last), count, h, H, DECAY)
        told, place = copies.acquire(i), i % COPIES
        up = write_copy(x, x_copies.index(place))
        if k_rows.dtype == gl.float16:
            x_ups.index(place).store(gl.full([1], up, gl.float32, ROW))
        fence_async_shared()
        barrier()
        mbarrier.arrive(told, count=1)
        _take(ring, buffers, i, count)
        x *= gl.exp2(whole_decay(gs, ROW))[:, None]
        x = warpgroup_mma(_written(k_rows.index(stage), gs), v_rows.index(stage), x, is_async=True)
        x = warpgroup_mma_wait(0, deps=(x,))
        gs.store(g)
        barrier()
        ring.release(i)


@gluon.jit
def _outputs(buffers, rings, gs, copied, outs, gates, o, o_rows, numbers, DECAY: gl.constexpr):
    q_rows, k_rows, v_rows = buffers
    ring, copies = rings
    x_copies, x_ups = copied
    begin, count, h, scale, H = numbers
    TOKEN: gl.constexpr = gl.SliceLayout(1, MMA)
    dtype: gl.constexpr = q_rows.dtype
    within, after = scales(scale, dtype)
    chunks = gl.cdiv(count, C)
    last = gl.maximum(chunks - 1, 0)
    row, col = gl.arange(0, C, layout=TOKEN), gl.arange(0, C, layout=gl.SliceLayout(0, MMA))
    seen = row[:, None] >= col[None, :]
    g, _ = load_gates(gates, begin, 0, count, h, H, DECAY)
    gs.store(g)
    barrier()
    for i in range(chunks):
        stage, place = i % ring.stages, i % COPIES
        qc, kc, vc = q_rows.index(stage), k_rows.index(stage), v_rows.index(stage)
        g, _ = load_gates(gates, begin, gl.minimum(i + 1, last), count, h, H, DECAY)
        _take(ring, buffers, i, count)
        nothing = gl.zeros([C, C], gl.float32, MMA)
        scores = warpgroup_mma(qc, kc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        gap = gs.load(TOKEN)[:, None] - gs.load(gl.SliceLayout(0, MMA))[None, :]
        weights = gl.exp2(gl.where(seen, gap, float("-inf"))) * within
        read = gl.exp2(gs.load(ROW)) * within
        copies.wait(i)
        wide = gl.zeros([C, SIZE], gl.float32, WIDE_MMA)
        oc = warpgroup_mma(qc, x_copies.index(place), wide, use_acc=False, is_async=True)
        if dtype == gl.float16:
            read *= x_ups.index(place).load(ROW)
        scores = warpgroup_mma_wait(1, deps=(scores,)) * weights
        left = gl.convert_layout(scores.to(dtype), WIDE_LEFT)
        oc = warpgroup_mma_wait(0, deps=(oc,)) * read[:, None]
        oc = warpgroup_mma(left, vc, oc, is_async=True)
        gs.store(g)
        oc = warpgroup_mma_wait(0, deps=(oc,))
        out = outs.index(i % 2)
        out.store((oc * after).to(dtype))
        fence_async_shared()
        tma.store_wait(0)  # of the chunk before, whose buffer is the next one's
        barrier()
        copies.release(i)
        ring.release(i)
        send_rows(o + (begin * H + h) * SIZE, o_rows, out, begin, i, count, h * SIZE, H * SIZE, WIDE_ROWS)
    tma.store_wait(0)


@gluon.jit
def _forward_scan(
    q,  # rows of [tokens, H // G, SIZE]
    k,
    v,  # rows of [tokens, H, SIZE]
    gates,  # see gates.cumulate
    local,  # [M, H, SIZE, SIZE]: X before the scan, with the next two: see InitialStates
    incoming,  # [N, H, SIZE, SIZE]
    passed,  # [M, H]
    o,  # [tokens, H, SIZE]
    o_rows,  # rows of it
    owner, start, length, scale, H, G,
    DECAY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    griddepcontrol_wait()
    tile, h = gl.program_id(0), gl.program_id(1)
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    dtype: gl.constexpr = q.dtype
    q_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    k_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    v_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    x_copies = gl.allocate_shared_memory(dtype, [COPIES, SIZE, SIZE], SHARED)
    x_ups = gl.allocate_shared_memory(gl.float32, [COPIES, 1], GATES_SHARED)
    outs = gl.allocate_shared_memory(dtype, [2, C, SIZE], SHARED)
    gates_copies = gl.allocate_shared_memory(gl.float32, [2, C], GATES_SHARED)
    buffers, copied = (q_rows, k_rows, v_rows), (x_copies, x_ups)
    rings = (make_ring(STAGES, 2), make_ring(COPIES, 1))
    numbers = (begin, count, h, scale, H)
    initial = (local, incoming, passed, owner)
    gl.warp_specialize(
        [
            (_walk, (buffers, rings, gates_copies.index(0), copied, gates, initial, numbers, DECAY)),
            (_outputs, (buffers, rings, gates_copies.index(1), copied, outs, gates, o, o_rows, numbers, DECAY)),
            (_fetch, (q, k, v, buffers, rings[0], begin, count, h, G)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def forward_scan(
    tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, initial: InitialStates, scale: float
) -> Tensor:
    """o [B, T, H, SIZE]."""
    heads, o = v.shape[2], v.new_empty(v.shape)
    launch(
        _forward_scan, (tiles.count, heads),
        *(rows_of(x, SIZE.value) for x in (q, k, v)), gates, *initial, o, rows_of(o, SIZE.value),
        tiles.owner, tiles.start, tiles.length, scale, heads, heads // q.shape[2],
        DECAY=Decay.of(gates).value, STAGES=2, num_warps=4, pdl=True,
    )  # fmt: skip
    return o
