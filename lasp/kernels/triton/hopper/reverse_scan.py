"""The reverse scan over a tile, for dk and dv at once (see chunk_scan): one group of warps computes dv, the other dk.

    dv_i = scale · (w_i k_iᵀ X + Σ_{j>=i} w_ij (k_i·q_j) do_j)          X <- w X + Σ_j w_j q_j do_jᵀ
    dk_i = scale · (w_i X v_i  + Σ_{j>=i} w_ij (v_i·do_j) q_j)

X is the gradient of the state / scale. Each group holds half of its rows, and tells the other when they are ready.
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
    LEFT,
    MMA,
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
    load_initial_state,
    rows_of,
    send_rows,
    whole_decay,
)
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import NONE
from lasp.kernels.triton.shared.state_passing import InitialStates

# Where the state passes from rows to the places in which products have it, both without bank conflicts.
PASSAGE = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))


@gluon.jit
def _fetch(q, k, v, do, buffers, ring, begin, count, h, G):
    q_rows, k_rows, v_rows, do_rows = buffers
    chunks = gl.cdiv(count, C)
    for step in range(chunks):
        row = begin.to(gl.int32) + (chunks - 1 - step) * C
        filled, stage = ring.acquire(step), step % ring.stages
        mbarrier.expect(filled, 2 * C * SIZE * 4)
        tma.async_copy_global_to_shared(k, [row, h // G * SIZE], filled, k_rows.index(stage))
        tma.async_copy_global_to_shared(q, [row, h // G * SIZE], filled, q_rows.index(stage))
        tma.async_copy_global_to_shared(v, [row, h * SIZE], filled, v_rows.index(stage))
        tma.async_copy_global_to_shared(do, [row, h * SIZE], filled, do_rows.index(stage))


@gluon.jit
def _of_rounding(x, kc, vc, gs, PART: gl.constexpr):
    """w_j k_jᵀ X v_j, [C], of what rounding leaves of a group's rows of X: over a tile it would add up."""
    PLACE: gl.constexpr = gl.SliceLayout(0, MMA)
    left = gl.convert_layout((x - x.to(vc.dtype).to(gl.float32)).to(vc.dtype), LEFT)
    nothing = gl.zeros([HALF, C], gl.float32, MMA)
    read = warpgroup_mma(left, vc.permute((1, 0)), nothing, use_acc=False, is_async=True)
    keys = kc.slice(PART * HALF, HALF, dim=1).permute((1, 0)).load(MMA)
    weights = gl.exp2(whole_decay(gs, PLACE) - gs.load(PLACE))
    read = warpgroup_mma_wait(0, deps=(read,))
    return gl.sum(read * keys.to(gl.float32), axis=0) * weights


