"""The summaries of tiles (see states): each of two groups of warps finds half of a state's rows.

Many chunks are fetched ahead, since there is little else to do with them. Keys are scaled on their way to registers.
"""

import torch
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
from lasp.kernels.triton.hopper.ring import make_ring
from lasp.kernels.triton.hopper.shared import (
    GATES_SHARED,
    HALF,
    LINES,
    REGISTERS,
    SHARED,
    SIZE,
    WIDE_LEFT,
    WIDE_MMA,
    WIDE_ROWS,
    C,
    barrier,
    clear_tail,
    half_rows,
    load_gates,
    rows_of,
)
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import LOG2_E, NONE


@gluon.jit
def _place(step, chunks, BACKWARD: gl.constexpr):
    """Which chunk comes at a step: the scan begins where nothing has decayed."""
    return step if BACKWARD else chunks - 1 - step


@gluon.jit
def _fetch(k, v, k_rows, v_rows, ring, begin, count, h, G, BACKWARD: gl.constexpr):
    chunks = gl.cdiv(count, C)
    for step in range(chunks):
        row = begin.to(gl.int32) + _place(step, chunks, BACKWARD) * C
        filled, stage = ring.acquire(step), step % ring.stages
        mbarrier.expect(filled, 2 * C * SIZE * 2)
        tma.async_copy_global_to_shared(k, [row, h // G * SIZE], filled, k_rows.index(stage))
        tma.async_copy_global_to_shared(v, [row, h * SIZE], filled, v_rows.index(stage))


@gluon.jit
def _compute(
    shared,
    gates,
    states,
    transitions,
    numbers,
    PART: gl.constexpr,  # the group of warps
    DECAY: gl.constexpr,
    BACKWARD: gl.constexpr,
):
    k_rows, v_rows, weights_copies, ring = shared
    begin, count, h, scale, H = numbers
    dtype: gl.constexpr = k_rows.dtype
    chunks = gl.cdiv(count, C)
    last = gl.maximum(chunks - 1, 0)
    state = gl.zeros([HALF, SIZE], gl.float32, WIDE_MMA)
    passed = 0.0  # log2 decay of the chunks walked so far
    if DECAY != NONE:
        g, end = load_gates(gates, begin, _place(0, last + 1, BACKWARD), count, h, H, DECAY)
    for step in range(chunks):
        i = _place(step, chunks, BACKWARD)
        stage = step % ring.stages
        kc, vc = k_rows.index(stage), v_rows.index(stage)
        if DECAY != NONE:
            weights = weights_copies.index(2 * PART + step % 2)
            passed += end  # used at once, so that the next one need not wait for this one's register
            weights.store(gl.exp2(passed - (end - g if BACKWARD else g)))
            ahead = _place(gl.minimum(step + 1, last), chunks, BACKWARD)
            g, end = load_gates(gates, begin, ahead, count, h, H, DECAY)
        ring.wait(step)
        if count - i * C < C:  # both groups write the same zeros
            clear_tail(kc, i, count, WIDE_ROWS)
            clear_tail(vc, i, count, WIDE_ROWS)
            fence_async_shared()
        keys = kc.slice(PART * HALF, HALF, dim=1).permute((1, 0))
        barrier()
        ring.release(step + ring.stages - 1, pred=step > 0)  # of the step before
        if DECAY == NONE:
            state = warpgroup_mma(keys, vc, state, is_async=True)
        else:
            scaled = keys.load(WIDE_LEFT) * weights.load(gl.SliceLayout(0, WIDE_LEFT))[None, :]
            state = warpgroup_mma(scaled.to(dtype), vc, state, is_async=True)
        state = warpgroup_mma_wait(0, deps=(state,))
    tile = gl.program_id(0).to(gl.int64)
    at = (tile * H + h) * SIZE * SIZE + half_rows(PART)
    gl.store(states + at, gl.convert_layout(state * scale, LINES))
    if DECAY != NONE and not BACKWARD and PART == 0:
        gl.store(transitions + tile * H + h, passed / LOG2_E)


@gluon.jit
def _tile_states(
    k,  # rows of [tokens, H // G, SIZE]: k, or q backward
    v,  # rows of [tokens, H, SIZE]: v, or do backward
    gates,  # see gates.cumulate
    states,  # [M, H, SIZE, SIZE] fp32
    transitions,  # [M, H] fp32: the tiles' log decays, written forward
    start,
    length,
    scale,
    H,
    G,
    DECAY: gl.constexpr,
    BACKWARD: gl.constexpr,
    STAGES: gl.constexpr,
):
    griddepcontrol_wait()
    h = gl.program_id(1)
    begin = gl.load(start + gl.program_id(0))
    count = gl.load(length + gl.program_id(0)).to(gl.int32)
    dtype: gl.constexpr = k.dtype
    k_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    v_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    weights_copies = gl.allocate_shared_memory(gl.float32, [4, C], GATES_SHARED)
    ring = make_ring(STAGES)
    shared = (k_rows, v_rows, weights_copies, ring)
    numbers = (begin, count, h, scale, H)
    gl.warp_specialize(
        [
            (_compute, (shared, gates, states, transitions, numbers, 0, DECAY, BACKWARD)),
            (_compute, (shared, gates, states, transitions, numbers, 1, DECAY, BACKWARD)),
            (_fetch, (k, v, k_rows, v_rows, ring, begin, count, h, G, BACKWARD)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def tile_states(
    tiles: Tiles, k: Tensor, v: Tensor, gates: Tensor | None, *, backward: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    """S [M, H, SIZE, SIZE] of every tile and log A [M, H], or, backward, D alone: see states.tile_states."""
    heads = v.shape[2]
    states = v.new_empty(tiles.count, heads, SIZE.value, SIZE.value, dtype=torch.float32)
    transitions = None if gates is None or backward else states.new_empty(tiles.count, heads)
    launch(
        _tile_states, (tiles.count, heads),
        rows_of(k, SIZE.value), rows_of(v, SIZE.value), gates, states, transitions,
        tiles.start, tiles.length, scale, heads, heads // k.shape[2],
        DECAY=Decay.of(gates).value, BACKWARD=backward, STAGES=6, num_warps=4, pdl=True,
    )  # fmt: skip
    return states, transitions
