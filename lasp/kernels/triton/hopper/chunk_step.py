"""One chunk of a scan (see chunk_scan), by one group of warps and for one head: what it reads of the state, its scores,
and what it writes into the state.

For the gradient of gates (SUMS), with X the state before a chunk, G its gradient behind it, and E_ij = w_ij (q_i·k_j)
(do_i·v_j), i > j, within it, scans sum what gates.chunk_gate_grads reads:

    dq    r_i = q_i · w_i Xᵀ do_i, and <X, G>        dv    u_j = v_j · w_j Gᵀ k_j + Σ_{i>j} E_ij - Σ_{i<j} E_ji

joint_scan finds all of it; else dv's scan gives G to dq's as it has rounded it for its own products. Nothing that is
summed is the small difference of large numbers, so that none has to be rounded as another.

In fp16, which has no room for a state, its copies are scaled so that the largest number fits.
"""

from enum import IntEnum

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from lasp.kernels.triton.hopper.layouts import C, mma_layout
from lasp.kernels.triton.hopper.products import add_product, product
from lasp.kernels.triton.hopper.shared import whole_decay
from lasp.kernels.triton.shared.decay import NONE


class Work(IntEnum):
    SPLIT, APART, SUMMED = range(3)


SPLIT, APART, SUMMED = (gl.constexpr(int(work)) for work in Work)
LARGE = gl.constexpr(16384.0)  # the largest number of a copy in fp16


@gluon.jit
def write_copy(x, copy):
    """Writes X for products to read. Returns what undoes the scale."""
    up = 1.0
    if copy.dtype == gl.float16:
        most = gl.maximum(gl.max(gl.max(gl.abs(x), axis=1), axis=0), 1e-30)
        up = most / LARGE
        x *= LARGE / most
    copy.store(x.to(copy.dtype))
    return up


@gluon.jit
def scales(scale, dtype: gl.constexpr):
    """Factors of weights and of what they give, whose product is the scale: fp16 has no room for small weights."""
    if dtype == gl.float16:
        return 1.0, scale
    else:
        return scale, 1.0


@gluon.jit
def _written(bc, gs, W: gl.constexpr):
    """w_j b_j, a product's first operand."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, mma_layout(W), 2)
    PLACE: gl.constexpr = gl.SliceLayout(0, LEFT)
    return (bc.permute((1, 0)).load(LEFT) * gl.exp2(whole_decay(gs, PLACE) - gs.load(PLACE))[None, :]).to(bc.dtype)


@gluon.jit
def _finish_read(yc, pc, gs, up, DECAY: gl.constexpr, SUMS: gl.constexpr):
    """w_i a_iᵀ X from a_iᵀ X as its copy has it, and its sums with the partner, [C]."""
    dtype: gl.constexpr = pc.dtype
    ROW: gl.constexpr = gl.SliceLayout(1, mma_layout(pc.shape[1]))
    sums = gl.zeros([C], gl.float32, gl.SliceLayout(1, mma_layout(C)))
    if dtype == gl.float16:
        yc *= up
    if DECAY != NONE:
        yc *= gl.exp2(gs.load(ROW))[:, None]
        if SUMS:
            sums = gl.sum(pc.load(ROW.parent).to(gl.float32) * yc, axis=1)
            sums = gl.convert_layout(sums, gl.SliceLayout(1, mma_layout(C)))
    return yc, sums


@gluon.jit
def open_chunk(
    ac, bc, cc, pc, copy, gs, x, yc, up, WORK: gl.constexpr, DECAY: gl.constexpr, SUMS: gl.constexpr
):  # fmt: skip
    """Weighted scores [C, C], w_i a_iᵀ X [C, W], added to yc if heads are summed, the next X, on its way, and the sums,
    [C]."""
    W: gl.constexpr = cc.shape[1]
    SCORES: gl.constexpr = mma_layout(C)
    row, col = gl.arange(0, C, layout=gl.SliceLayout(1, SCORES)), gl.arange(0, C, layout=gl.SliceLayout(0, SCORES))
    seen = row[:, None] >= col[None, :]
    if DECAY != NONE:
        x *= gl.exp2(whole_decay(gs, gl.SliceLayout(1, mma_layout(W))))[:, None]
    scores = product(ac, bc.permute((1, 0)), SCORES)  # a_i·b_j
    read = _read(ac, copy)
    if DECAY == NONE:
        x = add_product(x, bc.permute((1, 0)), cc)  # X + Σ_j b_j c_jᵀ
        scores = warpgroup_mma_wait(2, deps=(scores,))
        scores = gl.where(seen, scores, 0.0)
    else:
        x = add_product(x, _written(bc, gs, W), cc)  # w X + Σ_j w_j b_j c_jᵀ
        gap = gs.load(gl.SliceLayout(1, SCORES))[:, None] - gs.load(gl.SliceLayout(0, SCORES))[None, :]
        weights = gl.exp2(gl.where(seen, gap, float("-inf")))
        scores = warpgroup_mma_wait(2, deps=(scores,)) * weights
    read, sums = _finish_read(warpgroup_mma_wait(1, deps=(read,)), pc, gs, up, DECAY, SUMS)
    yc = yc + read if WORK == SUMMED else read
    return scores, yc, x, sums


@gluon.jit
def _read(ac, copy):
    """a_iᵀ X, on its way."""
    return product(ac, copy, mma_layout(copy.shape[1]))


@gluon.jit
def give_product(at_end, at, x, behind, ups, scale):
    """Writes the products of the rows of X, transposed, with the columns of the gradient that `behind` has, whose
    factors are `ups` if it is fp16."""
    COLUMN: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    products = gl.sum(x * behind.permute((1, 0)).load(x.type.layout).to(gl.float32), axis=1) * scale
    if behind.dtype == gl.float16:
        products *= ups
    gl.store(at_end + at * x.shape[0] + gl.arange(0, x.shape[0], layout=COLUMN), products)
