"""Forward scans, for o and dq (see chunk_scan): each of two groups of warps holds half of the state's columns.

    y_i = scale · (w_i a_iᵀ X + Σ_{j<=i} w_ij (a_i·b_j) c_j)          X <- w X + Σ_j w_j b_j c_jᵀ

Both compute all scores, which stay in registers as the first operand of what is summed over them.
"""

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
    HALF_LINES,
    LEFT,
    LINES,
    MMA,
    REGISTERS,
    ROWS,
    SHARED,
    SIZE,
    WIDE_ROWS,
    C,
    barrier,
    clear_tail,
    half_columns,
    half_rows,
    load_gates,
    load_initial_state,
    rows_of,
    send_rows,
    whole_decay,
)
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import NONE
from lasp.kernels.triton.shared.state_passing import InitialStates


@gluon.jit
def _fetch(a, b, c, partner, buffers, ring, begin, count, h, GA, GB, GC, GP, SUMS: gl.constexpr):
    a_rows, b_rows, c_rows, partner_rows = buffers
    row = begin.to(gl.int32)
    for i in range(gl.cdiv(count, C)):
        filled, stage = ring.acquire(i), i % ring.stages
        mbarrier.expect(filled, 2 * C * SIZE * (4 if SUMS else 3))
        tma.async_copy_global_to_shared(a, [row + i * C, h // GA * SIZE], filled, a_rows.index(stage))
        tma.async_copy_global_to_shared(b, [row + i * C, h // GB * SIZE], filled, b_rows.index(stage))
        for part in gl.static_range(2):
            at = 2 * stage + part
            tma.async_copy_global_to_shared(c, [row + i * C, h // GC * SIZE + part * HALF], filled, c_rows.index(at))
            if SUMS:
                col = h // GP * SIZE + part * HALF
                tma.async_copy_global_to_shared(partner, [row + i * C, col], filled, partner_rows.index(at))


@gluon.jit
def _compute(
    shared,
    tensors,
    numbers,
    PART: gl.constexpr,  # the group of warps
    DECAY: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    SUMS: gl.constexpr,
):
    buffers, x_halves, outputs, gates_copies, ring = shared
    gates, initial, y, y_rows, products, ends = tensors
    begin, count, h, scale, TOKENS, H = numbers
    a_rows, b_rows, c_rows, partner_rows = buffers
    xs, gs = x_halves.index(PART), gates_copies.index(PART)
    dtype: gl.constexpr = xs.dtype
    row, col = gl.arange(0, C, layout=gl.SliceLayout(1, MMA)), gl.arange(0, C, layout=gl.SliceLayout(0, MMA))
    seen = row[:, None] >= col[None, :]
    tile = gl.program_id(0).to(gl.int64)
    y += (begin * H + h) * SIZE + PART * HALF
    if SUMS:
        products += (PART * TOKENS + begin) * H + h
    chunks = gl.cdiv(count, C)
    if TRANSPOSED:  # what enters has long been there: see pdl
        x = load_initial_state(initial, half_rows(PART), tile, h, H).permute((1, 0))
    else:
        griddepcontrol_wait()
        x = load_initial_state(initial, half_columns(PART), tile, h, H)
    x = gl.convert_layout(x, MMA)
    xs.store(x.to(dtype))
    if DECAY != NONE:
        g, _ = load_gates(gates, begin, 0, count, h, H, DECAY)
        gs.store(g)
    fence_async_shared()
    barrier()
    for i in range(chunks):
        stage = i % ring.stages
        ac, bc, cc = a_rows.index(stage), b_rows.index(stage), c_rows.index(2 * stage + PART)
        if DECAY != NONE:
            g, _ = load_gates(gates, begin, gl.minimum(i + 1, chunks - 1), count, h, H, DECAY)
        ring.wait(i)
        if count - i * C < C:  # both groups write the same zeros
            clear_tail(ac, i, count, WIDE_ROWS)
            clear_tail(bc, i, count, WIDE_ROWS)
            clear_tail(cc, i, count, ROWS)
            fence_async_shared()
            barrier()
        if DECAY != NONE:
            x *= gl.exp2(whole_decay(gs, gl.SliceLayout(1, MMA)))[:, None]
        nothing = gl.zeros([C, C], gl.float32, MMA)
        scores = warpgroup_mma(ac, bc.permute((1, 0)), nothing, use_acc=False, is_async=True)
        yc = warpgroup_mma(ac, xs, nothing, use_acc=False, is_async=True)
        if DECAY == NONE:
            x = warpgroup_mma(bc.permute((1, 0)), cc, x, is_async=True)
            scores = warpgroup_mma_wait(2, deps=(scores,))
            scores = gl.where(seen, scores, 0.0)
        else:
            written = gl.exp2(whole_decay(gs, gl.SliceLayout(0, LEFT)) - gs.load(gl.SliceLayout(0, LEFT)))
            keys = (bc.permute((1, 0)).load(LEFT) * written[None, :]).to(dtype)
            x = warpgroup_mma(keys, cc, x, is_async=True)
            g_row, g_col = gs.load(gl.SliceLayout(1, MMA)), gs.load(gl.SliceLayout(0, MMA))
            weights = gl.exp2(gl.where(seen, g_row[:, None] - g_col[None, :], float("-inf")))
            read = gl.exp2(g_row)
            scores = warpgroup_mma_wait(2, deps=(scores,)) * weights
            yc = warpgroup_mma_wait(1, deps=(yc,)) * read[:, None]
        yc = warpgroup_mma(gl.convert_layout(scores.to(dtype), LEFT), cc, yc, is_async=True)
        x = warpgroup_mma_wait(1, deps=(x,))
        xs.store(x.to(dtype))
        if DECAY != NONE:
            gs.store(g)
        yc = warpgroup_mma_wait(0, deps=(yc,)) * scale
        if SUMS:
            place = i * C + row
            sums = gl.sum(partner_rows.index(2 * stage + PART).load(MMA).to(gl.float32) * yc, axis=1)
            gl.store(products + place * H, sums, mask=place < count)
        out = outputs.index(2 * (i % 2) + PART)
        out.store(yc.to(dtype))
        fence_async_shared()
        tma.store_wait(0)  # of the chunk before, whose buffer is the next one's
        barrier()
        ring.release(i)
        send_rows(y, y_rows, out, begin, i, count, h * SIZE + PART * HALF, H * SIZE, ROWS)
    tma.store_wait(0)
    if TRANSPOSED:
        griddepcontrol_wait()
    if SUMS:
        ends += (tile * H + h) * SIZE * SIZE
        if TRANSPOSED:
            gl.store(ends + half_rows(PART), gl.convert_layout(x.permute((1, 0)), LINES))
        else:
            gl.store(ends + half_columns(PART), gl.convert_layout(x, HALF_LINES))


@gluon.jit
def _forward_scan(
    a,  # rows of [tokens, H // GA, SIZE]
    b,  # rows of [tokens, H // GB, SIZE]
    c,  # half rows of [tokens, H // GC, SIZE]
    partner,  # half rows of [tokens, H // GP, SIZE]: for sums of partner · y, if SUMS
    gates,  # see gates.cumulate
    local,  # [M, H, SIZE, SIZE]: X before the scan, its transpose if TRANSPOSED, with the next two: see InitialStates
    incoming,  # [N, H, SIZE, SIZE]
    passed,  # [M, H]
    y,  # [tokens, H, SIZE]
    y_rows,  # half rows of it
    products,  # [2, tokens, H]: those sums, each over half a row
    ends,  # like local: X after the scan, if SUMS
    owner,
    start,
    length,
    scale,
    TOKENS,
    H,
    GA,
    GB,
    GC,
    GP,
    DECAY: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    SUMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    tile, h = gl.program_id(0), gl.program_id(1)
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    dtype: gl.constexpr = a.dtype
    a_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    b_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    c_rows = gl.allocate_shared_memory(dtype, [2 * STAGES, C, HALF], SHARED)
    partner_rows = gl.allocate_shared_memory(dtype, [2 * STAGES, C, HALF], SHARED) if SUMS else c_rows
    x_halves = gl.allocate_shared_memory(dtype, [2, SIZE, HALF], SHARED)
    outputs = gl.allocate_shared_memory(dtype, [4, C, HALF], SHARED)
    gates_copies = gl.allocate_shared_memory(gl.float32, [2, C], GATES_SHARED)
    ring = make_ring(STAGES)
    buffers = (a_rows, b_rows, c_rows, partner_rows)
    shared = (buffers, x_halves, outputs, gates_copies, ring)
    tensors = (gates, (local, incoming, passed, owner), y, y_rows, products, ends)
    numbers = (begin, count, h, scale, TOKENS, H)
    gl.warp_specialize(
        [
            (_compute, (shared, tensors, numbers, 0, DECAY, TRANSPOSED, SUMS)),
            (_compute, (shared, tensors, numbers, 1, DECAY, TRANSPOSED, SUMS)),
            (_fetch, (a, b, c, partner if SUMS else c, buffers, ring, begin, count, h, GA, GB, GC, GP, SUMS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def forward_scan(
    tiles: Tiles,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    gates: Tensor | None,
    initial: InitialStates,
    scale: float,
    *,
    transposed: bool = False,
    partner: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [B, T, H, SIZE], for as many heads as the states have; with a partner also partner · y [2, B, T, H].

    `ends` (like a state for every tile) is then filled with the states at the tiles' ends.
    """
    (batch, tokens), heads = c.shape[:2], initial.local.shape[1]
    y = c.new_empty(batch, tokens, heads, SIZE.value)
    products = None if partner is None else initial.local.new_empty(2, batch, tokens, heads)
    groups = (1 if t is None else heads // t.shape[2] for t in (a, b, c, partner))
    launch(
        _forward_scan, (tiles.count, heads),
        rows_of(a, SIZE.value), rows_of(b, SIZE.value), rows_of(c, HALF.value),
        None if partner is None else rows_of(partner, HALF.value), gates, *initial,
        y, rows_of(y, HALF.value), products, ends,
        tiles.owner, tiles.start, tiles.length, scale, batch * tokens, heads, *groups,
        DECAY=Decay.of(gates).value, TRANSPOSED=transposed, SUMS=partner is not None, STAGES=2, num_warps=4,
        pdl=True,
    )  # fmt: skip
    return y, products
