"""The gradients of a leaf's tokens, given those of its rows R, coefficients P, state S and transition A (see the
package): through W, U, T and the scores, one program for each leaf.

    dU = K̃ dS                dW = -K̃ dA - Fᵀ dR              dK̃ = U dSᵀ - W dAᵀ
    dF = -dR Wᵀ + dP β Tᵀ    dT = dW Zᵀ + dU (β V)ᵀ + Fᵀ dP β       Z = diag(β e^b) K
    dZ = Tᵀ dW               d(β V) = Tᵀ dU                  dL = -Tᵀ dT Tᵀ below the diagonal

A gate's gradient is the sum, from its token on, of what each b is worth: rows minus columns of F ⊙ dF and L ⊙ dL, and
the products of Z, R and K̃ with their gradients, so that what cancels was rounded once.
"""

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import block_of, warps_of
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.log_linear.tree import Tree
from lasp.kernels.triton.log_linear_delta.query_grads import QueryGrads
from lasp.kernels.triton.log_linear_delta.reads import load_state
from lasp.kernels.triton.log_linear_delta.terms import columns_of, load_gates
from lasp.kernels.triton.shared.decay import unless_shut
from lasp.kernels.triton.shared.rows import load_rows, store_rows


@triton.jit
def _gradients(
    q,  # [tokens, Hq, K]
    k,
    v,  # [tokens, H, V]
    decay,  # [tokens, H]
    ut,  # [tokens, H, C]
    scores,  # [tokens, H, C], scaled
    gates,  # [M, H, 4, C]: beta, b, e^b, e^{b_C - b}
    d_rows,  # [tokens, H, K]
    d_reads,  # [tokens, H, C]
    d_values,  # [tokens, H, V] fp32: what v gets in its leaf
    d_states,  # [M + P, H, K, V] fp32
    d_transitions,  # [M + P, H, K, K] fp32
    dq,  # [tokens, H, K]
    dk,  # [tokens, H, K]
    dv,  # [tokens, H, V]
    d_beta,  # [tokens, H]
    d_decay,  # [tokens, H]
    start, length, scale, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    leaf, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, count = tl.load(start + leaf), tl.load(length + leaf)
    c, kk = tl.arange(0, C), tl.arange(0, BK)
    here, tokens = c < count, begin + c
    work: tl.constexpr = ut.dtype.element_ty
    beta, b, from_start, to_end, total = load_gates(gates, leaf * H + h, c, C)
    t = load_rows(ut, begin, here, h, H, c, C)
    f = load_rows(scores, begin, here, h, H, c, C)
    tt, ft = tl.trans(t), tl.trans(f)
    kc = load_rows(k, begin, here, h // G, H // G, kk, K)
    k32 = kc.to(tl.float32)
    written = (k32 * to_end[:, None]).to(work)
    z = (k32 * (beta * from_start)[:, None]).to(work)
    w = tl.dot(t, z, input_precision=PRECISION).to(work)
    dr = load_rows(d_rows, begin, here, h, H, kk, K)
    dp = load_rows(d_reads, begin, here, h, H, c, C)

    # through A
    da = load_state(d_transitions, leaf * H + h, kk, kk, K, K)
    last = total * tl.sum(tl.sum(tl.where(kk[:, None] == kk[None, :], da, 0.0), axis=1), axis=0)  # of b_C
    da = da.to(work)
    d_written = -tl.dot(w, tl.trans(da), input_precision=PRECISION)
    dw = -tl.dot(ft, dr, tl.dot(written, da, input_precision=PRECISION), input_precision=PRECISION)
    dw = dw.to(work)
    dt = tl.dot(dw, tl.trans(z), input_precision=PRECISION)
    dz = tl.dot(tt, dw, input_precision=PRECISION)
    through = tl.dot(ft, dp, input_precision=PRECISION)
    d_betas = tl.sum(t.to(tl.float32) * through, axis=0)
    dt += through * beta[None, :]

    # through S
    for block in tl.static_range((V + BV - 1) // BV):
        vv = block * BV + tl.arange(0, BV)
        vc = load_rows(v, begin, here, h, H, vv, V).to(tl.float32)
        ds = load_state(d_states, leaf * H + h, kk, vv, K, V).to(work)
        values = (vc * beta[:, None]).to(work)
        u = tl.dot(t, values, input_precision=PRECISION).to(work)
        du = tl.dot(written, ds, input_precision=PRECISION).to(work)
        d_written = tl.dot(u, tl.trans(ds), d_written, input_precision=PRECISION)
        dt = tl.dot(du, tl.trans(values), dt, input_precision=PRECISION)
        d_scaled = tl.dot(tt, du, input_precision=PRECISION)
        d_betas += tl.sum(vc * d_scaled, axis=1)
        dvc = d_scaled * beta[:, None] + load_rows(d_values, begin, here, h, H, vv, V)
        store_rows(dv, dvc.to(dv.dtype.element_ty), begin, here, h, H, vv, V)

    # through the scores and T
    gap = (b[:, None] - b[None, :]).to(tl.float32)
    decays = tl.exp(tl.minimum(gap, 0.0))
    dp = (dp.to(tl.float32) * beta[None, :]).to(work)
    df = tl.dot(dp, tt, -tl.dot(dr, tl.trans(w), input_precision=PRECISION), input_precision=PRECISION)
    df = tl.where(c[:, None] >= c[None, :], df, 0.0)
    dl = tl.dot(dt.to(work), tt, input_precision=PRECISION).to(work)
    dl = tl.where(c[:, None] > c[None, :], -tl.dot(tt, dl, input_precision=PRECISION), 0.0) * decays
    keys = tl.dot(kc.to(work), tl.trans(kc.to(work)), input_precision=PRECISION)
    d_betas += tl.sum(dl * keys, axis=1)
    dl *= beta[:, None]
    of_pairs = df * f.to(tl.float32) + dl * keys
    change = tl.sum(of_pairs, axis=1) - tl.sum(of_pairs, axis=0)
    df = (df * decays * scale).to(work)
    qc = load_rows(q, begin, here, h // G, H // G, kk, K)
    read = tl.dot(df, kc.to(work), input_precision=PRECISION)
    from_rows = dr.to(tl.float32) * (scale * from_start)[:, None]
    store_rows(dq, (read + from_rows).to(dq.dtype.element_ty), begin, here, h, H, kk, K)
    change += tl.sum(qc.to(tl.float32) * from_rows, axis=1)
    from_end = tl.sum(k32 * d_written, axis=1) * to_end
    of_keys = tl.sum(k32 * dz, axis=1) * from_start
    d_betas += of_keys
    change += of_keys * beta - from_end
    last += tl.sum(from_end, axis=0)
    dkc = d_written * to_end[:, None] + dz * (beta * from_start)[:, None]
    dkc = tl.dot(tl.trans(df), qc.to(work), dkc, input_precision=PRECISION)
    dl = dl.to(work)
    dkc = tl.dot(dl, kc.to(work), dkc, input_precision=PRECISION)
    dkc = tl.dot(tl.trans(dl), kc.to(work), dkc, input_precision=PRECISION)
    store_rows(dk, dkc.to(dk.dtype.element_ty), begin, here, h, H, kk, K)
    tl.store(d_beta + tokens * H + h, d_betas.to(d_beta.dtype.element_ty), mask=here)
    dg = tl.sum(change, axis=0) - tl.cumsum(change, axis=0) + change + last
    g = tl.load(decay + tokens * H + h, mask=here, other=0.0)
    tl.store(d_decay + tokens * H + h, unless_shut(dg, g).to(d_decay.dtype.element_ty), mask=here)


def gradients(
    tree: Tree, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, ut: Tensor, scores: Tensor,
    gates: Tensor, grads: QueryGrads, d_states: Tensor, d_transitions: Tensor, scale: float, precision: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk [B, T, H, K] for every value head, dv, dbeta and the decay's."""
    (heads, value_dim), (q_heads, key_dim), tiles = v.shape[2:], k.shape[2:], tree.tiles
    dq, dk = (q.new_empty(*v.shape[:3], key_dim) for _ in range(2))
    made = dq, dk, v.new_empty(v.shape), beta.new_empty(beta.shape), decay.new_empty(decay.shape)
    launch(
        _gradients, (tiles.count, heads),
        q, k, v, decay, ut, scores, gates, grads.d_rows, grads.d_reads, grads.d_values, d_states, d_transitions, *made,
        tiles.start, tiles.length, scale, heads, heads // q_heads, K=key_dim, V=value_dim, BK=block_of(key_dim),
        BV=columns_of(value_dim, ut), C=ut.shape[-1], PRECISION=precision,
        num_warps=warps_of(key_dim, value_dim), num_stages=1,
    )  # fmt: skip
    return made
