"""The summaries of tiles (see scalar.tile_states): each of two groups of warps finds 64 rows of a state.

They are of one head, or, if keys have no more, of two. Many chunks are fetched ahead, since there is little else to do
with them. Keys are scaled on their way to registers.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import cdiv, next_power_of_2
from lasp.kernels.triton.hopper.layouts import GATES_SHARED, C, mma_layout, shared_layout
from lasp.kernels.triton.hopper.products import add_product
from lasp.kernels.triton.hopper.ring import make_ring
from lasp.kernels.triton.hopper.scalar_shared import LINE, load_chunk_decays, load_gates
from lasp.kernels.triton.hopper.shared import REGISTERS, barrier, clear_tail, rows_of
from lasp.kernels.triton.hopper.tiles import Tile
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import LOG2_E, NONE
from lasp.kernels.triton.shared.reach import chunks_in_reach, part_in_reach

ROWS = gl.constexpr(64)  # of a state, in a group of warps
BUFFERS = 192 * 2**10  # bytes of the chunks that are fetched ahead


@gluon.jit
def _place(step, chunks, BACKWARD: gl.constexpr):
    """Which chunk comes at a step: the scan begins where nothing has decayed."""
    return step if BACKWARD else chunks - 1 - step


class _Shared(NamedTuple):
    """What is in shared memory: rows by stages of the ring, and for each group of warps the weights of two chunks."""

    k: gl.shared_memory_descriptor  # [.., C, ROWS]
    v: gl.shared_memory_descriptor  # [.., C, V]
    weights: gl.shared_memory_descriptor  # [4, C]


@gluon.jit
def _fetch(k, v, shared, ring, tile, row, G, K: gl.constexpr, BACKWARD: gl.constexpr):
    k_rows, v_rows, h = shared.k, shared.v, tile.h
    V: gl.constexpr = v_rows.shape[2]
    KEYS: gl.constexpr = k_rows.shape[0] // ring.stages
    HEADS: gl.constexpr = v_rows.shape[0] // ring.stages
    chunks = gl.cdiv(tile.length, C)
    for step in range(chunks):
        token = tile.begin.to(gl.int32) + _place(step, chunks, BACKWARD) * C
        filled, stage = ring.acquire(step), step % ring.stages
        mbarrier.expect(filled, 2 * C * (KEYS * ROWS + HEADS * V))
        for part in gl.static_range(KEYS):
            col = (h + part) // G * K if HEADS == 2 else h // G * K + row + part * ROWS
            tma.async_copy_global_to_shared(k, [token, col], filled, k_rows.index(KEYS * stage + part))
        for n in gl.static_range(HEADS):
            tma.async_copy_global_to_shared(v, [token, (h + n) * V], filled, v_rows.index(HEADS * stage + n))


@gluon.jit
def _first_gate(gates, begin, count, h, H, DECAY: gl.constexpr):
    """A power of two near the largest weight, of a tile's first token, as a logarithm: fp16 has no small numbers."""
    g, _ = load_gates(gates, begin, 0, count, h, H, DECAY)
    return gl.floor(gl.max(g, axis=0))


@gluon.jit
def _compute(
    shared, ring, gates, states, tile, row, scale,
    PART: gl.constexpr,  # the group of warps
    DECAY: gl.constexpr, BACKWARD: gl.constexpr, K: gl.constexpr,
):  # fmt: skip
    k_rows, v_rows, weights_copies = shared.k, shared.v, shared.weights
    begin, count, h, H = tile.begin, tile.length, tile.h, tile.H
    V: gl.constexpr = v_rows.shape[2]
    KEYS: gl.constexpr = k_rows.shape[0] // ring.stages
    HEADS: gl.constexpr = v_rows.shape[0] // ring.stages
    MMA: gl.constexpr = mma_layout(V)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    dtype: gl.constexpr = k_rows.dtype
    if HEADS == 2:
        h += PART
    else:
        row += PART * ROWS
    chunks = gl.cdiv(count, C)
    last = gl.maximum(chunks - 1, 0)
    state = gl.zeros([ROWS, V], gl.float32, MMA)
    log2_passed = 0.0  # log2 decay of the chunks scanned so far
    if DECAY != NONE:
        g, end = load_gates(gates, begin, _place(0, last + 1, BACKWARD), count, h, H, DECAY)
        if BACKWARD and dtype == gl.float16:
            room = _first_gate(gates, begin, count, h, H, DECAY)
            log2_passed -= room
            scale *= gl.exp2(room)
    for step in range(chunks):
        i = _place(step, chunks, BACKWARD)
        stage = step % ring.stages
        kc = k_rows.index(KEYS * stage + (PART if KEYS == 2 else 0))
        vc = v_rows.index(HEADS * stage + (PART if HEADS == 2 else 0))
        if DECAY != NONE:
            weights = weights_copies.index(2 * PART + step % 2)
            log2_passed += end  # used at once, so that the next one need not wait for this one's register
            weights.store(gl.exp2(log2_passed - (end - g if BACKWARD else g)))
            ahead = _place(gl.minimum(step + 1, last), chunks, BACKWARD)
            g, end = load_gates(gates, begin, ahead, count, h, H, DECAY)
        ring.wait(step)
        if count - i * C < C:  # if both groups read them, they write the same zeros
            clear_tail(kc, i, count)
            clear_tail(vc, i, count)
            fence_async_shared()
        keys = kc.permute((1, 0))
        barrier()
        ring.release(step + ring.stages - 1, pred=step > 0)  # of the step before
        if DECAY == NONE:
            state = add_product(state, keys, vc)  # S + Σ_t k_t v_tᵀ
        else:
            scaled = keys.load(LEFT) * weights.load(gl.SliceLayout(0, LEFT))[None, :]
            state = add_product(state, scaled.to(dtype), vc)  # S + Σ_t w_t k_t v_tᵀ
        state = warpgroup_mma_wait(0, deps=(state,))
    number = gl.program_id(0).to(gl.int64)
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    at = rows[:, None] * V + gl.arange(0, V, layout=gl.SliceLayout(0, MMA))[None, :]
    gl.store(states + (number * H + h) * K * V + at, state * scale)


