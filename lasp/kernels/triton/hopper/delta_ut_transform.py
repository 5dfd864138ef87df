"""The delta rule within chunks for Hopper (see delta.ut_transform): T = (I + L)^{-1}, and what is known of the gates.

Two warps do a chunk. Each inverts one of the two blocks of 32 x 32 on L's diagonal by elimination: a thread has a
column of the inverse, so that nothing but the weights of L comes from others, out of shared memory. The block below
follows from both by two products; for these what is fp32 is cut into two 16-bit numbers.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.delta.ut_transform import log2_growth
from lasp.kernels.triton.hopper.layouts import GATES_SHARED, C
from lasp.kernels.triton.hopper.shared import barrier
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import DIAGONAL, LOG2_E, NONE, scalar_decay

HALF = gl.constexpr(C.value // 2)
QUARTER = gl.constexpr(C.value // 4)
MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [2, 1], [16, 8]))  # [HALF, HALF]
LEFT, RIGHT = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 2)), gl.constexpr(gl.DotOperandLayout(1, MMA.value, 2))
BLOCKS = gl.constexpr(gl.BlockedLayout([1, 16, 1], [1, 1, 32], [2, 1, 1], [2, 1, 0]))  # [2, rows, HALF]
OUT = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [2, 1], [1, 0]))  # [HALF, HALF], coalesced
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [2], [0]))
KEYS_SHARED = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
BY_COLUMNS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0]))  # [2, HALF, HALF]
BY_ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _either(a, b):
    return a | b


@gluon.jit
def _row(block, j: gl.constexpr):
    """Row j of [2, rows, HALF], which each thread has: [2, 1, HALF]. As bits, so that nothing is left to compute."""
    i = gl.arange(0, block.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, BLOCKS)))
    bits = gl.where((i == j)[None, :, None], block.to(gl.int32, bitcast=True), 0)
    return gl.reduce(bits, 1, _either).to(gl.float32, bitcast=True)[:, None, :]


@gluon.jit
def _product(a, b, work: gl.constexpr):
    """a b of fp32 numbers in two pieces of 16 bits each; the product of the small ones is left out."""
    a_high, b_high = a.to(work), b.to(work)
    a_low, b_low = (a - a_high.to(gl.float32)).to(work), (b - b_high.to(gl.float32)).to(work)
    y = mma_v2(a_low, b_high, gl.zeros([HALF, HALF], gl.float32, MMA))
    y = mma_v2(a_high, b_low, y)
    return mma_v2(a_high, b_high, y)


@gluon.jit
def _weights(s, lines, ROW: gl.constexpr, COL: gl.constexpr, SCALARS: gl.constexpr):
    """The block of L from a block of K Kᵀ that begins in these row and column."""
    s *= lines.slice(ROW, HALF).load(gl.SliceLayout(1, MMA))[:, None]
    if SCALARS:
        b_row = lines.slice(C + ROW, HALF).load(gl.SliceLayout(1, MMA))
        b_col = lines.slice(C + COL, HALF).load(gl.SliceLayout(0, MMA))
        s *= gl.exp(gl.minimum(b_row[:, None] - b_col[None, :], 0.0))
    if ROW == COL:
        row, col = gl.arange(0, HALF, layout=gl.SliceLayout(1, MMA)), gl.arange(0, HALF, layout=gl.SliceLayout(0, MMA))
        s = gl.where(row[:, None] > col[None, :], s, 0.0)
    return s


@gluon.jit
def _growth(products, beta):
    """By how much a state may grow with these tokens, as log2, from their K Kᵀ: see delta.ut_transform."""
    row, col = gl.arange(0, HALF, layout=gl.SliceLayout(1, MMA)), gl.arange(0, HALF, layout=gl.SliceLayout(0, MMA))
    squares = gl.sum(gl.where(row[:, None] == col[None, :], products, 0.0), axis=1)
    return gl.sum(log2_growth(squares, beta.load(gl.SliceLayout(1, MMA))), axis=0)


@gluon.jit
def _ut_transform(
    k,  # [tokens, H // G, K]; if DIAGONAL [tokens, H, C] fp32: k_i·(e^{b_i - b_j} k_j) for j < i
    decay,  # [H] or [tokens, H]
    beta,  # [tokens, H]
    ut,  # [tokens, H, C]: the row of T that belongs to a token
    gates,  # [chunks, H, 4, C] fp32: beta, b, e^b and e^{b_C - b}; if DIAGONAL beta alone
    log2_bounds,  # [chunks, H]: see Terms, if there are scalar gates
    start, length, H, G,
    K: gl.constexpr, DECAY: gl.constexpr,
):  # fmt: skip
    griddepcontrol_wait()
    chunk, h = gl.program_id(0), gl.program_id(1)
    begin, count = gl.load(start + chunk), gl.load(length + chunk).to(gl.int32)
    dtype: gl.constexpr = ut.dtype.element_ty
    SCALARS: gl.constexpr = DECAY != NONE and DECAY != DIAGONAL
    lines = gl.allocate_shared_memory(gl.float32, [2 * C], GATES_SHARED)
    if DECAY != DIAGONAL:
        k_rows = gl.allocate_shared_memory(dtype, [C, K], KEYS_SHARED)
    if K == C or DECAY == DIAGONAL:
        room = gl.allocate_shared_memory(gl.float32, [2, C, HALF], FLAT)
    else:  # that of k, which has been read by then
        room = k_rows._reinterpret(gl.float32, [K // C, C, HALF], FLAT)
    weights = room.index(0)._reinterpret(gl.float32, [2, HALF, HALF], BY_COLUMNS)  # L's blocks on the diagonal
    inverses = room.index(1)

    if DECAY != DIAGONAL:
        KEY_ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [2, 1], [1, 0])
        place, cols = (
            gl.arange(0, C, layout=gl.SliceLayout(1, KEY_ROWS)),
            gl.arange(0, K, layout=gl.SliceLayout(0, KEY_ROWS)),
        )
        first = k + (begin * (H // G) + h // G) * K
        at = (place * (H // G * K))[:, None] + cols[None, :]
        k_rows.store(gl.load(first + at, mask=(place < count)[:, None], other=0.0))

    i = gl.arange(0, C, layout=LINE)
    here, line = i < count, gates + (chunk.to(gl.int64) * H + h) * 4 * C + i
    beta_line = gl.load(beta + (begin + i) * H + h, mask=here, other=0.0).to(gl.float32)
    lines.slice(0, C).store(beta_line)
    gl.store(line, beta_line)
    if SCALARS:
        g = scalar_decay(decay, begin + i, here, h, H, DECAY)
        b, total = gl.associative_scan(g, 0, _add), gl.sum(g, axis=0)
        lines.slice(C, C).store(b)
        gl.store(line + C, b)
        gl.store(line + 2 * C, gl.exp(b))
        gl.store(line + 3 * C, gl.exp(gl.minimum(total - b, 0.0)))
    barrier()

    if DECAY == DIAGONAL:
        row, col = gl.arange(0, HALF, layout=gl.SliceLayout(1, MMA)), gl.arange(0, HALF, layout=gl.SliceLayout(0, MMA))
        at = k + (begin * H + h) * C + (row * (H * C))[:, None] + col[None, :]
        early, late = (row < count)[:, None], (row + HALF < count)[:, None]
        past = row[:, None] > col[None, :]
        s0 = gl.load(at, mask=early & past, other=0.0)
        s1 = gl.load(at + HALF * H * C + HALF, mask=late & past, other=0.0)
        below = gl.load(at + HALF * H * C, mask=late, other=0.0)
    else:
        s0 = gl.zeros([HALF, HALF], gl.float32, MMA)
        s1, below = s0, s0
        for piece in gl.static_range(K // HALF):
            keys = k_rows.slice(piece * HALF, HALF, dim=1)
            early, late = keys.slice(0, HALF), keys.slice(HALF, HALF)
            early_t, late_t = early.permute((1, 0)).load(RIGHT), late.permute((1, 0)).load(RIGHT)
            late = late.load(LEFT)
            s0 = mma_v2(early.load(LEFT), early_t, s0)
            s1 = mma_v2(late, late_t, s1)
            below = mma_v2(late, early_t, below)
    if SCALARS:
        growth = _growth(s0, lines.slice(0, HALF)) + _growth(s1, lines.slice(HALF, HALF))
        gl.store(log2_bounds + chunk.to(gl.int64) * H + h, total * LOG2_E + growth)
    barrier()
    s0, s1 = _weights(s0, lines, 0, 0, SCALARS), _weights(s1, lines, HALF, HALF, SCALARS)
    weights.slice(0, 1).store(s0.reshape([1, HALF, HALF]))
    weights.slice(1, 1).store(s1.reshape([1, HALF, HALF]))
    below = _weights(below, lines, HALF, 0, SCALARS)
    barrier()

    row = gl.arange(0, QUARTER, layout=gl.SliceLayout(0, gl.SliceLayout(2, BLOCKS)))[None, :, None]
    col = gl.arange(0, HALF, layout=gl.SliceLayout(0, gl.SliceLayout(1, BLOCKS)))[None, None, :]
    nothing = gl.zeros([2, QUARTER, HALF], gl.float32, BLOCKS)
    upper, lower = gl.where(row == col, 1.0, nothing), gl.where(row + QUARTER == col, 1.0, nothing)
    for j in gl.static_range(QUARTER):
        done = _row(upper, j)
        column = weights.slice(j, 1, dim=2)
        lower -= column.slice(QUARTER, QUARTER, dim=1).load(BLOCKS) * done
        if j < QUARTER - 1:
            upper -= column.slice(0, QUARTER, dim=1).load(BLOCKS) * done
    for j in gl.static_range(QUARTER - 1):
        column = weights.slice(QUARTER + j, 1, dim=2).slice(QUARTER, QUARTER, dim=1)
        lower -= column.load(BLOCKS) * _row(lower, j)
    blocks = inverses._reinterpret(gl.float32, [2, HALF, HALF], BY_ROWS)
    blocks.slice(0, QUARTER, dim=1).store(upper)
    blocks.slice(QUARTER, QUARTER, dim=1).store(lower)
    barrier()

    t0, t1 = inverses.slice(0, HALF), inverses.slice(HALF, HALF)
    r = _product(gl.convert_layout(below, LEFT), t0.load(RIGHT), dtype)
    t10 = _product(t1.load(LEFT), gl.convert_layout(r, RIGHT), dtype)
    row, col = gl.arange(0, HALF, layout=gl.SliceLayout(1, OUT)), gl.arange(0, HALF, layout=gl.SliceLayout(0, OUT))
    at = ut + (begin * H + h) * C + (row * (H * C))[:, None] + col[None, :]
    early, late = (row < count)[:, None], (row + HALF < count)[:, None]
    gl.store(at, t0.load(OUT).to(dtype), mask=early)
    gl.store(at + HALF, gl.zeros([HALF, HALF], dtype, OUT), mask=early)
    gl.store(at + HALF * H * C, gl.convert_layout((-t10).to(dtype), OUT), mask=late)
    gl.store(at + HALF * H * C + HALF, t1.load(OUT).to(dtype), mask=late)


def ut_transform(
    chunks: Tiles, k: Tensor, decay: Tensor | None, beta: Tensor, products: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """T [B, T, H, 64] in k's dtype, gates [chunks, H, 4, 64] in fp32, and bounds: see delta.ut_transform."""
    (batch, tokens, heads), (q_heads, key_dim) = beta.shape, k.shape[2:]
    ut = k.new_empty(batch, tokens, heads, C.value)
    gates = k.new_empty(chunks.count, heads, 4, C.value, dtype=torch.float32)
    scalars = Decay.of(decay) in (Decay.CONSTANT, Decay.SCALAR)
    log2_bounds = gates.new_empty(chunks.count, heads) if scalars else None
    launch(
        _ut_transform, (chunks.count, heads),
        k if products is None else products, decay, beta, ut, gates, log2_bounds, chunks.start, chunks.length,
        heads, heads // q_heads,
        K=key_dim, DECAY=Decay.of(decay).value, num_warps=2, pdl=True,
    )  # fmt: skip
    return ut, gates, log2_bounds
