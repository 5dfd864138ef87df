"""Linear attention with a vector gate, outputs and gradients of values for Hopper and heads of 128: diagonal.outputs.

As in chunk_scan two groups of warps have half of a head's columns each. q̃ and k̃ have the gates in them; of a state only
rows decay, from chunk to chunk.
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.diagonal.rescale import Rescaled
from lasp.kernels.triton.hopper.layouts import HALF, LEFT, MMA, SHARED, SIZE, C
from lasp.kernels.triton.hopper.products import add_product, product
from lasp.kernels.triton.hopper.ring import make_ring
from lasp.kernels.triton.hopper.shared import REGISTERS, barrier, blocks_of, clear_tail, publish, rows_of, send_rows
from lasp.kernels.triton.hopper.tiles import Initial, Tile
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.state_passing import InitialStates

ROW, COL = gl.constexpr(gl.SliceLayout(1, MMA.value)), gl.constexpr(gl.SliceLayout(0, MMA.value))


@gluon.jit
def _place(step, chunks, REVERSE: gl.constexpr):
    return chunks - 1 - step if REVERSE else step


class _Rows(NamedTuple):
    """Of chunks: how they come, or where in shared memory they lie, by stages of the ring, c's by halves."""

    a: gl.shared_memory_descriptor
    b: gl.shared_memory_descriptor
    c: gl.shared_memory_descriptor


class _Inputs(NamedTuple):
    """What a scan reads beside chunks' rows."""

    ln_ends: gl.tensor
    ln_chunk_decay: gl.tensor
    initial: Initial


class _Outputs(NamedTuple):
    """What it writes, and copies of it in shared memory, for each group of warps."""

    y: gl.tensor
    y_rows: gl.tensor
    states: gl.tensor
    copies_of_y: gl.shared_memory_descriptor
    copies_of_states: gl.shared_memory_descriptor


@gluon.jit
def _fetch(sources, rows, ring, tile, REVERSE: gl.constexpr):
    h = tile.h
    chunks = gl.cdiv(tile.length, C)
    for step in range(chunks):
        token = tile.begin.to(gl.int32) + _place(step, chunks, REVERSE) * C
        filled, stage = ring.acquire(step), step % ring.stages
        mbarrier.expect(filled, 2 * C * 3 * SIZE)
        tma.async_copy_global_to_shared(sources.a, [token, h * SIZE], filled, rows.a.index(stage))
        tma.async_copy_global_to_shared(sources.b, [token, h * SIZE], filled, rows.b.index(stage))
        for part in gl.static_range(2):
            column = h * SIZE + part * HALF
            tma.async_copy_global_to_shared(sources.c, [token, column], filled, rows.c.index(2 * stage + part))


@gluon.jit
def _initial_state(initial, tile, h, H, column):
    """What enters the tile, [SIZE, HALF]: see state_passing.load_initial_state."""
    row, col = gl.arange(0, SIZE, layout=ROW), column + gl.arange(0, HALF, layout=COL)
    at, head = row[:, None] * SIZE + col[None, :], tile * H + h
    x = gl.load(initial.local + head * SIZE * SIZE + at)
    if initial.incoming is not None:
        came = gl.load(initial.incoming + (gl.load(initial.owner + tile).to(gl.int64) * H + h) * SIZE * SIZE + at)
        if initial.passed is not None:
            came *= gl.exp(gl.load(initial.passed + head * SIZE + row))[:, None]
        x += came
    return x


