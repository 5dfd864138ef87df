"""The reverse scan over a tile for every gradient at once, given the states X before its chunks (scalar.chunk_states):
see chunk_step, with G the gradient of the state behind a chunk.

    dv_j = w_j Gᵀk_j + scale · Σ_{i>=j} w_ij (q_i·k_j) do_i       G <- w G + scale · Σ_i w_i q_i do_iᵀ
    dk_j = w_j G v_j + scale · Σ_{i>=j} w_ij (do_i·v_j) q_i
    dq_i = scale · (w_i X do_i + Σ_{j<=i} w_ij (do_i·v_j) k_j)

Three groups of warps, which hardly wait for each other: one holds G / scale, and hands copies of it to one for dv and
one for dq and dk. Registers have no room for the addresses of all parts of buffers, so that these are found anew in
every step, from an index `none` that is 0, which the compiler does not know.
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
from lasp.kernels.triton.hopper.reverse_step import head_room, pairs_of, sum_of_pairs, written
from lasp.kernels.triton.hopper.ring import Ring, make_ring
from lasp.kernels.triton.hopper.scalar_shared import load_gates, load_initial_state
from lasp.kernels.triton.hopper.shared import barrier, blocks_of, publish, rows_of, send_rows, whole_decay
from lasp.kernels.triton.hopper.tiles import Initial, Rows, Tile, clear_tails, fetch_rows, make_rows
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.scalar.chunk_states import ChunkStates
from lasp.kernels.triton.shared.state_passing import InitialStates

ROW = gl.constexpr(gl.SliceLayout(1, WIDE_MMA))


class _Rings(NamedTuple):
    rows: Ring
    states: Ring  # X, read from memory
    copies: Ring  # of G


class _States(NamedTuple):
    """In shared memory, [1, SIZE, SIZE]: X, a copy of G, and, if it is fp16, its factor, [1]."""

    before: gl.shared_memory_descriptor
    copy: gl.shared_memory_descriptor
    copy_up: gl.shared_memory_descriptor


class _Queries(NamedTuple):
    """What `_keys` writes."""

    dq: gl.tensor
    dq_rows: gl.tensor
    dk: gl.tensor
    dk_rows: gl.tensor
    reads: gl.tensor


class _Inputs(NamedTuple):
    """What groups of warps read of memory themselves."""

    gates: gl.tensor
    initial: Initial
    before_ups: gl.tensor


@gluon.jit
def _fetch(sources, before, rows, states, rings, tile, G):
    ring, begin, h = rings.rows, tile.begin, tile.h
    chunks = gl.cdiv(tile.length, C)
    for step in range(chunks):
        i = chunks - 1 - step
        token = begin.to(gl.int32) + i * C
        fetch_rows(sources, rows, ring, step, token, h, G)
        filled = rings.states.acquire(step)
        mbarrier.expect(filled, 2 * SIZE * SIZE)
        at = ((tile.chunk + i) * tile.H + h) * SIZE
        tma.async_copy_global_to_shared(before, [at.to(gl.int32), 0], filled, states.before.index(0))


@gluon.jit
def _take(rows, ring, step, i, count):
    """Waits for a chunk."""
    ring.wait(step)
    stage = step % ring.stages
    chunk = Rows(rows.q.index(stage), rows.k.index(stage), rows.v.index(stage), rows.do.index(stage))
    clear_tails(chunk, i, count)


@gluon.jit
def _weights(gs, scale):
    """scale · w_ij [C, C], keys by rows."""
    row, col = gl.arange(0, C, layout=gl.SliceLayout(1, MMA)), gl.arange(0, C, layout=gl.SliceLayout(0, MMA))
    gap = gs.load(gl.SliceLayout(0, MMA))[None, :] - gs.load(gl.SliceLayout(1, MMA))[:, None]
    return gl.exp2(gl.where(row[:, None] <= col[None, :], gap, float("-inf"))) * scale


@gluon.jit
def _scan(rows, states, rings, gs, inputs, products, tile, scale, DECAY: gl.constexpr):
    """G / scale."""
    ring, x_ring, copies = rings.rows, rings.states, rings.copies
    gates, initial, before_ups = inputs.gates, inputs.initial, inputs.before_ups
    x_rows, copy, copy_up = states.before, states.copy, states.copy_up
    begin, count, chunk, h, H = tile.begin, tile.length, tile.chunk, tile.h, tile.H
    dtype: gl.constexpr = copy.dtype
    chunks, none = gl.cdiv(count, C), gl.maximum(-count, 0)
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
        copies.acquire(step)
        up = write_copy(x, copy.index(gl.minimum(step, none)))
        if dtype == gl.float16:
            copy_up.store(gl.exp2(room) * up)
        publish()
        copies.fill(step)
        x_ring.wait(step)
        passed = gl.sum(x_rows.index(gl.minimum(step, none)).load(WIDE_MMA).to(gl.float32) * x, axis=1)
        gl.store(products + ((chunk + i) * H + h) * SIZE + row, passed * (gl.exp2(room) * scale * x_up))
        barrier()
        x_ring.release(step)
        _take(rows, ring, step, i, count)
        taken = head_room(gs, ROW, dtype)
        x *= gl.exp2(whole_decay(gs, ROW) - taken + room)[:, None]
        room = taken
        x = add_product(x, written(rows.q.index(stage), gs, WIDE_LEFT), rows.do.index(stage))  # w G + Σ_i w_i q_i do_iᵀ
        x = warpgroup_mma_wait(0, deps=(x,))
        gs.store(g)
        barrier()
        ring.release(step)


@gluon.jit
def _values(rows, states, rings, gs, out, gates, dv, dv_rows, writes, tile, scale, DECAY: gl.constexpr):
    """dv, and the sums of pairs."""
    ring, copies = rings.rows, rings.copies
    copy, copy_up = states.copy, states.copy_up
    begin, count, h, H = tile.begin, tile.length, tile.h, tile.H
    dtype: gl.constexpr = out.dtype
    within, after = scales(scale, dtype)
    TOKEN: gl.constexpr = gl.SliceLayout(1, MMA)
    row = gl.arange(0, C, layout=TOKEN)
    chunks, none = gl.cdiv(count, C), gl.maximum(-count, 0)
    dv += (begin * H + h) * SIZE
    g, _ = load_gates(gates, begin, gl.maximum(chunks - 1, 0), count, h, H, DECAY)
    gs.store(g)
    barrier()
    for step in range(chunks):
        i = chunks - 1 - step
        stage = step % ring.stages
        qc, kc, vc, doc = rows.q.index(stage), rows.k.index(stage), rows.v.index(stage), rows.do.index(stage)
        g, _ = load_gates(gates, begin, gl.maximum(i - 1, 0), count, h, H, DECAY)
        _take(rows, ring, step, i, count)
        scores = product(kc, qc.permute((1, 0)), MMA)  # q_i·k_j
        others = product(vc, doc.permute((1, 0)), MMA)  # do_i·v_j
        weights = _weights(gs, within)
        write = gl.exp2(whole_decay(gs, ROW) - gs.load(ROW)) * within
        scores, others = warpgroup_mma_wait(0, deps=(scores, others))
        scores *= weights
        left = gl.convert_layout(scores.to(dtype), WIDE_LEFT)
        pairs = pairs_of(scores, others)
        copies.wait(step)
        if dtype == gl.float16:
            write *= copy_up.load(ROW)
        yc = product(kc, copy.index(gl.minimum(step, none)), WIDE_MMA)  # Gᵀk_j
        sums = sum_of_pairs(pairs)
        yc = warpgroup_mma_wait(0, deps=(yc,)) * write[:, None]
        sums += gl.convert_layout(gl.sum(vc.load(WIDE_MMA).to(gl.float32) * yc, axis=1), TOKEN)
        gl.store(writes + (begin + i * C + row) * H + h, sums * after, mask=i * C + row < count)
        yc = add_product(yc, left, doc)  # … + Σ_i w_ij (q_i·k_j) do_i
        gs.store(g)
        yc = warpgroup_mma_wait(0, deps=(yc,))
        tma.store_wait(0)
        barrier()
        copies.release(step)
        ring.release(step)
        out.store((yc * after).to(dtype))
        publish()
        send_rows(dv, dv_rows, out, begin, i, count, h * SIZE, H * SIZE)
    tma.store_wait(0)


@gluon.jit
def _keys(rows, states, rings, gs, outs, inputs, outputs, tile, scale, DECAY: gl.constexpr):
    """dq and dk."""
    ring, x_ring, copies = rings.rows, rings.states, rings.copies
    gates, before_ups = inputs.gates, inputs.before_ups
    x_rows, copy, copy_up = states.before, states.copy, states.copy_up
    dq, dk, reads = outputs.dq, outputs.dk, outputs.reads
    begin, count, chunk, h, H = tile.begin, tile.length, tile.chunk, tile.h, tile.H
    dtype: gl.constexpr = outs.dtype
    within, after = scales(scale, dtype)
    chunks, none = gl.cdiv(count, C), gl.maximum(-count, 0)
    dq += (begin * H + h) * SIZE
    dk += (begin * H + h) * SIZE
    g, _ = load_gates(gates, begin, gl.maximum(chunks - 1, 0), count, h, H, DECAY)
    gs.store(g)
    barrier()
    for step in range(chunks):
        i = chunks - 1 - step
        stage = step % ring.stages
        qc, kc, vc, doc = rows.q.index(stage), rows.k.index(stage), rows.v.index(stage), rows.do.index(stage)
        out = outs.index(1 + gl.minimum(step, none))
        g, _ = load_gates(gates, begin, gl.maximum(i - 1, 0), count, h, H, DECAY)
        up = within
        if dtype == gl.float16:
            up = gl.load(before_ups + (chunk + i) * H + h)
        _take(rows, ring, step, i, count)
        scores = product(vc, doc.permute((1, 0)), MMA)  # do_i·v_j
        weights = _weights(gs, within)
        scores = (warpgroup_mma_wait(0, deps=(scores,)) * weights).to(dtype)
        x_ring.wait(step)
        xc = x_rows.index(gl.minimum(step, none)).permute((1, 0))
        yc = product(doc, xc, WIDE_MMA)  # X do_i
        tma.store_wait(0)
        barrier()
        out.slice(0, C, dim=1).store(scores)  # where they can be read by columns
        fence_async_shared()
        read = gl.exp2(gs.load(ROW)) * up
        yc = warpgroup_mma_wait(0, deps=(yc,)) * read[:, None]
        barrier()
        x_ring.release(step)
        place = i * C + gl.arange(0, C, layout=ROW)
        sums = gl.sum(qc.load(WIDE_MMA).to(gl.float32) * yc, axis=1)
        gl.store(reads + (begin + place) * H + h, sums * after, mask=place < count)
        yc = add_product(yc, out.slice(0, C, dim=1).permute((1, 0)), kc)  # … + Σ_j w_ij (do_i·v_j) k_j
        yc = warpgroup_mma_wait(0, deps=(yc,))
        barrier()
        out.store((yc * after).to(dtype))
        publish()
        send_rows(dq, outputs.dq_rows, out, begin, i, count, h * SIZE, H * SIZE)
        copies.wait(step)
        write = gl.exp2(whole_decay(gs, ROW) - gs.load(ROW)) * within
        if dtype == gl.float16:
            write *= copy_up.load(ROW)
        yc = product(vc, copy.index(gl.minimum(step, none)).permute((1, 0)), WIDE_MMA)  # G v_j
        yc = warpgroup_mma_wait(0, deps=(yc,)) * write[:, None]
        yc = add_product(yc, gl.convert_layout(scores, WIDE_LEFT), qc)  # … + Σ_i w_ij (do_i·v_j) q_i
        gs.store(g)
        yc = warpgroup_mma_wait(0, deps=(yc,))
        tma.store_wait(0)
        barrier()
        copies.release(step)
        ring.release(step)
        out.store((yc * after).to(dtype))
        publish()
        send_rows(dk, outputs.dk_rows, out, begin, i, count, h * SIZE, H * SIZE)
    tma.store_wait(0)


@gluon.jit
def _joint_scan(
    q,
    k,  # rows of [tokens, H // G, SIZE]
    v,
    do,  # rows of [tokens, H, SIZE]
    before,  # [chunks, H, SIZE, SIZE] by rows: X
    before_ups,  # [chunks, H]: its factors, if it is fp16
    gates,  # see gates.cumulate
    local,
    incoming,
    passed,  # [M, H, SIZE, SIZE]: G before the scan: see InitialStates
    dq,  # [tokens, H, SIZE]
    dk,
    dv,
    dq_rows,  # rows of them
    dk_rows,
    dv_rows,
    reads,
    writes,  # [tokens, H]: see chunk_step
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
    rows, sources = make_rows(dtype, STAGES, SIZE, STAGES, SIZE), Rows(q, k, v, do)
    x_rows = gl.allocate_shared_memory(dtype, [1, SIZE, SIZE], SHARED)
    copy = gl.allocate_shared_memory(dtype, [1, SIZE, SIZE], SHARED)
    outs = gl.allocate_shared_memory(dtype, [2, C, SIZE], SHARED)
    gates_copies = gl.allocate_shared_memory(gl.float32, [3, C], GATES_SHARED)
    copy_up = gl.allocate_shared_memory(gl.float32, [1], GATES_SHARED)
    rings = _Rings(make_ring(STAGES, 3), make_ring(1, 2), make_ring(1, 2))
    states = _States(x_rows, copy, copy_up)
    inputs = _Inputs(gates, Initial(local, incoming, passed, owner), before_ups)
    queries = _Queries(dq, dq_rows, dk, dk_rows, reads)
    gs_v, gs_x, gs_k = gates_copies.index(0), gates_copies.index(1), gates_copies.index(2)
    here = Tile(begin, count, chunk, h, H)
    gl.warp_specialize(
        [
            (_values, (rows, states, rings, gs_v, outs.index(0), gates, dv, dv_rows, writes, here, scale, DECAY)),
            (_scan, (rows, states, rings, gs_x, inputs, products, here, scale, DECAY)),
            (_keys, (rows, states, rings, gs_k, outs, inputs, queries, here, scale, DECAY)),
            (_fetch, (sources, before, rows, states, rings, here, G)),
        ],
        [4, 4, 1],
        [192, 144, 24],
    )


def joint_scan(
    tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, do: Tensor, gates: Tensor, before: ChunkStates,
    d_final: InitialStates, first_chunk: Tensor, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv [B, T, H, SIZE], and what gates need: reads and writes [1, B, T, H], products [1, chunks, H, SIZE]."""
    batch, tokens, heads = v.shape[:3]
    dq, dk, dv = (v.new_empty(v.shape) for _ in range(3))
    reads, writes = (d_final.local.new_empty(1, batch, tokens, heads) for _ in range(2))
    products = reads.new_empty(1, before.states.shape[0], heads, SIZE.value)
    states = blocks_of(before.states, SIZE.value, [SIZE.value, SIZE.value])
    launch(
        _joint_scan, (tiles.count, heads),
        *(rows_of(x, SIZE.value) for x in (q, k, v, do)), states, before.ups, gates, *d_final,
        dq, dk, dv, *(rows_of(x, SIZE.value) for x in (dq, dk, dv)), reads, writes, products,
        tiles.owner, tiles.start, tiles.length, first_chunk, scale, heads, heads // q.shape[2],
        DECAY=Decay.of(gates).value, STAGES=2, num_warps=4, pdl=True,
    )  # fmt: skip
    return dq, dk, dv, reads, writes, products
