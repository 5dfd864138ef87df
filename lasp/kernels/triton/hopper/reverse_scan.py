"""The reverse scan over a tile, for dk and dv at once (see chunk_scan): one group of warps computes dv, the other dk.

    dv_i = scale · (w_i k_iᵀ X + Σ_{j>=i} w_ij (k_i·q_j) do_j)          X <- w X + Σ_j w_j q_j do_jᵀ
    dk_i = scale · (w_i X v_i  + Σ_{j>=i} w_ij (v_i·do_j) q_j)

X is the gradient of the state / scale. Each group holds half of its rows, and tells the other when they are ready.
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma_wait

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.hopper.chunk_step import LARGE
from lasp.kernels.triton.hopper.layouts import GATES_SHARED, HALF, MMA, SHARED, SIZE, WIDE_LEFT, WIDE_MMA, C
from lasp.kernels.triton.hopper.products import add_product, product
from lasp.kernels.triton.hopper.reverse_step import head_room, written
from lasp.kernels.triton.hopper.ring import Ring, make_meeting, make_ring
from lasp.kernels.triton.hopper.scalar_shared import half_rows, load_gates, load_initial_state
from lasp.kernels.triton.hopper.shared import REGISTERS, barrier, publish, rows_of, send_rows, whole_decay
from lasp.kernels.triton.hopper.tiles import Initial, Rows, Tile, clear_tails, fetch_rows, make_rows
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import NONE
from lasp.kernels.triton.shared.state_passing import InitialStates

# Where the state passes from rows to the places in which products have it, both without bank conflicts.
PASSAGE = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))


class _Staged(NamedTuple):
    """What both groups of warps keep in shared memory."""

    states: gl.shared_memory_descriptor  # [2, SIZE, SIZE]: one is read while the next is written
    gates: gl.shared_memory_descriptor  # [2, C]: a group's own
    y: gl.shared_memory_descriptor  # [2, C, SIZE], likewise
    peaks: gl.shared_memory_descriptor  # [4, 1]: the largest numbers of both halves of both states


class _Meetings(NamedTuple):
    states: Ring  # when both halves of a copy have been written
    peaks: Ring


@gluon.jit
def _fetch(sources, rows, ring, tile, G):
    chunks = gl.cdiv(tile.length, C)
    for step in range(chunks):
        token = tile.begin.to(gl.int32) + (chunks - 1 - step) * C
        fetch_rows(sources, rows, ring, step, token, tile.h, G)


@gluon.jit
def _write_copy(x, copies, n, peaks, meeting, PART: gl.constexpr):
    """Writes a group's half of X, the n-th one, for products to read. Returns what undoes the scale of both halves: see
    chunk_step."""
    up = 1.0
    if copies.dtype == gl.float16:
        ONE: gl.constexpr = gl.SliceLayout(1, WIDE_MMA)
        most = gl.max(gl.max(gl.abs(x), axis=1), axis=0)
        peaks.index(2 * (n % 2) + PART).store(gl.full([1], most, gl.float32, ONE))
        barrier()
        meeting.fill(n)
        meeting.wait(n)
        mine, other = peaks.index(2 * (n % 2)).load(ONE), peaks.index(2 * (n % 2) + 1).load(ONE)
        most = gl.maximum(gl.max(gl.maximum(mine, other), axis=0), 1e-30)
        up = most / LARGE
        x *= LARGE / most
    copies.index(n % 2).slice(PART * HALF, HALF, dim=0).store(x.to(copies.dtype))
    return up


@gluon.jit
def _compute(
    rows, staged, ring, meetings, gates, initial, y, y_rows, tile, scale,
    PART: gl.constexpr,  # the group of warps: 0 for dv, 1 for dk
    DECAY: gl.constexpr,
):  # fmt: skip
    begin, count, h, H = tile.begin, tile.length, tile.h, tile.H
    x_copies, outputs = staged.states, staged.y
    out, gs = outputs.index(PART), staged.gates.index(PART)
    dtype: gl.constexpr = out.dtype
    row, col = gl.arange(0, C, layout=gl.SliceLayout(1, MMA)), gl.arange(0, C, layout=gl.SliceLayout(0, MMA))
    seen = row[:, None] <= col[None, :]
    number = gl.program_id(0).to(gl.int64)
    state_at = half_rows(PART)
    y += (begin * H + h) * SIZE
    chunks = gl.cdiv(count, C)
    griddepcontrol_wait()
    x = load_initial_state(initial, state_at, number, h, H)
    # What is written only when both groups are in the loop, for the state to change places in.
    spare = (x_copies.index(1) if PART == 0 else outputs)._reinterpret(gl.float32, [HALF, SIZE], PASSAGE)
    spare.store(x / scale)
    barrier()
    x = spare.load(WIDE_MMA)
    up = _write_copy(x, x_copies, 0, staged.peaks, meetings.peaks, PART)
    before = gl.zeros([1], gl.float32, gl.SliceLayout(1, WIDE_MMA))
    if DECAY != NONE:
        g, _ = load_gates(gates, begin, gl.maximum(chunks - 1, 0), count, h, H, DECAY)
        gs.store(g)
    publish()
    meetings.states.fill(0)
    for step in range(chunks):
        i = chunks - 1 - step
        stage = step % ring.stages
        qc, kc, vc, doc = rows.q.index(stage), rows.k.index(stage), rows.v.index(stage), rows.do.index(stage)
        if DECAY != NONE:
            g, _ = load_gates(gates, begin, gl.maximum(i - 1, 0), count, h, H, DECAY)
        meetings.states.wait(step)
        ring.wait(step)
        clear_tails(Rows(qc, kc, vc, doc), i, count)
        if DECAY != NONE:
            end = whole_decay(gs, gl.SliceLayout(1, WIDE_MMA))
            if dtype == gl.float16:
                end = end - head_room(gs, gl.SliceLayout(1, WIDE_MMA), dtype) + before
            x *= gl.exp2(end)[:, None]
        if PART == 0:
            left, right, summed, xs = kc, qc, doc, x_copies.index(step % 2)
        else:
            left, right, summed, xs = vc, doc, qc, x_copies.index(step % 2).permute((1, 0))
        scores = product(left, right.permute((1, 0)), MMA)  # k_i·q_j, or v_i·do_j
        yc = product(left, xs, WIDE_MMA)  # k_iᵀ X, or X v_i
        queries = qc.slice(PART * HALF, HALF, dim=1)
        if DECAY == NONE:
            x = add_product(x, queries.permute((1, 0)), doc)  # X + Σ_j q_j do_jᵀ
            scores = warpgroup_mma_wait(2, deps=(scores,))
            scores = gl.where(seen, scores, 0.0)
            if dtype == gl.float16:
                yc = warpgroup_mma_wait(1, deps=(yc,)) * up
        else:
            x = add_product(x, written(queries, gs, WIDE_LEFT), doc)  # w X + Σ_j w_j q_j do_jᵀ
            g_row, g_col = gs.load(gl.SliceLayout(1, MMA)), gs.load(gl.SliceLayout(0, MMA))
            weights = gl.exp2(gl.where(seen, g_col[None, :] - g_row[:, None], float("-inf")))
            read = whole_decay(gs, gl.SliceLayout(1, WIDE_MMA)) - gs.load(gl.SliceLayout(1, WIDE_MMA))
            if dtype == gl.float16:
                read = gl.exp2(read + before) * up
                before = head_room(gs, gl.SliceLayout(1, WIDE_MMA), dtype)
            else:
                read = gl.exp2(read)
            scores = warpgroup_mma_wait(2, deps=(scores,))
            scores *= weights
            yc = warpgroup_mma_wait(1, deps=(yc,)) * read[:, None]
        yc = add_product(yc, gl.convert_layout(scores.to(dtype), WIDE_LEFT), summed)
        x = warpgroup_mma_wait(1, deps=(x,))
        up = _write_copy(x, x_copies, step + 1, staged.peaks, meetings.peaks, PART)
        if DECAY != NONE:
            gs.store(g)
        fence_async_shared()
        tma.store_wait(0)  # of the chunk before, so that its buffer is free
        barrier()
        meetings.states.fill(step + 1)
        yc = warpgroup_mma_wait(0, deps=(yc,)) * scale
        out.store(yc.to(dtype))
        publish()
        ring.release(step)
        send_rows(y, y_rows, out, begin, i, count, h * SIZE, H * SIZE)
    tma.store_wait(0)


@gluon.jit
def _reverse_scan(
    q, k,  # rows of [tokens, H // G, SIZE]
    v, do,  # rows of [tokens, H, SIZE]
    gates,  # see gates.cumulate
    local, incoming, passed,  # [M, H, SIZE, SIZE]: X · scale before the scan: see InitialStates
    dk, dv,  # [tokens, H, SIZE]
    dk_rows,  # rows of them
    dv_rows, owner, start, length, scale, H, G, DECAY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    tile, h = gl.program_id(0), gl.program_id(1)
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    dtype: gl.constexpr = q.dtype
    rows, sources = make_rows(dtype, STAGES, SIZE, STAGES, SIZE), Rows(q, k, v, do)
    x_copies = gl.allocate_shared_memory(dtype, [2, SIZE, SIZE], SHARED)
    outputs = gl.allocate_shared_memory(dtype, [2, C, SIZE], SHARED)
    gates_copies = gl.allocate_shared_memory(gl.float32, [2, C], GATES_SHARED)
    ring = make_ring(STAGES)
    ready = make_meeting()
    peaks = gl.allocate_shared_memory(gl.float32, [4, 1], GATES_SHARED)
    meetings = _Meetings(ready, make_meeting())
    staged = _Staged(x_copies, gates_copies, outputs, peaks)
    initial = Initial(local, incoming, passed, owner)
    here = Tile(begin, count, None, h, H)
    gl.warp_specialize(
        [
            (_compute, (rows, staged, ring, meetings, gates, initial, dv, dv_rows, here, scale, 0, DECAY)),
            (_compute, (rows, staged, ring, meetings, gates, initial, dk, dk_rows, here, scale, 1, DECAY)),
            (_fetch, (sources, rows, ring, here, G)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def reverse_scan(
    tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, do: Tensor, gates: Tensor | None, initial: InitialStates,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv [B, T, H, SIZE]."""
    batch, tokens, heads = v.shape[:3]
    dk, dv = (v.new_empty(batch, tokens, heads, SIZE.value) for _ in range(2))
    launch(
        _reverse_scan, (tiles.count, heads),
        *(rows_of(x, SIZE.value) for x in (q, k, v, do)), gates, *initial,
        dk, dv, rows_of(dk, SIZE.value), rows_of(dv, SIZE.value),
        tiles.owner, tiles.start, tiles.length, scale, heads, heads // q.shape[2],
        DECAY=Decay.of(gates).value, STAGES=2, num_warps=4, pdl=True,
    )  # fmt: skip
    return dk, dv
