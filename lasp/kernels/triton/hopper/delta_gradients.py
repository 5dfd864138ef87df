"""What the delta rule's reverse scan for Hopper does with a chunk to give all its gradients (see delta.gradients).

Given the state X that enters the chunk, G of what leaves it, u and dr, all in shared memory:

    dq = e^b do Xᵀ + P' k        w = e^b dr Xᵀ + N k        dk = e^{b_C - b} u Gᵀ + P'ᵀ q - Nᵀ (beta k) - beta w
    P'_ij = e_ij (do_i·u_j), j <= i        N_ij = e_ij (dr_i·u_j), j < i        e_ij = e^{b_i - b_j}        dv = beta dr

Each group of warps finds its share of every row. A warp of its own adds up what all know of the gradients of beta and
of the decay.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lasp.kernels.triton.hopper.delta_shared import left_of, tokens_layout, warp_groups
from lasp.kernels.triton.hopper.shared import C, barrier, whole_decay
from lasp.kernels.triton.shared.decay import NONE, SHUT

SUMS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
PAIRS = gl.constexpr(gl.BlockedLayout([2, 2], [1, 32], [1, 1], [1, 0]))  # [groups, C] in one warp
PAIR = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))  # [C], likewise


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def add_up(sums, ring, decay, d_decay, d_beta, numbers, ADD: gl.constexpr):
    """The gradients of beta and of the decay, chunk by chunk, from what groups of warps know of them, and, if ADD, from
    what is there."""
    begin, count, h, H = numbers
    chunks = gl.cdiv(count, C)
    for step in range(chunks):
        i = chunks - 1 - step
        ring.wait(step)
        for_beta = gl.convert_layout(gl.sum(sums.index(0).load(PAIRS), axis=0), PAIR)
        if d_decay is not None:
            change = gl.convert_layout(gl.sum(sums.index(1).load(PAIRS), axis=0), PAIR)
            carried = gl.sum(gl.sum(sums.index(2).load(PAIRS), axis=0), axis=0)
        barrier()
        ring.release(step)
        place = i * C + gl.arange(0, C, layout=PAIR)
        at = (begin + place) * H + h
        if ADD:
            for_beta += gl.load(d_beta + at, mask=place < count, other=0.0).to(gl.float32)
        gl.store(d_beta + at, for_beta.to(d_beta.dtype.element_ty), mask=place < count)
        if d_decay is not None:
            dg = gl.associative_scan(change, 0, _add, reverse=True) + carried
            g = gl.load(decay + at, mask=place < count, other=0.0).to(gl.float32)
            dg = gl.where(g <= SHUT, 0.0, dg)
            if ADD:
                dg += gl.load(d_decay + at, mask=place < count, other=0.0).to(gl.float32)
            gl.store(d_decay + at, dg.to(d_decay.dtype.element_ty), mask=place < count)


@gluon.jit
def _row_sums(tile, GROUPS: gl.constexpr):
    """The sums of the pieces of every row, [GROUPS, C]: each group of warps knows one."""
    return gl.sum(tile.reshape([C, GROUPS, tile.shape[1] // GROUPS]), axis=2).permute((1, 0))


@gluon.jit
def _columns(buffer, piece: gl.constexpr, PIECE: gl.constexpr):
    if buffer.shape[1] == PIECE:
        return buffer
    else:
        return buffer.slice(piece * PIECE, PIECE, dim=1)


@gluon.jit
def stage_gradients(
    grad, chunk_rows, gates, given, sums, ring, step, scale,
    K: gl.constexpr, V: gl.constexpr, LEARNED: gl.constexpr, DECAY: gl.constexpr,
):  # fmt: skip
    """The second part of a chunk: dq may take the place of G, and dk what is left of it; dv takes that of dr."""
    GROUPS: gl.constexpr = warp_groups(K, V)
    PIECE: gl.constexpr = 128 if K > 128 else K  # columns of dq, w and dk that registers hold at once
    LAST: gl.constexpr = K // PIECE - 1
    SCORES: gl.constexpr = tokens_layout(K, V, C)
    KEYS: gl.constexpr = tokens_layout(K, V, PIECE)  # [C, PIECE]
    VALUES: gl.constexpr = tokens_layout(K, V, V)  # [C, V]
    KEYS_LEFT: gl.constexpr = left_of(KEYS)
    dq_out, dk_out = given
    qc, kc, vc, doc, uc, drc, x, g, pc, tc = chunk_rows
    betas, passed, from_starts, to_ends = gates
    dtype: gl.constexpr = kc.dtype
    row, col = gl.arange(0, C, layout=gl.SliceLayout(1, SCORES)), gl.arange(0, C, layout=gl.SliceLayout(0, SCORES))
    none, nothing = gl.zeros([C, C], gl.float32, SCORES), gl.zeros([C, PIECE], gl.float32, KEYS)
    SUMMED: gl.constexpr = _row_sums(nothing, GROUPS).type.layout
    from_w = gl.zeros([GROUPS, C], gl.float32, SUMMED)
    change, carried = from_w, from_w
    near = warpgroup_mma(doc, uc.permute((1, 0)), none, use_acc=False, is_async=True)
    erased = warpgroup_mma(drc, uc.permute((1, 0)), none, use_acc=False, is_async=True)
    for piece in gl.static_range(LAST + 1):
        xp, gp = _columns(x, piece, PIECE), _columns(g, piece, PIECE)
        qp, kp = _columns(qc, piece, PIECE), _columns(kc, piece, PIECE)
        dq = warpgroup_mma(doc, xp, nothing, use_acc=False, is_async=True)
        w = warpgroup_mma(drc, xp, nothing, use_acc=False, is_async=True)
        if piece == 0:
            near, erased, grad = warpgroup_mma_wait(2, deps=(near, erased, grad))
            if DECAY != NONE:
                down = passed.load(gl.SliceLayout(1, SCORES))[:, None] - passed.load(gl.SliceLayout(0, SCORES))[None, :]
                weights = gl.exp(gl.minimum(down, 0.0))
                near *= weights
                erased *= weights
            pc.store(gl.where(row[:, None] >= col[None, :], near * scale, 0.0).to(dtype))
            tc.store(gl.where(row[:, None] > col[None, :], erased, 0.0).to(dtype))
        dk = warpgroup_mma(uc, gp, nothing, use_acc=False, is_async=True)
        dq, w, dk = warpgroup_mma_wait(0, deps=(dq, w, dk))
        if piece == 0:
            fence_async_shared()
            barrier()

        if DECAY == NONE:
            dq *= scale
        else:
            from_start = from_starts.load(gl.SliceLayout(1, KEYS))
            dq *= (scale * from_start)[:, None]
            w *= from_start[:, None]
            dk *= to_ends.load(gl.SliceLayout(1, KEYS))[:, None]
        dq = warpgroup_mma(pc, kp, dq, is_async=True)
        w = warpgroup_mma(tc, kp, w, is_async=True)
        if LEARNED:
            carried += _row_sums(kp.load(KEYS).to(gl.float32) * dk, GROUPS)
        dk = warpgroup_mma(pc.permute((1, 0)), qp, dk, is_async=True)
        forget = -betas.load(gl.SliceLayout(0, KEYS_LEFT))
        forgotten = (tc.permute((1, 0)).load(KEYS_LEFT).to(gl.float32) * forget[None, :]).to(dtype)
        dk = warpgroup_mma(forgotten, kp, dk, is_async=True)
        if LEARNED:
            total = whole_decay(from_starts, gl.SliceLayout(0, SUMMED))[None, :]
            for rows in gl.static_range(V // C):
                overlap = xp.slice(rows * C, C).load(KEYS).to(gl.float32) * gp.slice(rows * C, C).load(KEYS)
                carried += total * _row_sums(overlap, GROUPS)
        if piece == LAST:
            ring.acquire(step)
            if LEARNED:
                sums.index(2).store(carried)
            dr = drc.load(VALUES).to(gl.float32)
            for_beta = _row_sums(dr * vc.load(VALUES).to(gl.float32), GROUPS)
            drc.store((betas.load(gl.SliceLayout(1, VALUES))[:, None] * dr).to(dtype))
        beta = betas.load(gl.SliceLayout(1, KEYS))[:, None]
        barrier()  # this piece of G has been read
        dq = warpgroup_mma_wait(3, deps=(dq,))
        _columns(dq_out, piece, PIECE).store(dq.to(dtype))
        if LEARNED:
            change += _row_sums(qp.load(KEYS).to(gl.float32) * dq, GROUPS)
        w = warpgroup_mma_wait(2, deps=(w,))
        from_w += _row_sums(kp.load(KEYS).to(gl.float32) * w, GROUPS)
        if piece == LAST:
            sums.index(0).store(gl.convert_layout(for_beta, SUMMED) - from_w)
        dk = warpgroup_mma_wait(0, deps=(dk,)) - beta * w
        _columns(dk_out, piece, PIECE).store(dk.to(dtype))
        if LEARNED:
            change -= _row_sums(kp.load(KEYS).to(gl.float32) * dk, GROUPS)
    if LEARNED:
        sums.index(1).store(change - 2 * betas.load(gl.SliceLayout(0, SUMMED))[None, :] * from_w)
    fence_async_shared()
    return grad