@gluon.jit
def _tile_states(
    k,  # rows of 64 columns of [tokens, H // G, K]: k, or q backward
    v,  # rows of [tokens, H, V]: v, or do backward
    gates,  # see gates.cumulate
    states,  # [M, H, K, V] fp32
    transitions,  # [M, H] fp32: the tiles' log decays, written forward
    start, length, scale, H, G, K: gl.constexpr, V: gl.constexpr,
    KEYS: gl.constexpr,  # blocks of 64 columns of keys that a program needs
    HEADS: gl.constexpr,  # of a program
    CHUNKS: gl.constexpr,  # the most that a tile has
    DECAY: gl.constexpr, BACKWARD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    griddepcontrol_wait()
    h, row = gl.program_id(1) * HEADS, gl.program_id(2) * (2 * ROWS)
    begin = gl.load(start + gl.program_id(0))
    count = gl.load(length + gl.program_id(0)).to(gl.int32)
    dtype: gl.constexpr = k.dtype
    k_rows = gl.allocate_shared_memory(dtype, [KEYS * STAGES, C, ROWS], shared_layout(ROWS))
    v_rows = gl.allocate_shared_memory(dtype, [HEADS * STAGES, C, V], shared_layout(V))
    weights_copies = gl.allocate_shared_memory(gl.float32, [4, C], GATES_SHARED)
    ring = make_ring(STAGES)
    if DECAY != NONE:
        reach, n = 0, gl.arange(0, CHUNKS, layout=LINE)
        for head in gl.static_range(HEADS):
            decays = load_chunk_decays(gates, begin, count, n, h + head, H, DECAY, not BACKWARD)
            reach = gl.maximum(reach, chunks_in_reach(n, decays, 0.0))
            if not BACKWARD:
                at = gl.program_id(0).to(gl.int64) * H + h + head
                gl.store(transitions + at, gl.sum(decays, axis=0) / LOG2_E, mask=row == 0)
        begin, count = part_in_reach(begin, count, reach, C, BACKWARD)
    shared, tile = _Shared(k_rows, v_rows, weights_copies), Tile(begin, count, None, h, H)
    gl.warp_specialize(
        [
            (_compute, (shared, ring, gates, states, tile, row, scale, 0, DECAY, BACKWARD, K)),
            (_compute, (shared, ring, gates, states, tile, row, scale, 1, DECAY, BACKWARD, K)),
            (_fetch, (k, v, shared, ring, tile, row, G, K, BACKWARD)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def tile_states(
    tiles: Tiles, k: Tensor, v: Tensor, gates: Tensor | None, *, backward: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    """S [M, H, K, V] of every tile and log A [M, H], or, backward, D alone: see scalar.tile_states."""
    (heads, size_v), (q_heads, size_k) = v.shape[2:], k.shape[2:]
    states = v.new_empty(tiles.count, heads, size_k, size_v, dtype=torch.float32)
    transitions = None if gates is None or backward else states.new_empty(tiles.count, heads)
    at_once = 2 if size_k == ROWS.value else 1
    keys = 1 if at_once == 2 and heads // q_heads % 2 == 0 else 2
    launch(
        _tile_states, (tiles.count, heads // at_once, max(1, size_k // (2 * ROWS.value))),
        rows_of(k, ROWS.value), rows_of(v, size_v), gates, states, transitions,
        tiles.start, tiles.length, scale, heads, heads // q_heads,
        K=size_k, V=size_v, KEYS=keys, HEADS=at_once, CHUNKS=next_power_of_2(cdiv(tiles.size, C.value)),
        DECAY=Decay.of(gates).value, BACKWARD=backward,
        STAGES=min(8, BUFFERS // (2 * C.value * (keys * ROWS.value + at_once * size_v))), num_warps=4, pdl=True,
    )  # fmt: skip
    return states, transitions