@gluon.jit
def _compute(
    shared,
    tensors,
    y,
    y_rows,
    numbers,
    PART: gl.constexpr,  # the group of warps: 0 for dv, 1 for dk
    DECAY: gl.constexpr,
    SUMS: gl.constexpr,
):
    buffers, x_copies, outputs, gates_copies, ring, ready = shared
    gates, initial, v_dv, ends, at_end = tensors
    begin, count, h, scale, TOKENS, H = numbers
    q_rows, k_rows, v_rows, do_rows = buffers
    out, gs = outputs.index(PART), gates_copies.index(PART)
    dtype: gl.constexpr = out.dtype
    TOKEN: gl.constexpr = gl.SliceLayout(1, WIDE_MMA)
    row, col = gl.arange(0, C, layout=gl.SliceLayout(1, MMA)), gl.arange(0, C, layout=gl.SliceLayout(0, MMA))
    seen = row[:, None] <= col[None, :]
    tile = gl.program_id(0).to(gl.int64)
    state_at = half_rows(PART)
    y += (begin * H + h) * SIZE
    chunks = gl.cdiv(count, C)
    griddepcontrol_wait()
    x = load_initial_state(initial, state_at, tile, h, H)
    if SUMS:
        v_dv += (PART * TOKENS + begin) * H + h
        end_state = gl.load(ends + (tile * H + h) * SIZE * SIZE + state_at)
        end_product = gl.sum(gl.sum(x * end_state, axis=1), axis=0)
        gl.store(at_end + (PART * gl.num_programs(0) + tile) * H + h, end_product)
    # What is written only when both groups are in the loop, for the state to change places in.
    spare = (x_copies.index(1) if PART == 0 else outputs)._reinterpret(gl.float32, [HALF, SIZE], PASSAGE)
    spare.store(x / scale)
    barrier()
    x = spare.load(WIDE_MMA)
    x_copies.index(0).slice(PART * HALF, HALF, dim=0).store(x.to(dtype))
    if DECAY != NONE:
        g, _ = load_gates(gates, begin, gl.maximum(chunks - 1, 0), count, h, H, DECAY)
        gs.store(g)
    fence_async_shared()
    barrier()
    mbarrier.arrive(ready, count=1)
    for step in range(chunks):
        i = chunks - 1 - step
        stage = step % ring.stages
        qc, kc, vc, doc = q_rows.index(stage), k_rows.index(stage), v_rows.index(stage), do_rows.index(stage)
        if DECAY != NONE:
            g, _ = load_gates(gates, begin, gl.maximum(i - 1, 0), count, h, H, DECAY)
        mbarrier.wait(ready, step & 1)
        ring.wait(step)
        if count - i * C < C:  # both groups write the same zeros
            clear_tail(qc, i, count, WIDE_ROWS)
            clear_tail(kc, i, count, WIDE_ROWS)
            clear_tail(vc, i, count, WIDE_ROWS)
            clear_tail(doc, i, count, WIDE_ROWS)
            fence_async_shared()
            barrier()
        if SUMS:
            inner = gl.convert_layout(_of_rounding(x, kc, vc, gs, PART), TOKEN)
        if DECAY != NONE:
            x *= gl.exp2(whole_decay(gs, gl.SliceLayout(1, WIDE_MMA)))[:, None]
        if PART == 0:
            left, right, summed, xs = kc, qc, doc, x_copies.index(step % 2)
        else:
            left, right, summed, xs = vc, doc, qc, x_copies.index(step % 2).permute((1, 0))
        scores = warpgroup_mma(
            left, right.permute((1, 0)), gl.zeros([C, C], gl.float32, MMA), use_acc=False, is_async=True
        )
        yc = warpgroup_mma(left, xs, gl.zeros([C, SIZE], gl.float32, WIDE_MMA), use_acc=False, is_async=True)
        queries = qc.slice(PART * HALF, HALF, dim=1).permute((1, 0))
        if DECAY == NONE:
            x = warpgroup_mma(queries, doc, x, is_async=True)
            scores = warpgroup_mma_wait(2, deps=(scores,))
            scores = gl.where(seen, scores, 0.0)
        else:
            written = gl.exp2(gs.load(gl.SliceLayout(0, WIDE_LEFT)))
            x = warpgroup_mma((queries.load(WIDE_LEFT) * written[None, :]).to(dtype), doc, x, is_async=True)
            g_row, g_col = gs.load(gl.SliceLayout(1, MMA)), gs.load(gl.SliceLayout(0, MMA))
            weights = gl.exp2(gl.where(seen, g_col[None, :] - g_row[:, None], float("-inf")))
            read = gl.exp2(whole_decay(gs, gl.SliceLayout(1, WIDE_MMA)) - gs.load(gl.SliceLayout(1, WIDE_MMA)))
            scores = warpgroup_mma_wait(2, deps=(scores,)) * weights
            yc = warpgroup_mma_wait(1, deps=(yc,))
            if SUMS:
                if PART == 0:  # v as rounded as where the forward scan writes it into its state
                    rounded = (vc.load(WIDE_MMA) * read[:, None]).to(dtype).to(gl.float32)
                    inner += gl.sum(rounded * yc, axis=1)
                place = i * C + gl.arange(0, C, layout=TOKEN)
                gl.store(v_dv + place * H, inner * scale, mask=place < count)
            yc *= read[:, None]
        yc = warpgroup_mma(gl.convert_layout(scores.to(dtype), WIDE_LEFT), summed, yc, is_async=True)
        x = warpgroup_mma_wait(1, deps=(x,))
        x_copies.index((step + 1) % 2).slice(PART * HALF, HALF, dim=0).store(x.to(dtype))
        if DECAY != NONE:
            gs.store(g)
        fence_async_shared()
        tma.store_wait(0)  # of the chunk before, so that its buffer is free
        barrier()
        mbarrier.arrive(ready, count=1)
        yc = warpgroup_mma_wait(0, deps=(yc,)) * scale
        out.store(yc.to(dtype))
        fence_async_shared()
        barrier()
        ring.release(step)
        send_rows(y, y_rows, out, begin, i, count, h * SIZE, H * SIZE, WIDE_ROWS)
    tma.store_wait(0)


