"""One chunk of a scan (see chunk_scan), by one group of warps and for one head: what it reads of the state, its scores,
and what it writes into the state.

For the gradient of gates (SUMS) the same is summed as in scalar.chunk_scan. Copies of a state are then two, the second
of what the first one's rounding leaves. In fp16, which has no room for a state, they are scaled so that the largest
number fits.
"""

from enum import IntEnum

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from lasp.kernels.triton.hopper.layouts import mma_layout
from lasp.kernels.triton.hopper.shared import C, whole_decay
from lasp.kernels.triton.shared.decay import NONE


class Work(IntEnum):
    SPLIT, APART, SUMMED = range(3)


SPLIT, APART, SUMMED = (gl.constexpr(int(work)) for work in Work)
LARGE = gl.constexpr(16384.0)  # the largest number of a copy in fp16


@gluon.jit
def write_copies(x, copies, at, SUMS: gl.constexpr):
    """Writes X, from copy `at` on, for products to read. Returns what undoes the scale."""
    up = 1.0
    if copies.dtype == gl.float16:
        most = gl.maximum(gl.max(gl.max(gl.abs(x), axis=1), axis=0), 1e-30)
        up = most / LARGE
        x *= LARGE / most
    high = x.to(copies.dtype)
    copies.index(at).store(high)
    if SUMS:
        copies.index(at + 1).store((x - high.to(gl.float32)).to(copies.dtype))
    return up


@gluon.jit
def head_room(gs, LAYOUT: gl.constexpr, dtype: gl.constexpr):
    """A power of two near the largest weight with which a chunk is written into a state in reverse, that of its first
    token, as a logarithm, [1]: taken out of the weights, since fp16 has no small numbers."""
    if dtype == gl.float16:
        return gl.floor(gs.slice(0, 1).load(LAYOUT))
    else:
        return gl.zeros([1], gl.float32, LAYOUT)


