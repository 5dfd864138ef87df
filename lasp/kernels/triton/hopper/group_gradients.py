"""The gradients of a chunk, for all heads of a group, which share q and k: see chunk_step, and scalar.chunk_states for
the states X before chunks and their gradients G behind them.

    dv_j = w_j Gᵀk_j + scale · Σ_{i>=j} w_ij (q_i·k_j) do_i
    dk_j = Σ_heads w_j G v_j  + scale · Σ_{i>=j} (Σ_heads w_ij (do_i·v_j)) q_i
    dq_i = Σ_heads scale · w_i X do_i + scale · Σ_{j<=i} (Σ_heads w_ij (do_i·v_j)) k_j

One group of warps finds dv, and hands the sums over heads to the other, which finds dq and dk. Addresses of parts of
buffers are found anew for every head: see joint_scan.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from lasp.kernels.decay import Decay
from lasp.kernels.inputs import LinearInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import cdiv
from lasp.kernels.triton.hopper.layouts import GATES_SHARED, HALF, C, mma_layout, rows_layout, shared_layout
from lasp.kernels.triton.hopper.products import add_product, product
from lasp.kernels.triton.hopper.reverse_step import pairs_of, sum_of_pairs
from lasp.kernels.triton.hopper.ring import Ring, make_meeting, make_ring
from lasp.kernels.triton.hopper.scalar_shared import load_gates
from lasp.kernels.triton.hopper.shared import (
    REGISTERS,
    barrier,
    blocks_of,
    clear_tail,
    publish,
    rows_of,
    send_rows,
    whole_decay,
)
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.scalar.chunk_states import states_and_gradients
from lasp.kernels.triton.shared.state_passing import InitialStates
from lasp.kernels.triton.shared.tiles import CHUNK

FEWEST = 4  # heads of a group
PARTS = 4  # of the tiles, whose chunks' states are there at once
SCORES_SHARED = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))  # without bank conflicts


class _Rows(NamedTuple):
    """Of a chunk, how they come or where in shared memory they lie: q and k of the group, of its heads the rest, by
    stages of a ring; of states [K, V]."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    do: gl.shared_memory_descriptor
    before: gl.shared_memory_descriptor
    behind: gl.shared_memory_descriptor


class _Rings(NamedTuple):
    heads: Ring
    group: Ring  # when q and k are there
    total: Ring  # and the scores of values of all heads


class _Chunk(NamedTuple):
    """`length` tokens from `begin` on, a chunk of this number, of which some tiles' states are in this slot; `heads` of
    the G heads of a group, of H in all."""

    begin: gl.tensor
    length: gl.tensor
    number: gl.tensor
    slot: gl.tensor
    group: gl.tensor
    heads: gl.tensor
    H: gl.tensor
    G: gl.tensor


class _Staged(NamedTuple):
    """In shared memory: gates, dv, scores of keys, and the sums of those of values."""

    gates: gl.shared_memory_descriptor  # [2, C]
    dv: gl.shared_memory_descriptor  # [C, V]
    scores: gl.shared_memory_descriptor  # [1, C, C]
    total: gl.shared_memory_descriptor  # [C, C]


class _Outputs(NamedTuple):
    dq: gl.tensor
    dk: gl.tensor
    dv: gl.tensor
    dv_rows: gl.tensor
    reads: gl.tensor
    writes: gl.tensor
    products: gl.tensor


@gluon.jit
def _fetch(sources, rows, rings, chunk):
    ring, group, G = rings.heads, chunk.group, chunk.G
    K: gl.constexpr = rows.q.shape[2]
    V: gl.constexpr = rows.v.shape[2]
    token, filled = chunk.begin.to(gl.int32), rings.group.full.index(0)
    mbarrier.expect(filled, 4 * C * K)
    tma.async_copy_global_to_shared(sources.k, [token, group * K], filled, rows.k.index(0))
    tma.async_copy_global_to_shared(sources.q, [token, group * K], filled, rows.q.index(0))
    for n in range(chunk.heads):
        h = group * G + n
        filled, stage = ring.acquire(n), n % ring.stages
        mbarrier.expect(filled, 4 * C * V + 4 * K * V)
        state = ((chunk.slot * chunk.H + h) * K).to(gl.int32)
        tma.async_copy_global_to_shared(sources.v, [token, h * V], filled, rows.v.index(stage))
        tma.async_copy_global_to_shared(sources.do, [token, h * V], filled, rows.do.index(stage))
        tma.async_copy_global_to_shared(sources.behind, [state, 0], filled, rows.behind.index(stage))
        tma.async_copy_global_to_shared(sources.before, [state, 0], filled, rows.before.index(stage))


