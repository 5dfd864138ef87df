"""The delta rule's walk down a tile for Hopper that gives all gradients on its way (see delta_down and delta_grads).

A chunk has two parts. The first is that of every walk down: du, dr and the next gradient G of the state, transposed, so
that what one product yields is the next one's first operand, in registers; each of two groups of warps has half of V. In
the second each has half of K's columns, and reads X, G, u, do and dr from shared memory:

    dq = e^b do Xᵀ + P k        w = e^b dr Xᵀ + N k        dk = e^{b_C - b} u Gᵀ + Pᵀ q - Nᵀ (beta k) - beta w
    P_ij = e_ij (do_i·u_j), j <= i        N_ij = e_ij (dr_i·u_j), j < i        e_ij = e^{b_i - b_j}

dv = beta dr. What the gradients of gates need are sums over both halves: a warp of its own adds them up.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.gates import NONE
from lasp.kernels.triton.hopper.shared import (
    GATES_SHARED,
    SHARED,
    SIZE,
    C,
    barrier,
    clear_tail,
    rows_of,
    send_rows,
)
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.overlap import await_previous

AHEAD = gl.constexpr(2)  # chunks of k, do, P and gates on their way; the rest comes while a chunk's first part runs
COLUMNS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16]))  # [V, C], half of V for each group
STATE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16]))  # [V, K], likewise
TOKENS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16]))  # [C, K], half of K for each group
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))  # [C, C], likewise
COLUMNS_LEFT = gl.constexpr(gl.DotOperandLayout(0, COLUMNS, 2))  # first operands, in registers
STATE_LEFT = gl.constexpr(gl.DotOperandLayout(0, STATE, 2))
TOKENS_LEFT = gl.constexpr(gl.DotOperandLayout(0, TOKENS, 2))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))  # as memory likes them
WIDE_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0]))
PAIRS = gl.constexpr(gl.BlockedLayout([2, 2], [1, 32], [1, 1], [1, 0]))  # two numbers for every token, in one warp
PAIR = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))  # their sum
SUMS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def _fetch(sources, buffers, barriers, numbers):
    q, k, v, do, u, wy, scores, states, gates = sources
    k_rows, do_rows, p_rows, lines, t_rows, q_rows, u_rows, v_rows, xs = buffers
    full, empty, early, late, free = barriers
    begin, count, chunk, h, row, H, HEADS, G = numbers
    line = gl.arange(0, 4 * C, layout=gl.BlockedLayout([4], [32], [1], [0]))
    chunks = gl.cdiv(count, C)
    for step in range(chunks + 1):
        if step > 0:
            i = chunks - step
            at = begin.to(gl.int32) + i * C
            mbarrier.wait(free, step & 1)
            mbarrier.expect(early, 2 * C * (C + SIZE))
            tma.async_copy_global_to_shared(wy, [at, h * C], early, t_rows.index(0))
            tma.async_copy_global_to_shared(q, [at, h // G * SIZE], early, q_rows.index(0))
            mbarrier.expect(late, 2 * (2 * C * SIZE + SIZE * SIZE))
            tma.async_copy_global_to_shared(u, [at, row * SIZE], late, u_rows.index(0))
            state = (((chunk + i) * HEADS + row) * SIZE).to(gl.int32)
            tma.async_copy_global_to_shared(states, [state, 0], late, xs.index(0))
            tma.async_copy_global_to_shared(v, [at, h * SIZE], late, v_rows.index(0))
        if step < chunks:
            i = chunks - 1 - step
            at = begin.to(gl.int32) + i * C
            stage = step % AHEAD
            filled = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // AHEAD & 1) ^ 1)
            gates_at = gates + ((chunk + i) * H + h) * 4 * C
            async_copy.async_copy_global_to_shared(lines.index(stage), gates_at + line)
            async_copy.mbarrier_arrive(filled)
            mbarrier.expect(filled, 2 * C * (2 * SIZE + C))
            tma.async_copy_global_to_shared(k, [at, h // G * SIZE], filled, k_rows.index(stage))
            tma.async_copy_global_to_shared(do, [at, h * SIZE], filled, do_rows.index(stage))
            tma.async_copy_global_to_shared(scores, [at, h * C], filled, p_rows.index(stage))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _add_up(sums, summed, taken, d_decay, d_beta, numbers):
    """The gradients of beta and of the decay, chunk by chunk."""
    begin, count, h, H = numbers
    chunks = gl.cdiv(count, C)
    for step in range(chunks):
        i = chunks - 1 - step
        mbarrier.wait(summed, step & 1)
        for_beta = gl.convert_layout(gl.sum(sums.index(0).load(PAIRS), axis=0), PAIR)
        if d_decay is not None:
            change = gl.convert_layout(gl.sum(sums.index(1).load(PAIRS), axis=0), PAIR)
            carried = gl.sum(gl.sum(sums.index(2).load(PAIRS), axis=0), axis=0)
        barrier()
        mbarrier.arrive(taken, count=1)
        place = i * C + gl.arange(0, C, layout=PAIR)
        at = (begin + place) * H + h
        gl.store(d_beta + at, for_beta.to(d_beta.dtype.element_ty), mask=place < count)
        if d_decay is not None:
            dg = gl.associative_scan(change, 0, _add, reverse=True) + carried
            gl.store(d_decay + at, dg.to(d_decay.dtype.element_ty), mask=place < count)


@gluon.jit
def _halves(tile):
    """The sums of both halves of every row, [C, 2]: each group knows one."""
    return gl.sum(tile.reshape([C, 2, SIZE // 2]), axis=2)


@gluon.jit
def _places():
    """Places in a state [K, V] of what is held transposed."""
    v, k = gl.arange(0, SIZE, layout=gl.SliceLayout(1, STATE)), gl.arange(0, SIZE, layout=gl.SliceLayout(0, STATE))
    return k[None, :] * SIZE + v[:, None]


@gluon.jit
def _compute(shared, tensors, rows, numbers, ENDS: gl.constexpr, DECAY: gl.constexpr):
    buffers, g, drs, sums, barriers = shared
    k_rows, do_rows, p_rows, lines, t_rows, q_rows, u_rows, v_rows, xs = buffers
    full, empty, early, late, free, summed, taken = barriers
    leaving, end, dq, dk, dv, d_decay = tensors
    dq_rows, dk_rows, dv_rows = rows
    begin, count, h, scale, H = numbers
    dtype: gl.constexpr = k_rows.dtype
    at_state = (gl.program_id(0).to(gl.int64) * H + h) * SIZE * SIZE
    mine = (begin * H + h) * SIZE
    row, col = gl.arange(0, C, layout=gl.SliceLayout(1, SCORES)), gl.arange(0, C, layout=gl.SliceLayout(0, SCORES))
    chunks = gl.cdiv(count, C)
    grad = gl.zeros([SIZE, SIZE], gl.float32, STATE)
    if leaving is not None:
        grad = gl.load(leaving + at_state + _places())
    for step in range(chunks):
        i = chunks - 1 - step
        stage = step % AHEAD
        zero = step >> 20  # the compiler does not know: addresses that never change it keeps in registers, and spills
        cut = count - i * C < C
        kc, doc, pc = k_rows.index(stage), do_rows.index(stage), p_rows.index(stage)
        tc, qc, uc = t_rows.index(zero), q_rows.index(zero), u_rows.index(zero)
        x, gc, drc = xs.index(zero), g.index(zero), drs.index(zero)
        given = g._reinterpret(dtype, [2, C, SIZE], SHARED)  # dq and dk take its place
        dq_given, dk_given = given.index(zero), given.index(zero + 1)
        betas, passed = lines.index(stage).slice(0, C), lines.index(stage).slice(C, C)
        from_starts, to_ends = lines.index(stage).slice(2 * C, C), lines.index(stage).slice(3 * C, C)
        before = grad.to(dtype)
        mbarrier.wait(full.index(stage), step // AHEAD & 1)
        if DECAY != NONE:
            grad *= from_starts.slice(C - 1, 1).load(gl.SliceLayout(1, STATE))[:, None]
        if cut:
            clear_tail(kc, i, count, WIDE_ROWS)
            clear_tail(doc, i, count, WIDE_ROWS)
            clear_tail(pc, i, count, ROWS)
            fence_async_shared()
            barrier()
        nothing = gl.zeros([SIZE, C], gl.float32, COLUMNS)
        du = warpgroup_mma(
            gl.convert_layout(before, COLUMNS_LEFT), kc.permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        tma.store_wait(0)  # what was given of the chunk before has been read
        barrier()
        gc.store(before)
        reading = gl.full([C], scale, gl.float32, gl.SliceLayout(0, STATE_LEFT))
        if DECAY != NONE:
            reading *= from_starts.load(gl.SliceLayout(0, STATE_LEFT))
        read = (doc.permute((1, 0)).load(STATE_LEFT).to(gl.float32) * reading[None, :]).to(dtype)
        du = warpgroup_mma_wait(0, deps=(du,))
        if DECAY != NONE:
            du *= to_ends.load(gl.SliceLayout(0, COLUMNS))[None, :]
        du = warpgroup_mma(doc.permute((1, 0)), pc, du, is_async=True)
        mbarrier.wait(early, step & 1)
        if cut:
            clear_tail(tc, i, count, ROWS)
            clear_tail(qc, i, count, WIDE_ROWS)
            fence_async_shared()
            barrier()
        grad = warpgroup_mma(read, qc, grad, is_async=True)
        du = warpgroup_mma_wait(1, deps=(du,))
        dr = warpgroup_mma(gl.convert_layout(du.to(dtype), COLUMNS_LEFT), tc, nothing, use_acc=False, is_async=True)
        forget = -betas.load(gl.SliceLayout(0, COLUMNS))
        if DECAY != NONE:
            forget *= from_starts.load(gl.SliceLayout(0, COLUMNS))
        dr, grad = warpgroup_mma_wait(0, deps=(dr, grad))
        drc.permute((1, 0)).store(dr.to(dtype))
        grad = warpgroup_mma(gl.convert_layout((forget[None, :] * dr).to(dtype), STATE_LEFT), kc, grad, is_async=True)
        mbarrier.wait(late, step & 1)
        if cut:
            clear_tail(uc, i, count, WIDE_ROWS)
        fence_async_shared()
        barrier()

        # The second part: G of what leaves the chunk and dr have come from the other group, too.
        none = gl.zeros([C, C], gl.float32, SCORES)
        near = warpgroup_mma(doc, uc.permute((1, 0)), none, use_acc=False, is_async=True)
        erased_near = warpgroup_mma(drc, uc.permute((1, 0)), none, use_acc=False, is_async=True)
        zeros = gl.zeros([C, SIZE], gl.float32, TOKENS)
        dqc = warpgroup_mma(doc, x, zeros, use_acc=False, is_async=True)
        w = warpgroup_mma(drc, x, zeros, use_acc=False, is_async=True)
        near, erased_near, grad = warpgroup_mma_wait(2, deps=(near, erased_near, grad))
        if DECAY != NONE:
            weights = gl.exp(
                gl.minimum(
                    passed.load(gl.SliceLayout(1, SCORES))[:, None] - passed.load(gl.SliceLayout(0, SCORES))[None, :],
                    0.0,
                )
            )
            near *= weights
            erased_near *= weights
        pc.store(gl.where(row[:, None] >= col[None, :], near * scale, 0.0).to(dtype))
        tc.store(gl.where(row[:, None] > col[None, :], erased_near, 0.0).to(dtype))
        dkc = warpgroup_mma(uc, gc, zeros, use_acc=False, is_async=True)
        dqc, w, dkc = warpgroup_mma_wait(0, deps=(dqc, w, dkc))
        fence_async_shared()
        barrier()

        if DECAY == NONE:
            dqc *= scale
        else:
            from_start = from_starts.load(gl.SliceLayout(1, TOKENS))
            dqc *= (scale * from_start)[:, None]
            w *= from_start[:, None]
            dkc *= to_ends.load(gl.SliceLayout(1, TOKENS))[:, None]
        dqc = warpgroup_mma(pc, kc, dqc, is_async=True)
        w = warpgroup_mma(tc, kc, w, is_async=True)
        if d_decay is not None:
            carried = _halves(kc.load(TOKENS).to(gl.float32) * dkc)
        dkc = warpgroup_mma(pc.permute((1, 0)), qc, dkc, is_async=True)
        forgets = (
            tc.permute((1, 0)).load(TOKENS_LEFT).to(gl.float32) * -betas.load(gl.SliceLayout(0, TOKENS_LEFT))[None, :]
        )
        dkc = warpgroup_mma(forgets.to(dtype), kc, dkc, is_async=True)
        beta = betas.load(gl.SliceLayout(1, TOKENS))[:, None]
        mbarrier.wait(taken, (step & 1) ^ 1)
        if d_decay is not None:
            total = from_starts.slice(C - 1, 1).load(gl.SliceLayout(1, TOKENS))[:, None]
            for half in gl.static_range(2):
                part = x.slice(half * C, C, dim=0).load(TOKENS).to(gl.float32)
                carried += _halves(total * (part * gc.slice(half * C, C, dim=0).load(TOKENS)))
            sums.index(2).permute((1, 0)).store(carried)
        drv = drc.load(TOKENS).to(gl.float32)
        for_beta = _halves(drv * v_rows.index(zero).load(TOKENS).to(gl.float32))
        drc.store((beta * drv).to(dtype))
        barrier()
        dqc = warpgroup_mma_wait(3, deps=(dqc,))
        dq_given.store(dqc.to(dtype))
        if d_decay is not None:
            change = _halves(qc.load(TOKENS).to(gl.float32) * dqc)
        w = warpgroup_mma_wait(2, deps=(w,))
        k_w = kc.load(TOKENS).to(gl.float32) * w
        sums.index(0).permute((1, 0)).store(for_beta - _halves(k_w))
        if d_decay is not None:
            change -= _halves(2 * beta * k_w)
        dkc = warpgroup_mma_wait(0, deps=(dkc,))
        dkc -= beta * w
        dk_given.store(dkc.to(dtype))
        if d_decay is not None:
            sums.index(1).permute((1, 0)).store(change - _halves(kc.load(TOKENS).to(gl.float32) * dkc))
        fence_async_shared()
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        mbarrier.arrive(free, count=1)
        mbarrier.arrive(summed, count=1)
        send_rows(dq + mine, dq_rows, dq_given, begin, i, count, h * SIZE, H * SIZE, WIDE_ROWS)
        send_rows(dk + mine, dk_rows, dk_given, begin, i, count, h * SIZE, H * SIZE, WIDE_ROWS)
        send_rows(dv + mine, dv_rows, drc, begin, i, count, h * SIZE, H * SIZE, WIDE_ROWS)
    tma.store_wait(0)
    if ENDS:
        gl.store(end + at_state + _places(), grad)


@gluon.jit(do_not_specialize=["FIRST_HEAD"])
def _walk_gradients(
    q,  # rows of [tokens, H // G, SIZE]
    k,
    v,  # rows of [tokens, H, SIZE]
    do,
    u,  # rows of [tokens, HEADS, SIZE]
    gates,  # [chunks, H, 4, C] fp32: beta, b, e^b, e^{b_C - b}
    wy,  # rows of [tokens, H, C]: T
    scores,  # rows of [tokens, H, C]: what each token reads of its chunk, scaled
    states,  # rows of [chunks, HEADS, V, K]: the state X that enters each chunk, transposed
    leaving,  # [M, H, SIZE, SIZE] fp32, or None: zero
    end,  # likewise, if ENDS: the gradient of the state at the tile's start
    dq,  # [tokens, H, SIZE]
    dq_rows,  # rows of it
    dk,
    dk_rows,
    dv,
    dv_rows,
    d_decay,  # [tokens, H], if the decay is learned
    d_beta,  # [tokens, H]
    start,
    length,
    first_chunk,  # [M]
    scale,
    H,
    G,
    FIRST_HEAD,
    ENDS: gl.constexpr,
    DECAY: gl.constexpr,
):
    await_previous()
    tile, row, HEADS = gl.program_id(0), gl.program_id(1), gl.num_programs(1)
    h = FIRST_HEAD + row
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    chunk = gl.load(first_chunk + tile)
    dtype: gl.constexpr = k.dtype
    k_rows = gl.allocate_shared_memory(dtype, [AHEAD, C, SIZE], SHARED)
    do_rows = gl.allocate_shared_memory(dtype, [AHEAD, C, SIZE], SHARED)
    p_rows = gl.allocate_shared_memory(dtype, [AHEAD, C, C], SHARED)
    lines = gl.allocate_shared_memory(gl.float32, [AHEAD, 4 * C], GATES_SHARED)
    t_rows = gl.allocate_shared_memory(dtype, [1, C, C], SHARED)
    q_rows = gl.allocate_shared_memory(dtype, [1, C, SIZE], SHARED)
    u_rows = gl.allocate_shared_memory(dtype, [1, C, SIZE], SHARED)
    v_rows = gl.allocate_shared_memory(dtype, [1, C, SIZE], SHARED)
    xs = gl.allocate_shared_memory(dtype, [1, SIZE, SIZE], SHARED)
    g = gl.allocate_shared_memory(dtype, [1, SIZE, SIZE], SHARED)
    drs = gl.allocate_shared_memory(dtype, [1, C, SIZE], SHARED)
    sums = gl.allocate_shared_memory(gl.float32, [3, 2, C], SUMS)
    full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    others = gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(AHEAD):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=1)
    for n in gl.static_range(5):
        mbarrier.init(others.index(n), count=1)
    early, late, free, summed, taken = (
        others.index(0),
        others.index(1),
        others.index(2),
        others.index(3),
        others.index(4),
    )
    buffers = (k_rows, do_rows, p_rows, lines, t_rows, q_rows, u_rows, v_rows, xs)
    shared = (buffers, g, drs, sums, (full, empty, early, late, free, summed, taken))
    tensors = (leaving, end, dq, dk, dv, d_decay)
    rows = (dq_rows, dk_rows, dv_rows)
    sources = (q, k, v, do, u, wy, scores, states, gates)
    gl.warp_specialize(
        [
            (_compute, (shared, tensors, rows, (begin, count, h, scale, H), ENDS, DECAY)),
            (_fetch, (sources, buffers, (full, empty, early, late, free), (begin, count, chunk, h, row, H, HEADS, G))),
            (_add_up, (sums, summed, taken, d_decay, d_beta, (begin, count, h, H))),
        ],
        [1, 1],
        [24, 24],
    )


def walk_gradients(
    tiles: Tiles,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    u: Tensor,
    gates: Tensor,
    wy: Tensor,
    scores: Tensor,
    states: Tensor,
    leaving: Tensor | None,
    end: Tensor | None,
    found: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor],
    scale: float,
    first_chunk: Tensor,
    decay: int,
    heads: range,
) -> None:
    """Fills `found` = dq, dk [B, T, H, K], dv, d_decay and d_beta for some heads; see delta_costates and delta_grads."""
    dq, dk, dv, d_decay, d_beta = found
    given = (rows_of(x, SIZE.value) for x in (q, k, v, do, u))
    made = (y for d in (dq, dk, dv) for y in (d, rows_of(d, SIZE.value)))
    rows = states.shape[0] * states.shape[1] * SIZE.value
    states_rows = TensorDescriptor(states, [rows, SIZE.value], [SIZE.value, 1], [SIZE.value, SIZE.value], SHARED.value)
    launch(
        _walk_gradients, (tiles.count, len(heads)),
        *given, gates, rows_of(wy, C.value), rows_of(scores, C.value), states_rows, leaving, end, *made, d_decay,
        d_beta, tiles.start, tiles.length, first_chunk, scale, v.shape[2], v.shape[2] // k.shape[2], heads.start,
        ENDS=end is not None, DECAY=decay, num_warps=8, overlaps=True,
    )  # fmt: skip
