"""The forward scan over a tile's chunks, for o, with gates: one group of warps holds the state, and hands copies of it
to the other, which finds the outputs meanwhile. See chunk_scan, whose groups share the state's columns.

    o_i = scale · (w_i Xᵀ q_i + Σ_{j<=i} w_ij (q_i·k_j) v_j)          X <- w X + Σ_j w_j k_j v_jᵀ
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.hopper.chunk_step import scales, write_copy
from lasp.kernels.triton.hopper.layouts import GATES_SHARED, MMA, SHARED, SIZE, WIDE_LEFT, WIDE_MMA, C
from lasp.kernels.triton.hopper.products import add_product, product
from lasp.kernels.triton.hopper.ring import Ring, make_ring
from lasp.kernels.triton.hopper.scalar_shared import load_gates, load_initial_state
from lasp.kernels.triton.hopper.shared import REGISTERS, barrier, clear_tail, publish, rows_of, send_rows, whole_decay
from lasp.kernels.triton.hopper.tiles import Initial, Tile
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.state_passing import InitialStates

COPIES = gl.constexpr(2)  # of the state, which so may be a chunk ahead
ROW = gl.constexpr(gl.SliceLayout(1, WIDE_MMA.value))


class _Rows(NamedTuple):
    """Of chunks of these tensors: how they come, or where in shared memory they lie, by stages of a ring."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor


class _Rings(NamedTuple):
    rows: Ring
    copies: Ring


class _Copies(NamedTuple):
    """Of the state, in shared memory, [COPIES, SIZE, SIZE], and, if it is fp16, their factors."""

    states: gl.shared_memory_descriptor
    ups: gl.shared_memory_descriptor


@gluon.jit
def _fetch(sources, rows, ring, tile, G):
    h = tile.h
    for step in range(gl.cdiv(tile.length, C)):
        token = tile.begin.to(gl.int32) + step * C
        filled, stage = ring.acquire(step), step % ring.stages
        mbarrier.expect(filled, 3 * 2 * C * SIZE)
        tma.async_copy_global_to_shared(sources.q, [token, h // G * SIZE], filled, rows.q.index(stage))
        tma.async_copy_global_to_shared(sources.k, [token, h // G * SIZE], filled, rows.k.index(stage))
        tma.async_copy_global_to_shared(sources.v, [token, h * SIZE], filled, rows.v.index(stage))


@gluon.jit
def _take(rows, ring, step, count):
    """Waits for a chunk. Both groups write the same zeros."""
    ring.wait(step)
    if count - step * C < C:
        clear_tail(rows.q.index(step % ring.stages), step, count)
        clear_tail(rows.k.index(step % ring.stages), step, count)
        clear_tail(rows.v.index(step % ring.stages), step, count)
        publish()


@gluon.jit
def _written(keys, gs):
    """w_j k_j, a product's first operand."""
    PLACE: gl.constexpr = gl.SliceLayout(0, WIDE_LEFT)
    weights = gl.exp2(whole_decay(gs, PLACE) - gs.load(PLACE))
    return (keys.permute((1, 0)).load(WIDE_LEFT) * weights[None, :]).to(keys.dtype)


@gluon.jit
def _scan(rows, rings, gs, copied, gates, initial, tile, DECAY: gl.constexpr):
    """X."""
    ring, copies = rings.rows, rings.copies
    x_copies, x_ups = copied.states, copied.ups
    begin, count, h, H = tile.begin, tile.length, tile.h, tile.H
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
        copies.acquire(i)
        place = i % COPIES
        up = write_copy(x, x_copies.index(place))
        if x_copies.dtype == gl.float16:
            x_ups.index(place).store(gl.full([1], up, gl.float32, ROW))
        publish()
        copies.fill(i)
        _take(rows, ring, i, count)
        x *= gl.exp2(whole_decay(gs, ROW))[:, None]
        x = add_product(x, _written(rows.k.index(stage), gs), rows.v.index(stage))  # w X + Σ_j w_j k_j v_jᵀ
        x = warpgroup_mma_wait(0, deps=(x,))
        gs.store(g)
        barrier()
        ring.release(i)


@gluon.jit
def _outputs(rows, rings, gs, copied, outs, gates, o, o_rows, tile, scale, DECAY: gl.constexpr):
    ring, copies = rings.rows, rings.copies
    x_copies, x_ups = copied.states, copied.ups
    begin, count, h, H = tile.begin, tile.length, tile.h, tile.H
    TOKEN: gl.constexpr = gl.SliceLayout(1, MMA)
    dtype: gl.constexpr = rows.q.dtype
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
        qc, kc, vc = rows.q.index(stage), rows.k.index(stage), rows.v.index(stage)
        g, _ = load_gates(gates, begin, gl.minimum(i + 1, last), count, h, H, DECAY)
        _take(rows, ring, i, count)
        scores = product(qc, kc.permute((1, 0)), MMA)  # q_i·k_j
        gap = gs.load(TOKEN)[:, None] - gs.load(gl.SliceLayout(0, MMA))[None, :]
        weights = gl.exp2(gl.where(seen, gap, float("-inf"))) * within
        read = gl.exp2(gs.load(ROW)) * within
        copies.wait(i)
        oc = product(qc, x_copies.index(place), WIDE_MMA)  # Xᵀ q_i
        if dtype == gl.float16:
            read *= x_ups.index(place).load(ROW)
        scores = warpgroup_mma_wait(1, deps=(scores,)) * weights
        left = gl.convert_layout(scores.to(dtype), WIDE_LEFT)
        oc = warpgroup_mma_wait(0, deps=(oc,)) * read[:, None]
        oc = add_product(oc, left, vc)  # … + Σ_j w_ij (q_i·k_j) v_j
        gs.store(g)
        oc = warpgroup_mma_wait(0, deps=(oc,))
        out = outs.index(i % 2)
        out.store((oc * after).to(dtype))
        fence_async_shared()
        tma.store_wait(0)  # of the chunk before, whose buffer is the next one's
        barrier()
        copies.release(i)
        ring.release(i)
        send_rows(o + (begin * H + h) * SIZE, o_rows, out, begin, i, count, h * SIZE, H * SIZE)
    tma.store_wait(0)


@gluon.jit
def _forward_scan(
    q, k,  # rows of [tokens, H // G, SIZE]
    v,  # rows of [tokens, H, SIZE]
    gates,  # see gates.cumulate
    local, incoming, passed,  # [M, H, SIZE, SIZE]: X before the scan: see InitialStates
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
    rows, sources, copied = _Rows(q_rows, k_rows, v_rows), _Rows(q, k, v), _Copies(x_copies, x_ups)
    rings = _Rings(make_ring(STAGES, 2), make_ring(COPIES, 1))
    here, initial = Tile(begin, count, None, h, H), Initial(local, incoming, passed, owner)
    gl.warp_specialize(
        [
            (_scan, (rows, rings, gates_copies.index(0), copied, gates, initial, here, DECAY)),
            (_outputs, (rows, rings, gates_copies.index(1), copied, outs, gates, o, o_rows, here, scale, DECAY)),
            (_fetch, (sources, rows, rings.rows, here, G)),
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