@gluon.jit
def _take_group(rows, ring, count):
    """Waits for q and k; both groups of warps write the same zeros."""
    ring.wait(0)
    if count < C:
        clear_tail(rows.q.index(0), 0, count)
        clear_tail(rows.k.index(0), 0, count)
        fence_async_shared()


@gluon.jit
def _take_head(vc, doc, ring, n, count):
    """Waits for a head's v and do, likewise."""
    ring.wait(n)
    if count < C:
        clear_tail(vc, 0, count)
        clear_tail(doc, 0, count)
        publish()


@gluon.jit
def _store(y, x, begin, count, stride):
    ROW: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    place = gl.arange(0, C, layout=ROW)
    col = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))
    at = y + ((begin + place) * stride)[:, None] + col[None, :]
    gl.store(at, x.to(y.dtype.element_ty), mask=(place < count)[:, None])


@gluon.jit
def _values(rows, rings, staged, gates, outputs, chunk, scale, DECAY: gl.constexpr):
    """dv, the sums of pairs, and the heads' scores of values, summed."""
    ring, gs, out, scores_copy = rings.heads, staged.gates.index(0), staged.dv, staged.scores
    begin, count, group, H, G, heads = chunk.begin, chunk.length, chunk.group, chunk.H, chunk.G, chunk.heads
    K: gl.constexpr = rows.q.shape[2]
    V: gl.constexpr = rows.v.shape[2]
    SCORES: gl.constexpr = mma_layout(C)
    MMA: gl.constexpr = mma_layout(V)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    ROWS: gl.constexpr = rows_layout(V)
    dtype: gl.constexpr = rows.q.dtype
    row, col = gl.arange(0, C, layout=ROW), gl.arange(0, C, layout=gl.SliceLayout(0, SCORES))
    seen = row[:, None] <= col[None, :]
    place, none = row, gl.maximum(-count, 0)
    channel = gl.arange(0, K, layout=gl.SliceLayout(1, ROWS))
    g, _ = load_gates(gates, begin, 0, count, group * G, H, DECAY)
    gs.store(g)
    _take_group(rows, rings.group, count)
    barrier()
    scores = product(rows.k.index(0), rows.q.index(0).permute((1, 0)), SCORES)
    # There is no room for them in registers.
    scores_copy.index(0).store(warpgroup_mma_wait(0, deps=(scores,)) * scale)
    total = gl.zeros([C, C], gl.float32, SCORES)
    for n in range(heads):
        h, stage = group * G + n, n % ring.stages
        vc, doc, gc = rows.v.index(stage), rows.do.index(stage), rows.behind.index(stage)
        g, _ = load_gates(gates, begin, 0, count, gl.minimum(h + 1, H - 1), H, DECAY)
        _take_head(vc, doc, ring, n, count)
        others = product(vc, doc.permute((1, 0)), SCORES)
        dvc = product(rows.k.index(gl.minimum(n, none)), gc, MMA)
        g_row = gs.load(ROW)
        gap = gs.load(gl.SliceLayout(0, SCORES))[None, :] - g_row[:, None]
        weights = gl.exp2(gl.where(seen, gap, float("-inf")))
        scores_here = scores_copy.index(gl.minimum(n, none)).load(SCORES)
        left = gl.convert_layout((scores_here * weights).to(dtype), LEFT)
        others = warpgroup_mma_wait(1, deps=(others,)) * weights
        total += others
        sums = sum_of_pairs(pairs_of(scores_here, others))
        write = gl.exp2(whole_decay(gs, gl.SliceLayout(1, MMA)) - gs.load(gl.SliceLayout(1, MMA)))
        dvc = warpgroup_mma_wait(0, deps=(dvc,)) * write[:, None]
        values = gl.convert_layout(vc.load(LEFT), MMA).to(gl.float32)
        sums += gl.convert_layout(gl.sum(values * dvc, axis=1), ROW)
        gl.store(outputs.writes + (begin + place) * H + h, sums, mask=place < count)
        dvc = add_product(dvc, left, doc)
        passed = gl.sum(rows.before.index(stage).load(ROWS).to(gl.float32) * gc.load(ROWS).to(gl.float32), axis=1)
        gl.store(outputs.products + (chunk.number * H + h) * K + channel, passed)
        gs.store(g)
        dvc = warpgroup_mma_wait(0, deps=(dvc,))
        tma.store_wait(0)
        barrier()
        ring.release(n)
        out.store(dvc.to(dtype))
        publish()
        send_rows(outputs.dv + (begin * H + h) * V, outputs.dv_rows, out, begin, 0, count, h * V, H * V)
    staged.total.store((total * scale).to(dtype))
    publish()
    rings.total.fill(0)
    tma.store_wait(0)