@gluon.jit
def _compute(
    rows, ring, inputs, outputs, tile, PART: gl.constexpr, REVERSE: gl.constexpr, MAX_LN_DECAY: gl.constexpr
):  # PART: the group of warps
    ln_ends, ln_chunk_decay = inputs.ln_ends, inputs.ln_chunk_decay
    begin, count, h, H, number = tile.begin, tile.length, tile.h, tile.H, gl.program_id(0).to(gl.int64)
    dtype: gl.constexpr = rows.c.dtype
    column = h * SIZE + PART * HALF
    y = outputs.y + begin * (H * SIZE) + column
    chunks = gl.cdiv(count, C)
    last = gl.maximum(chunks - 1, 0)
    slot = (begin // C + number) * H + h  # of the tile's first chunk
    row = gl.arange(0, SIZE, layout=ROW)
    token, other = gl.arange(0, C, layout=ROW), gl.arange(0, C, layout=COL)
    seen = token[:, None] <= other[None, :] if REVERSE else token[:, None] >= other[None, :]
    at = slot + _place(0, last + 1, REVERSE) * H
    end = gl.load(ln_ends + at * SIZE + row)
    half = gl.where(gl.load(ln_chunk_decay + at) > MAX_LN_DECAY, 0.0, 0.5)
    x = _initial_state(inputs.initial, number, h, H, PART * HALF) * gl.exp(half * end)[:, None]
    copy, out = outputs.copies_of_states.index(PART), outputs.copies_of_y.index(PART)
    copy.store(x.to(dtype))
    publish()
    for step in range(chunks):
        i, stage = _place(step, chunks, REVERSE), step % ring.stages
        ac, bc, cc = rows.a.index(stage), rows.b.index(stage), rows.c.index(2 * stage + PART)
        if REVERSE:
            tma.async_copy_shared_to_global(outputs.states, [((slot + i * H) * SIZE).to(gl.int32), PART * HALF], copy)
        at = slot + _place(gl.minimum(step + 1, last), chunks, REVERSE) * H
        next_end, next_decay = gl.load(ln_ends + at * SIZE + row), gl.load(ln_chunk_decay + at)
        ring.wait(step)
        if count - i * C < C:  # both groups write the same zeros
            clear_tail(ac, i, count)
            clear_tail(bc, i, count)
            clear_tail(cc, i, count)
            publish()
        scores = product(ac, bc.permute((1, 0)), MMA)  # a bᵀ
        yc = product(ac, copy, MMA)  # a X̃
        x *= gl.exp((1.0 - 2.0 * half) * end)[:, None]
        x = add_product(x, bc.permute((1, 0)), cc)  # e^{(1 - 2h) b_C} X̃ + bᵀ c
        scores = warpgroup_mma_wait(2, deps=(scores,))
        scores = gl.where(seen & (half > 0.0), scores, 0.0).to(dtype)  # see diagonal.secondary
        yc = add_product(yc, gl.convert_layout(scores, LEFT), cc)  # a X̃ + tril(a bᵀ) c, in reverse triu
        next_half = gl.where(next_decay > MAX_LN_DECAY, 0.0, 0.5)
        rows_decay = gl.exp(half * end + next_half * next_end)
        x, yc = warpgroup_mma_wait(0, deps=(x, yc))
        x *= rows_decay[:, None]
        end, half = next_end, next_half
        tma.store_wait(0)
        barrier()
        copy.store(x.to(dtype))
        out.store(yc.to(dtype))
        publish()
        ring.release(step)
        send_rows(y, outputs.y_rows, out, begin, i, count, column, H * SIZE)
    tma.store_wait(0)


@gluon.jit
def _diagonal_scan(
    a,  # rows of [tokens, H, K]: q̃, in reverse k̃
    b,  # rows of [tokens, H, K]: k̃, in reverse q̃
    c,  # rows of 64 columns of [tokens, H, V]: v, in reverse do
    ln_ends,  # [slots, H, K] fp32
    ln_chunk_decay,  # [slots, H] fp32
    local,  # [M, H, K, V] fp32: see InitialStates
    incoming,
    passed,
    y,  # [tokens, H, V]: o, in reverse dv; without what tokens of secondary chunks give each other
    y_rows,  # rows of 64 columns of it
    states,  # G̃ of every chunk, one by one, 64 columns of [slots, H, K, V], written in reverse
    owner, start, length, H,
    REVERSE: gl.constexpr, MAX_LN_DECAY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    griddepcontrol_wait()
    tile, h = gl.program_id(0).to(gl.int64), gl.program_id(1)
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    dtype: gl.constexpr = c.dtype
    a_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    b_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    c_rows = gl.allocate_shared_memory(dtype, [2 * STAGES, C, HALF], SHARED)
    x_copies = gl.allocate_shared_memory(dtype, [2, SIZE, HALF], SHARED)
    y_copies = gl.allocate_shared_memory(dtype, [2, C, HALF], SHARED)
    ring = make_ring(STAGES)
    sources, rows = _Rows(a, b, c), _Rows(a_rows, b_rows, c_rows)
    inputs = _Inputs(ln_ends, ln_chunk_decay, Initial(local, incoming, passed, owner))
    outputs = _Outputs(y, y_rows, states, y_copies, x_copies)
    here = Tile(begin, count, None, h, H)
    gl.warp_specialize(
        [
            (_compute, (rows, ring, inputs, outputs, here, 0, REVERSE, MAX_LN_DECAY)),
            (_compute, (rows, ring, inputs, outputs, here, 1, REVERSE, MAX_LN_DECAY)),
            (_fetch, (sources, rows, ring, here, REVERSE)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def diagonal_scan(
    tiles: Tiles, x: Rescaled, rows: tuple[Tensor, Tensor, Tensor], initial: InitialStates, y: Tensor,
    states: Tensor | None, max_ln_decay: float,
) -> None:  # fmt: skip
    """See diagonal.outputs.scan_outputs."""
    a, b, c = rows
    heads, size, half = c.shape[2], SIZE.value, HALF.value
    written = None if states is None else blocks_of(states, size, [size, half])
    launch(
        _diagonal_scan, (tiles.count, heads),
        rows_of(a, size), rows_of(b, size), rows_of(c, half), x.ln_ends, x.ln_chunk_decay, *initial,
        y, rows_of(y, half), written, tiles.owner, tiles.start, tiles.length, heads,
        REVERSE=states is not None, MAX_LN_DECAY=max_ln_decay, STAGES=3, num_warps=4, pdl=True,
    )  # fmt: skip