@gluon.jit
def _written(bc, gs, W: gl.constexpr, REVERSE: gl.constexpr):
    """w_j b_j, a product's first operand."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, mma_layout(W), 2)
    PLACE: gl.constexpr = gl.SliceLayout(0, LEFT)
    if REVERSE:
        log2_weight = gs.load(PLACE) - head_room(gs, PLACE, bc.dtype)
    else:
        log2_weight = whole_decay(gs, PLACE) - gs.load(PLACE)
    return (bc.permute((1, 0)).load(LEFT) * gl.exp2(log2_weight)[None, :]).to(bc.dtype)


@gluon.jit
def _finish_read(yc, pc, gs, up, before, DECAY: gl.constexpr, REVERSE: gl.constexpr, SUMS: gl.constexpr):
    """w_i a_iᵀ X from a_iᵀ X as its copies have it, and its sums with the partner, [C]."""
    dtype: gl.constexpr = pc.dtype
    ROW: gl.constexpr = gl.SliceLayout(1, mma_layout(pc.shape[1]))
    sums = gl.zeros([C], gl.float32, gl.SliceLayout(1, mma_layout(C)))
    if dtype == gl.float16:
        yc *= up
    if DECAY != NONE:
        if REVERSE:
            read, room = whole_decay(gs, ROW) - gs.load(ROW), gl.zeros([1], gl.float32, ROW)
            if dtype == gl.float16:
                yc *= gl.exp2(before)[:, None]
        else:
            read, room = gs.load(ROW), head_room(gs, ROW, dtype)
        if SUMS:  # the partner as rounded as where another scan writes it into its state
            rounded = (pc.load(ROW.parent) * gl.exp2(read - room)[:, None]).to(dtype).to(gl.float32)
            sums = gl.convert_layout(gl.sum(rounded * yc, axis=1) * gl.exp2(room), gl.SliceLayout(1, mma_layout(C)))
        yc *= gl.exp2(read)[:, None]
    return yc, sums


@gluon.jit
def open_chunk(
    ac, bc, cc, pc, copies, at, gs, x, yc, up, before,
    WORK: gl.constexpr, DECAY: gl.constexpr, REVERSE: gl.constexpr, TRANSPOSED: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Weighted scores [C, C], w_i a_iᵀ X [C, W], added to yc if heads are summed, the next X, on its way, and the sums
    over parts, [C]."""
    W: gl.constexpr = cc.shape[1]
    SCORES: gl.constexpr = mma_layout(C)
    PAIRS: gl.constexpr = SUMS and TRANSPOSED  # of a query and a key, with both of their scores
    ALONE: gl.constexpr = SUMS and WORK == SUMMED  # one after the other, or registers would not suffice
    row, col = gl.arange(0, C, layout=gl.SliceLayout(1, SCORES)), gl.arange(0, C, layout=gl.SliceLayout(0, SCORES))
    seen = row[:, None] <= col[None, :] if REVERSE else row[:, None] >= col[None, :]
    if DECAY != NONE:
        end = whole_decay(gs, gl.SliceLayout(1, mma_layout(W)))
        if REVERSE and cc.dtype == gl.float16:
            end = end - head_room(gs, gl.SliceLayout(1, mma_layout(W)), cc.dtype) + before
        x *= gl.exp2(end)[:, None]
    nothing = gl.zeros([C, C], gl.float32, SCORES)
    if ALONE:
        read = _read(ac, copies, at, SUMS)
        read, sums = _finish_read(warpgroup_mma_wait(0, deps=(read,)), pc, gs, up, before, DECAY, REVERSE, SUMS)
        yc += read
    scores = warpgroup_mma(ac, bc.permute((1, 0)), nothing, use_acc=False, is_async=True)
    others = nothing
    if PAIRS:
        others = warpgroup_mma(pc, cc.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if not ALONE:
        read = _read(ac, copies, at, SUMS)
    if DECAY == NONE:
        x = warpgroup_mma(bc.permute((1, 0)), cc, x, is_async=True)
        scores = warpgroup_mma_wait(2, deps=(scores,))
        scores = gl.where(seen, scores, 0.0)
    else:
        if not PAIRS:
            x = warpgroup_mma(_written(bc, gs, W, REVERSE), cc, x, is_async=True)
        g_row, g_col = gs.load(gl.SliceLayout(1, SCORES)), gs.load(gl.SliceLayout(0, SCORES))
        gap = g_col[None, :] - g_row[:, None] if REVERSE else g_row[:, None] - g_col[None, :]
        weights = gl.exp2(gl.where(seen, gap, float("-inf")))
        if PAIRS:
            scores, others = warpgroup_mma_wait(0 if ALONE else 2, deps=(scores, others))
            scores *= weights
            pairs = gl.where(row[:, None] == col[None, :], 0.0, scores * others)
            near = gl.sum(pairs, axis=1) - gl.convert_layout(gl.sum(pairs, axis=0), gl.SliceLayout(1, SCORES))
            x = warpgroup_mma(_written(bc, gs, W, REVERSE), cc, x, is_async=True)  # no sooner, to save registers
        else:
            scores = warpgroup_mma_wait(3 if SUMS else 2, deps=(scores,)) * weights
    if not ALONE:
        read, sums = _finish_read(warpgroup_mma_wait(1, deps=(read,)), pc, gs, up, before, DECAY, REVERSE, SUMS)
        yc = yc + read if WORK == SUMMED else read
    if PAIRS:
        sums += near
    return scores, yc, x, sums


@gluon.jit
def _read(ac, copies, at, SUMS: gl.constexpr):
    """a_iᵀ X, on its way."""
    W: gl.constexpr = copies.shape[2]
    nothing = gl.zeros([C, W], gl.float32, mma_layout(W))
    read = warpgroup_mma(ac, copies.index(at), nothing, use_acc=False, is_async=True)
    if SUMS:
        read = warpgroup_mma(ac, copies.index(at + 1), read, is_async=True)
    return read
