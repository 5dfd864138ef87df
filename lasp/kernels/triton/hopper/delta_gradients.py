"""What the delta rule's reverse scan for Hopper does with a chunk to give all its gradients (see delta.gradients).

Given the state X that enters the chunk, G of what leaves it, u and dr, all in shared memory:

    dq = e^b do Xᵀ + P' k        w = e^b dr Xᵀ + N k        dk = e^{b_C - b} u Gᵀ + P'ᵀ q - Nᵀ (beta k) - beta w
    P'_ij = e_ij (do_i·u_j), j <= i        N_ij = e_ij (dr_i·u_j), j < i        e_ij = e^{b_i - b_j}        dv = beta dr

Each group of warps finds its share of every row. A warp of its own adds up what all know of the gradients of beta and
of the decay.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from lasp.kernels.triton.hopper.delta_shared import left_of
from lasp.kernels.triton.hopper.layouts import C, mma_layout
from lasp.kernels.triton.hopper.products import add_product, product
from lasp.kernels.triton.hopper.shared import barrier, publish, whole_decay
from lasp.kernels.triton.shared.decay import NONE, SHUT

SUMS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
PAIRS = gl.constexpr(gl.BlockedLayout([2, 2], [1, 32], [1, 1], [1, 0]))  # [groups, C] in one warp
PAIR = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))  # [C], likewise


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def add_up(sums, ring, decay, d_decay, d_beta, place, ADD: gl.constexpr):
    """The gradients of beta and of the decay, chunk by chunk, from what groups of warps know of them, and, if ADD, from
    what is there."""
    count = place.length
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
        token = i * C + gl.arange(0, C, layout=PAIR)
        at, here = (place.begin + token) * place.H + place.h, token < count
        if ADD:
            for_beta += gl.load(d_beta + at, mask=here, other=0.0).to(gl.float32)
        gl.store(d_beta + at, for_beta.to(d_beta.dtype.element_ty), mask=here)
        if d_decay is not None:
            dg = gl.associative_scan(change, 0, _add, reverse=True) + carried
            g = gl.load(decay + at, mask=here, other=0.0).to(gl.float32)
            dg = gl.where(g <= SHUT, 0.0, dg)
            if ADD:
                dg += gl.load(d_decay + at, mask=here, other=0.0).to(gl.float32)
            gl.store(d_decay + at, dg.to(d_decay.dtype.element_ty), mask=here)


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
    grad, chunk, drc, g, gates, dq_out, dk_out, sums, ring, step, scale, LEARNED: gl.constexpr, DECAY: gl.constexpr
):  # fmt: skip
    """The second part of a chunk: dq may take the place of G, and dk what is left of it; dv takes that of dr."""
    GROUPS: gl.constexpr = gl.num_warps() // 4
    K: gl.constexpr = chunk.k.shape[1]
    V: gl.constexpr = chunk.do.shape[1]
    PIECE: gl.constexpr = 128 if K > 128 else K  # columns of dq, w and dk that registers hold at once
    LAST: gl.constexpr = K // PIECE - 1
    SCORES: gl.constexpr = mma_layout(C, gl.num_warps())
    KEYS: gl.constexpr = mma_layout(PIECE, gl.num_warps())  # [C, PIECE]
    VALUES: gl.constexpr = mma_layout(V, gl.num_warps())  # [C, V]
    KEYS_LEFT: gl.constexpr = left_of(KEYS)
    vc, doc, uc, pc, tc = chunk.v, chunk.do, chunk.u, chunk.scores, chunk.ut
    dtype: gl.constexpr = chunk.k.dtype
    row, col = gl.arange(0, C, layout=gl.SliceLayout(1, SCORES)), gl.arange(0, C, layout=gl.SliceLayout(0, SCORES))
    SUMMED: gl.constexpr = _row_sums(gl.zeros([C, PIECE], gl.float32, KEYS), GROUPS).type.layout
    from_w = gl.zeros([GROUPS, C], gl.float32, SUMMED)
    change, carried = from_w, from_w
    near = product(doc, uc.permute((1, 0)), SCORES)  # do uᵀ
    erased = product(drc, uc.permute((1, 0)), SCORES)  # dr uᵀ
    for piece in gl.static_range(LAST + 1):
        xp, gp = _columns(chunk.states, piece, PIECE), _columns(g, piece, PIECE)
        qp, kp = _columns(chunk.q, piece, PIECE), _columns(chunk.k, piece, PIECE)
        dq = product(doc, xp, KEYS)  # do Xᵀ
        w = product(drc, xp, KEYS)  # dr Xᵀ
        if piece == 0:
            near, erased, grad = warpgroup_mma_wait(2, deps=(near, erased, grad))
            if DECAY != NONE:
                b = gates.ln_passed
                down = b.load(gl.SliceLayout(1, SCORES))[:, None] - b.load(gl.SliceLayout(0, SCORES))[None, :]
                weights = gl.exp(gl.minimum(down, 0.0))
                near *= weights
                erased *= weights
            pc.store(gl.where(row[:, None] >= col[None, :], near * scale, 0.0).to(dtype))
            tc.store(gl.where(row[:, None] > col[None, :], erased, 0.0).to(dtype))
        dk = product(uc, gp, KEYS)  # u Gᵀ
        dq, w, dk = warpgroup_mma_wait(0, deps=(dq, w, dk))
        if piece == 0:
            publish()
        if DECAY == NONE:
            dq *= scale
        else:
            from_start = gates.from_start.load(gl.SliceLayout(1, KEYS))
            dq *= (scale * from_start)[:, None]
            w *= from_start[:, None]
            dk *= gates.to_end.load(gl.SliceLayout(1, KEYS))[:, None]
        dq = add_product(dq, pc, kp)  # e^b do Xᵀ + P' k
        w = add_product(w, tc, kp)  # e^b dr Xᵀ + N k
        if LEARNED:
            carried += _row_sums(kp.load(KEYS).to(gl.float32) * dk, GROUPS)
        dk = add_product(dk, pc.permute((1, 0)), qp)  # e^{b_C - b} u Gᵀ + P'ᵀ q
        forget = -gates.beta.load(gl.SliceLayout(0, KEYS_LEFT))
        forgotten = (tc.permute((1, 0)).load(KEYS_LEFT).to(gl.float32) * forget[None, :]).to(dtype)
        dk = add_product(dk, forgotten, kp)  # … - Nᵀ (beta k)
        if LEARNED:
            total = whole_decay(gates.from_start, gl.SliceLayout(0, SUMMED))[None, :]
            for rows in gl.static_range(V // C):
                overlap = xp.slice(rows * C, C).load(KEYS).to(gl.float32) * gp.slice(rows * C, C).load(KEYS)
                carried += total * _row_sums(overlap, GROUPS)
        if piece == LAST:
            ring.acquire(step)
            if LEARNED:
                sums.index(2).store(carried)
            dr = drc.load(VALUES).to(gl.float32)
            for_beta = _row_sums(dr * vc.load(VALUES).to(gl.float32), GROUPS)
            drc.store((gates.beta.load(gl.SliceLayout(1, VALUES))[:, None] * dr).to(dtype))
        beta = gates.beta.load(gl.SliceLayout(1, KEYS))[:, None]
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
        sums.index(1).store(change - 2 * gates.beta.load(gl.SliceLayout(0, SUMMED))[None, :] * from_w)
    fence_async_shared()
    return grad
