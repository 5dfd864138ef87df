"""What the scans of the delta rule hold of a head, and its layouts.

A program holds a state, transposed, [V, K]: all of K and 64 or 128 of a head's columns of V, a `part` of them; a head
of more is as many parts, which differ in v alone. Four warps hold 64 rows of it, and if K is 256, half of each row. Of
what has a row for every token of a chunk, each such group of warps has its share of the columns. All run the same code.
(With code of its own for each group, as in `up`, a scan that gives all gradients took 1.3 times as long: together the
two did not fit where instructions are kept.)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lasp.kernels.triton.hopper.diagonal_shared import exp
from lasp.kernels.triton.hopper.layouts import C


@gluon.constexpr_function
def state_layout(V, columns, warps):
    """Of a product with a row for each of V columns of a head: a state [V, K], or [V, C]."""
    groups = warps * 16 // V  # that share a row
    return gl.NVMMADistributedLayout([3, 0], [V // 16, groups], [16, columns // groups, 16])


@gluon.constexpr_function
def left_of(layout):
    """A product's first operand, in registers."""
    return gl.DotOperandLayout(0, layout, 2)


@gluon.jit
def chunk_numbers():
    """So many as shared.reach looks at at a time."""
    return gl.arange(0, C, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))


@gluon.jit
def channel_decays(line, K: gl.constexpr, STATE: gl.constexpr):
    """A chunk's whole decay, if DIAGONAL, of a state's columns, [1, K]."""
    return exp(line.slice(2 * C, K).load(gl.SliceLayout(0, STATE)))[None, :]


@gluon.jit
def state_places(place, STATE: gl.constexpr, K: gl.constexpr, V: gl.constexpr, WIDTH: gl.constexpr):
    """Those of a part of a tile's state, [K, WIDTH] in memory and [V, K] here, and which there are."""
    v = place.part * V + gl.arange(0, V, layout=gl.SliceLayout(1, STATE))
    k = gl.arange(0, K, layout=gl.SliceLayout(0, STATE))
    at = (gl.program_id(0).to(gl.int64) * place.H + place.h) * K * WIDTH
    return at + k[None, :] * WIDTH + v[:, None], (v < WIDTH)[:, None]
