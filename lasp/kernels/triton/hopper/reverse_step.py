"""What a chunk of both reverse scans has in common."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lasp.kernels.triton.hopper.layouts import C


@gluon.jit
def head_room(gs, LAYOUT: gl.constexpr, dtype: gl.constexpr):
    """A power of two near the largest weight with which a chunk is written into a state, that of its first token, as a
    logarithm, [1]: taken out of the weights, since fp16 has no small numbers."""
    if dtype == gl.float16:
        return gl.floor(gs.slice(0, 1).load(LAYOUT))
    else:
        return gl.zeros([1], gl.float32, LAYOUT)


@gluon.jit
def written(queries, gs, LEFT: gl.constexpr):
    """w_j q_j, a product's first operand, from [C, K]."""
    PLACE: gl.constexpr = gl.SliceLayout(0, LEFT)
    weights = gl.exp2(gs.load(PLACE) - head_room(gs, PLACE, queries.dtype))
    return (queries.permute((1, 0)).load(LEFT) * weights[None, :]).to(queries.dtype)


@gluon.jit
def pairs_of(scores, others):
    """E_ij of every pair of a key j and a query i (see chunk_step), [C, C], keys by rows, from both of its scores."""
    row = gl.arange(0, C, layout=gl.SliceLayout(1, scores.type.layout))
    col = gl.arange(0, C, layout=gl.SliceLayout(0, scores.type.layout))
    return gl.where(row[:, None] == col[None, :], 0.0, scores * others)


@gluon.jit
def sum_of_pairs(pairs):
    """Σ_{i>j} E_ij - Σ_{i<j} E_ji of every token j, [C]."""
    ROW: gl.constexpr = gl.SliceLayout(1, pairs.type.layout)
    return gl.sum(pairs, axis=1) - gl.convert_layout(gl.sum(pairs, axis=0), ROW)
