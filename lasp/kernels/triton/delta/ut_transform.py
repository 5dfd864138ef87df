"""The delta rule within chunks of 64 tokens: T = (I + L)^{-1} with L_ij = beta_i (k_i·k_j) e^{b_i - b_j} for j < i.

With it a chunk's pseudo-values are u = T diag(beta) (V - diag(e^b) K X), ordinary attention's values (math §2).
L is cut into blocks of 16: those on the diagonal are inverted by elimination, the others follow by block substitution.
One warp does a chunk; everything is fp32, since the chain of substitutions must not lose precision.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import block_of, next_power_of_2
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.shared.decay import DIAGONAL, LOG2_E, NONE, SCALAR, scalar_decay, sums_dtype
from lasp.kernels.triton.shared.tiles import CHUNK

SUB = tl.constexpr(16)


@triton.jit
def _eliminated(t, a, column):
    """One step of Gauss elimination on (I + a) t = I: row `column` of t is final, and leaves all rows below."""
    i = tl.arange(0, SUB)
    weights = tl.sum(tl.where(i[None, :] == column, a, 0.0), axis=1)
    row = tl.sum(tl.where(i[:, None] == column, t, 0.0), axis=0)
    return t - weights[:, None] * row[None, :]


@triton.jit
def _weights(s, beta_row, b_row, b_col, SCALARS: tl.constexpr):
    """A block of L from a block of K Kᵀ."""
    s *= beta_row[:, None]
    if SCALARS:  # in blocks on the diagonal the part above it is dropped later: keep its exponent harmless
        s *= tl.exp(tl.minimum((b_row[:, None] - b_col[None, :]).to(tl.float32), 0.0))
    return s


@triton.jit
def _ut_transform(
    k,  # [tokens, Hq, K]
    decay,  # [H] or [tokens, H]
    beta,  # [tokens, H]
    products,  # [tokens, H, 64] fp32: k_i·(e^{b_i - b_j} k_j), if DIAGONAL; else they are computed here
    ut,  # [tokens, H, 64]: the row of T that belongs to a token
    gates,  # [chunks, H, 4, 64]: beta, b, e^b and e^{b_C - b}
    log2_bounds,  # [chunks, H]: see Terms, if there are scalar gates
    start, length, H, G,
    K: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    SCALARS: tl.constexpr = DECAY != NONE and DECAY != DIAGONAL
    chunk, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, count = tl.load(start + chunk), tl.load(length + chunk)
    i = tl.arange(0, SUB)
    n0, n1, n2, n3 = begin + i, begin + (i + SUB), begin + (i + 2 * SUB), begin + (i + 3 * SUB)
    h0, h1, h2, h3 = i < count, i + SUB < count, i + 2 * SUB < count, i + 3 * SUB < count

    s00 = tl.zeros([SUB, SUB], tl.float32)
    s10, s11, s20, s21, s22 = s00, s00, s00, s00, s00
    s30, s31, s32, s33 = s00, s00, s00, s00
    if DECAY == DIAGONAL:
        s00 = _load_block(products, n0, h0, 0, h, H)
        s10 = _load_block(products, n1, h1, 0, h, H)
        s11 = _load_block(products, n1, h1, 1, h, H)
        s20 = _load_block(products, n2, h2, 0, h, H)
        s21 = _load_block(products, n2, h2, 1, h, H)
        s22 = _load_block(products, n2, h2, 2, h, H)
        s30 = _load_block(products, n3, h3, 0, h, H)
        s31 = _load_block(products, n3, h3, 1, h, H)
        s32 = _load_block(products, n3, h3, 2, h, H)
        s33 = _load_block(products, n3, h3, 3, h, H)
    else:
        for block in range(tl.cdiv(K, BK)):
            cols = block * BK + tl.arange(0, BK)
            k0 = _load_keys(k, n0, h0, cols, h // G, H // G, K)
            k1 = _load_keys(k, n1, h1, cols, h // G, H // G, K)
            k2 = _load_keys(k, n2, h2, cols, h // G, H // G, K)
            k3 = _load_keys(k, n3, h3, cols, h // G, H // G, K)
            t0, t1, t2, t3 = tl.trans(k0), tl.trans(k1), tl.trans(k2), tl.trans(k3)
            s00 = tl.dot(k0, t0, s00, input_precision=PRECISION)
            s10 = tl.dot(k1, t0, s10, input_precision=PRECISION)
            s11 = tl.dot(k1, t1, s11, input_precision=PRECISION)
            s20 = tl.dot(k2, t0, s20, input_precision=PRECISION)
            s21 = tl.dot(k2, t1, s21, input_precision=PRECISION)
            s22 = tl.dot(k2, t2, s22, input_precision=PRECISION)
            s30 = tl.dot(k3, t0, s30, input_precision=PRECISION)
            s31 = tl.dot(k3, t1, s31, input_precision=PRECISION)
            s32 = tl.dot(k3, t2, s32, input_precision=PRECISION)
            s33 = tl.dot(k3, t3, s33, input_precision=PRECISION)

    beta0 = tl.load(beta + n0 * H + h, mask=h0, other=0.0).to(tl.float32)
    beta1 = tl.load(beta + n1 * H + h, mask=h1, other=0.0).to(tl.float32)
    beta2 = tl.load(beta + n2 * H + h, mask=h2, other=0.0).to(tl.float32)
    beta3 = tl.load(beta + n3 * H + h, mask=h3, other=0.0).to(tl.float32)
    sums: tl.constexpr = gates.dtype.element_ty
    b0 = tl.zeros([SUB], sums)
    b1, b2, b3 = b0, b0, b0
    total = 0.0
    if SCALARS:
        g0, g1 = (
            scalar_decay(decay, n0, h0, h, H, DECAY).to(sums),
            scalar_decay(decay, n1, h1, h, H, DECAY).to(sums),
        )
        g2, g3 = (
            scalar_decay(decay, n2, h2, h, H, DECAY).to(sums),
            scalar_decay(decay, n3, h3, h, H, DECAY).to(sums),
        )
        b0, b1 = tl.cumsum(g0, axis=0), tl.cumsum(g1, axis=0) + tl.sum(g0, axis=0)
        b2 = tl.cumsum(g2, axis=0) + (tl.sum(g0, axis=0) + tl.sum(g1, axis=0))
        b3 = tl.cumsum(g3, axis=0) + (tl.sum(g0, axis=0) + tl.sum(g1, axis=0) + tl.sum(g2, axis=0))
        total = tl.sum(g0, axis=0) + tl.sum(g1, axis=0) + tl.sum(g2, axis=0) + tl.sum(g3, axis=0)
    slot = gates + (chunk * H + h) * 16 * SUB
    _store_gates(slot, beta0, b0, total, SCALARS)
    _store_gates(slot + SUB, beta1, b1, total, SCALARS)
    _store_gates(slot + 2 * SUB, beta2, b2, total, SCALARS)
    _store_gates(slot + 3 * SUB, beta3, b3, total, SCALARS)

    if SCALARS:
        growth = log2_growth(_diagonal(s00), beta0) + log2_growth(_diagonal(s11), beta1)
        growth += log2_growth(_diagonal(s22), beta2) + log2_growth(_diagonal(s33), beta3)
        tl.store(log2_bounds + chunk * H + h, total * LOG2_E + tl.sum(growth, axis=0))

    below = i[:, None] > i[None, :]
    d0 = tl.where(below, _weights(s00, beta0, b0, b0, SCALARS), 0.0)
    d1 = tl.where(below, _weights(s11, beta1, b1, b1, SCALARS), 0.0)
    d2 = tl.where(below, _weights(s22, beta2, b2, b2, SCALARS), 0.0)
    d3 = tl.where(below, _weights(s33, beta3, b3, b3, SCALARS), 0.0)
    t00 = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    t11, t22, t33 = t00, t00, t00
    for column in range(SUB - 1):
        t00, t11 = _eliminated(t00, d0, column), _eliminated(t11, d1, column)
        t22, t33 = _eliminated(t22, d2, column), _eliminated(t33, d3, column)

    a10, a21, a32 = (
        _weights(s10, beta1, b1, b0, SCALARS),
        _weights(s21, beta2, b2, b1, SCALARS),
        _weights(s32, beta3, b3, b2, SCALARS),
    )
    a20, a31, a30 = (
        _weights(s20, beta2, b2, b0, SCALARS),
        _weights(s31, beta3, b3, b1, SCALARS),
        _weights(s30, beta3, b3, b0, SCALARS),
    )
    t10 = -tl.dot(t11, tl.dot(a10, t00, input_precision=FINE), input_precision=FINE)
    t21 = -tl.dot(t22, tl.dot(a21, t11, input_precision=FINE), input_precision=FINE)
    t32 = -tl.dot(t33, tl.dot(a32, t22, input_precision=FINE), input_precision=FINE)
    r20 = tl.dot(a21, t10, tl.dot(a20, t00, input_precision=FINE), input_precision=FINE)
    r31 = tl.dot(a32, t21, tl.dot(a31, t11, input_precision=FINE), input_precision=FINE)
    t20 = -tl.dot(t22, r20, input_precision=FINE)
    t31 = -tl.dot(t33, r31, input_precision=FINE)
    r30 = tl.dot(a31, t10, tl.dot(a30, t00, input_precision=FINE), input_precision=FINE)
    r30 = tl.dot(a32, t20, r30, input_precision=FINE)
    t30 = -tl.dot(t33, r30, input_precision=FINE)

    zero = tl.zeros([SUB, SUB], tl.float32)
    _store_row(ut, n0, h0, h, H, t00, zero, zero, zero)
    _store_row(ut, n1, h1, h, H, t10, t11, zero, zero)
    _store_row(ut, n2, h2, h, H, t20, t21, t22, zero)
    _store_row(ut, n3, h3, h, H, t30, t31, t32, t33)


@triton.jit
def log2_growth(squares, beta):
    """By how much a state may grow with each token, as its norm: log2 of |I - beta k kᵀ|, given |k|²."""
    return tl.log2(tl.maximum(tl.abs(1.0 - beta * squares), 1.0))


@triton.jit
def _diagonal(block):
    i = tl.arange(0, SUB)
    return tl.sum(tl.where(i[:, None] == i[None, :], block, 0.0), axis=1)


@triton.jit
def _store_gates(at, beta, b, total, SCALARS: tl.constexpr):
    at += tl.arange(0, SUB)
    tl.store(at, beta)
    if SCALARS:
        tl.store(at + 4 * SUB, b)
        tl.store(at + 8 * SUB, tl.exp(b.to(tl.float32)))
        tl.store(at + 12 * SUB, tl.exp(tl.minimum((total - b).to(tl.float32), 0.0)))


@triton.jit
def _load_keys(k, tokens, here, cols, head, heads, K: tl.constexpr):
    at = ((tokens * heads + head) * K)[:, None] + cols[None, :]
    return tl.load(k + at, mask=here[:, None] & (cols < K)[None, :], other=0.0)


@triton.jit
def _load_block(products, tokens, here, column, h, H):
    at = ((tokens * H + h) * 4 * SUB)[:, None] + tl.arange(0, SUB)[None, :]
    return tl.load(products + at + column * SUB, mask=here[:, None], other=0.0)


@triton.jit
def _store_row(ut, tokens, here, h, H, t0, t1, t2, t3):
    at = ut + ((tokens * H + h) * 4 * SUB)[:, None] + tl.arange(0, SUB)[None, :]
    dtype = ut.dtype.element_ty
    tl.store(at, t0.to(dtype), mask=here[:, None])
    tl.store(at + SUB, t1.to(dtype), mask=here[:, None])
    tl.store(at + 2 * SUB, t2.to(dtype), mask=here[:, None])
    tl.store(at + 3 * SUB, t3.to(dtype), mask=here[:, None])


def ut_transform(
    chunks: Tiles, k: Tensor, decay: Tensor | None, beta: Tensor, products: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """T [B, T, H, 64] in `dtype`, the row of each token in its chunk's inverse, gates [chunks, H, 4, 64] in
    sums_dtype(k): beta, the log decay b from the chunk's start up to each token (with it), e^b and e^{b_C - b} (with a
    diagonal decay beta alone; `products` then are k_i·(e^{b_i - b_j} k_j), [B, T, H, 64]), and, with scalar ones, the
    bounds of Terms. Places without a token have beta = 0 and do not decay. `chunks` are tiles of 64 tokens."""
    assert chunks.size == CHUNK
    (batch, tokens, heads), (q_heads, key_dim) = beta.shape, k.shape[2:]
    ut = k.new_empty(batch, tokens, heads, CHUNK, dtype=dtype)
    gates = k.new_empty(chunks.count, heads, 4, CHUNK, dtype=sums_dtype(k))
    scalars = Decay.of(decay) in (Decay.CONSTANT, Decay.SCALAR)
    log2_bounds = k.new_empty(chunks.count, heads, dtype=torch.float32) if scalars else None
    launch(
        _ut_transform, (chunks.count, heads),
        k, decay, beta, products, ut, gates, log2_bounds, chunks.start, chunks.length, heads, heads // q_heads,
        K=key_dim, BK=min(64, block_of(key_dim)), DECAY=Decay.of(decay).value,
        PRECISION="ieee" if k.dtype == torch.float32 else "tf32", FINE="tf32x3", num_warps=1, num_stages=2,
    )  # fmt: skip
    return ut, gates, log2_bounds


@triton.jit
def _scores(
    q,  # [tokens, Hq, K]
    k,
    gates,
    scores,  # [tokens, H, 64]
    start, length, scale, H, G,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, count = tl.load(start + chunk), tl.load(length + chunk)
    i = tl.arange(0, C)
    here = i < count
    q += (begin * (H // G) + h // G) * K
    k += (begin * (H // G) + h // G) * K
    dtype = scores.dtype.element_ty
    p = tl.zeros([C, C], tl.float32)
    for block in tl.static_range((K + BK - 1) // BK):
        cols = block * BK + tl.arange(0, BK)
        at = (i * (H // G * K))[:, None] + cols[None, :]
        inside = here[:, None] & (cols < K)[None, :]
        qc = tl.load(q + at, mask=inside, other=0.0).to(dtype)
        kc = tl.load(k + at, mask=inside, other=0.0).to(dtype)
        p = tl.dot(qc, tl.trans(kc), p, input_precision=PRECISION)
    p *= scale
    if DECAY == SCALAR:
        b = tl.load(gates + (chunk * H + h) * 4 * C + C + i)
        p *= tl.exp(tl.minimum((b[:, None] - b[None, :]).to(tl.float32), 0.0))
    p = tl.where(i[:, None] >= i[None, :], p, 0.0)
    tl.store(scores + ((begin + i) * H + h)[:, None] * C + i[None, :], p.to(dtype), mask=here[:, None])


def chunk_scores(
    chunks: Tiles, q: Tensor, k: Tensor, gates: Tensor, decay: int, ut: Tensor, scale: float, precision: str
) -> Tensor:
    """P [B, T, H, 64], scaled: what each token reads of those of its chunk up to itself."""
    heads, (q_heads, key_dim) = ut.shape[2], q.shape[2:]
    scores = torch.empty_like(ut)
    launch(
        _scores, (chunks.count, heads),
        q, k, gates, scores, chunks.start, chunks.length, scale, heads, heads // q_heads,
        K=key_dim, BK=min(128, max(16, next_power_of_2(key_dim))), C=CHUNK, DECAY=decay,
        PRECISION=precision, num_warps=4,
    )  # fmt: skip
    return scores