@gluon.jit
def _reverse_scan(
    q,  # rows of [tokens, H // G, SIZE]
    k,
    v,  # rows of [tokens, H, SIZE]
    do,
    gates,  # see gates.cumulate
    local,  # [M, H, SIZE, SIZE]: X · scale before the scan, with the next two: see InitialStates
    incoming,  # [N, H, SIZE, SIZE]
    passed,  # [M, H]
    dk,  # [tokens, H, SIZE]
    dv,
    dk_rows,  # rows of them
    dv_rows,
    v_dv,  # [2, tokens, H]: what of v · dv came in with the state, if SUMS
    ends,  # like local: the state at the tiles' ends, if SUMS
    at_end,  # [2, M, H]: the sums of its products with the gradient there, each over half of the rows, if SUMS
    owner,
    start,
    length,
    scale,
    TOKENS,
    H,
    G,
    DECAY: gl.constexpr,
    SUMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    tile, h = gl.program_id(0), gl.program_id(1)
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    dtype: gl.constexpr = q.dtype
    q_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    k_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    v_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    do_rows = gl.allocate_shared_memory(dtype, [STAGES, C, SIZE], SHARED)
    x_copies = gl.allocate_shared_memory(dtype, [2, SIZE, SIZE], SHARED)  # one is read while the next is written
    outputs = gl.allocate_shared_memory(dtype, [2, C, SIZE], SHARED)
    gates_copies = gl.allocate_shared_memory(gl.float32, [2, C], GATES_SHARED)
    ring = make_ring(STAGES)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=2)
    buffers = (q_rows, k_rows, v_rows, do_rows)
    shared = (buffers, x_copies, outputs, gates_copies, ring, ready)
    tensors = (gates, (local, incoming, passed, owner), v_dv, ends, at_end)
    numbers = (begin, count, h, scale, TOKENS, H)
    gl.warp_specialize(
        [
            (_compute, (shared, tensors, dv, dv_rows, numbers, 0, DECAY, SUMS)),
            (_compute, (shared, tensors, dk, dk_rows, numbers, 1, DECAY, SUMS)),
            (_fetch, (q, k, v, do, buffers, ring, begin, count, h, G)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def reverse_scan(
    tiles: Tiles,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    gates: Tensor | None,
    initial: InitialStates,
    scale: float,
    ends: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dk and dv [B, T, H, SIZE]. With `ends`, the states at the tiles' ends, also what of v · dv came in
    with the state, [2, B, T, H], and the products of those states with their gradients, [2, M, H]."""
    batch, tokens, heads = v.shape[:3]
    dk, dv = (v.new_empty(batch, tokens, heads, SIZE.value) for _ in range(2))
    v_dv = at_end = None
    if ends is not None:
        v_dv, at_end = ends.new_empty(2, batch, tokens, heads), ends.new_empty(2, tiles.count, heads)
    launch(
        _reverse_scan, (tiles.count, heads),
        *(rows_of(x, SIZE.value) for x in (q, k, v, do)), gates, *initial,
        dk, dv, rows_of(dk, SIZE.value), rows_of(dv, SIZE.value), v_dv, ends, at_end,
        tiles.owner, tiles.start, tiles.length, scale, batch * tokens, heads, heads // q.shape[2],
        DECAY=Decay.of(gates).value, SUMS=ends is not None, STAGES=2, num_warps=4,
        pdl=True,
    )  # fmt: skip
    return dk, dv, v_dv, at_end