@gluon.jit
def _keys(rows, rings, staged, gates, outputs, chunk, scale, DECAY: gl.constexpr):
    """dq and dk."""
    ring, gs, total_rows = rings.heads, staged.gates.index(1), staged.total
    begin, count, group, H, G, heads = chunk.begin, chunk.length, chunk.group, chunk.H, chunk.G, chunk.heads
    K: gl.constexpr = rows.q.shape[2]
    V: gl.constexpr = rows.v.shape[2]
    MMA: gl.constexpr = mma_layout(V)
    WIDE: gl.constexpr = mma_layout(K)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    TOKEN: gl.constexpr = gl.SliceLayout(1, LEFT)
    dtype: gl.constexpr = rows.q.dtype
    place, none = gl.arange(0, C, layout=ROW), gl.maximum(-count, 0)
    g, _ = load_gates(gates, begin, 0, count, group * G, H, DECAY)
    gs.store(g)
    _take_group(rows, rings.group, count)
    barrier()
    dqc = gl.zeros([C, K], gl.float32, WIDE)
    dkc = gl.zeros([C, K], gl.float32, WIDE)
    for n in range(heads):
        h, stage = group * G + n, n % ring.stages
        vc, doc, xc, gc = rows.v.index(stage), rows.do.index(stage), rows.before.index(stage), rows.behind.index(stage)
        g, _ = load_gates(gates, begin, 0, count, gl.minimum(h + 1, H - 1), H, DECAY)
        _take_head(vc, doc, ring, n, count)
        inner = product(rows.q.index(gl.minimum(n, none)), xc, MMA)
        d_outputs = doc.load(LEFT)
        read = gl.exp2(gs.load(TOKEN)) * scale
        dqc = add_product(dqc, (d_outputs * read[:, None]).to(dtype), xc.permute((1, 0)))
        write = gl.exp2(whole_decay(gs, TOKEN) - gs.load(TOKEN))
        values = (vc.load(LEFT) * write[:, None]).to(dtype)
        dkc = add_product(dkc, values, gc.permute((1, 0)))
        inner = warpgroup_mma_wait(2, deps=(inner,))
        sums = gl.sum(gl.convert_layout(d_outputs, MMA).to(gl.float32) * inner, axis=1)
        gl.store(outputs.reads + (begin + place) * H + h, sums * gl.exp2(gs.load(ROW)) * scale, mask=place < count)
        gs.store(g)
        dqc, dkc = warpgroup_mma_wait(0, deps=(dqc, dkc))
        barrier()
        ring.release(n)
    rings.total.wait(0)
    dqc = add_product(dqc, total_rows.permute((1, 0)), rows.k.index(0))
    dkc = add_product(dkc, total_rows, rows.q.index(0))
    dqc, dkc = warpgroup_mma_wait(0, deps=(dqc, dkc))
    _store(outputs.dq + group * K, dqc, begin, count, H // G * K)
    _store(outputs.dk + group * K, dkc, begin, count, H // G * K)


@gluon.jit
def _group_gradients(
    q,
    k,  # rows of [tokens, H // G, K]
    v,
    do,  # rows of [tokens, H, V]
    gates,  # see gates.cumulate
    before,  # [CHUNKS, H, K, V] by rows: X of the chunks of some tiles
    behind,  # G, likewise
    dq,
    dk,  # [tokens, H // G, K]
    dv,
    dv_rows,  # [tokens, H, V]
    reads,
    writes,  # [tokens, H]: see chunk_step
    products,  # [chunks, H, K]: those of X and G, by rows
    start,
    length,  # of chunks
    first_chunk,  # [M]
    tile_length,  # [M]
    first,  # of those tiles
    end,
    scale,
    TILES,
    CHUNKS,
    H,
    G,
    K: gl.constexpr,
    V: gl.constexpr,
    DECAY: gl.constexpr,
    STAGES: gl.constexpr,
):
    griddepcontrol_wait()
    slot, group = gl.program_id(0).to(gl.int64), gl.program_id(1)
    chunk = gl.load(first_chunk + first) + slot
    others = (end < TILES) & (gl.load(tile_length + gl.minimum(end, TILES - 1)) > 0)
    chunk_end = gl.load(first_chunk + gl.minimum(end, TILES - 1), mask=others, other=CHUNKS)
    there = (chunk < chunk_end) & (gl.load(tile_length + first) > 0)
    chunk = gl.minimum(chunk, CHUNKS - 1)
    begin, count = gl.load(start + chunk), gl.load(length + chunk).to(gl.int32)
    count = gl.where(there, count, 0)
    heads = gl.where(count > 0, G, 0)  # none if there is no chunk
    dtype: gl.constexpr = q.dtype
    q_rows = gl.allocate_shared_memory(dtype, [1, C, K], shared_layout(K))
    k_rows = gl.allocate_shared_memory(dtype, [1, C, K], shared_layout(K))
    v_rows = gl.allocate_shared_memory(dtype, [STAGES, C, V], shared_layout(V))
    do_rows = gl.allocate_shared_memory(dtype, [STAGES, C, V], shared_layout(V))
    x_rows = gl.allocate_shared_memory(dtype, [STAGES, K, V], shared_layout(V))
    g_rows = gl.allocate_shared_memory(dtype, [STAGES, K, V], shared_layout(V))
    out = gl.allocate_shared_memory(dtype, [C, V], shared_layout(V))
    scores_copy = gl.allocate_shared_memory(gl.float32, [1, C, C], SCORES_SHARED)
    total_rows = gl.allocate_shared_memory(dtype, [C, C], shared_layout(C))
    gates_copies = gl.allocate_shared_memory(gl.float32, [2, C], GATES_SHARED)
    ring = make_ring(STAGES)
    rings = _Rings(ring, make_meeting(1), make_meeting(1))
    rows, sources = _Rows(q_rows, k_rows, v_rows, do_rows, x_rows, g_rows), _Rows(q, k, v, do, before, behind)
    staged = _Staged(gates_copies, out, scores_copy, total_rows)
    outputs = _Outputs(dq, dk, dv, dv_rows, reads, writes, products)
    here = _Chunk(begin, count, chunk, slot, group, heads, H, G)
    gl.warp_specialize(
        [
            (_values, (rows, rings, staged, gates, outputs, here, scale, DECAY)),
            (_keys, (rows, rings, staged, gates, outputs, here, scale, DECAY)),
            (_fetch, (sources, rows, rings, here)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def serves_groups(k: Tensor, v: Tensor) -> bool:
    """In bf16: fp16 has no room for the sums over heads whose states have factors of their own."""
    return v.dtype == torch.bfloat16 and v.shape[3] == HALF.value and v.shape[2] // k.shape[2] >= FEWEST


def group_gradients(
    tiles: Tiles, chunks: Tiles, first_chunk: Tensor, x: LinearInputs, do: Tensor, gates: Tensor,
    initial: InitialStates, d_final: InitialStates,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk [B, T, H // G, K], dv [B, T, H, V], and what gates need: reads and writes [1, B, T, H], products
    [1, chunks, H, K]."""
    q, k, v, (heads, size_v), (q_heads, size_k) = x.q, x.k, x.v, x.v.shape[2:], x.k.shape[2:]
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    reads, writes = (initial.local.new_empty(1, *v.shape[:3]) for _ in range(2))
    products = reads.new_empty(1, chunks.count, heads, size_k)
    at_once = cdiv(tiles.count, PARTS)
    room = min(chunks.count, at_once * cdiv(tiles.size, CHUNK))
    for first in range(0, tiles.count, at_once):
        part = range(first, min(first + at_once, tiles.count))
        before, behind = states_and_gradients(tiles, room, first_chunk, x, do, gates, initial, d_final, part)
        states = [blocks_of(each.states, size_v, [size_k, size_v]) for each in (before, behind)]
        launch(
            _group_gradients, (room, q_heads),
            *(rows_of(t, size_k) for t in (q, k)), *(rows_of(t, size_v) for t in (v, do)), gates, *states,
            dq, dk, dv, rows_of(dv, size_v), reads, writes, products, chunks.start, chunks.length, first_chunk,
            tiles.length, part.start, part.stop, x.scale, tiles.count, chunks.count, heads, heads // q_heads,
            K=size_k, V=size_v, DECAY=Decay.of(gates).value, STAGES=3, num_warps=4, pdl=True,
        )  # fmt: skip
        del before, behind, states  # the next part's take their place
    return dq, dk, dv, reads, writes, products
