"""Phase 3 backward with a diagonal decay: the gradients of one chunk, from the states before and after it.

With q̃, k̃, X̃, G̃ and h of rescale and dP = tril(do vᵀ):

    dq̃ = do X̃ᵀ + dP k̃        dk̃ = v G̃ᵀ + dPᵀ q̃        (dv: see outputs)
    dg_t = Σ_{i>=t} (q̃_i ⊙ dq̃_i - k̃_i ⊙ (dPᵀ q̃)_i) + Σ_{i<t} k̃_i ⊙ (v G̃ᵀ)_i + e^{(1 - 2h) b_C} rowsum(X̃ ⊙ G̃)

which is math §2 for one chunk, the boundary term rowsum(X ⊙ G) at its end written out so that little cancels. What does
appears twice with the same rounding: q̃, k̃ and dP are rounded before any of their uses. dq and dk take the places of
q̃ and k̃.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.diagonal.rescale import DiagonalConfig, Rescaled, chunk_of_program, load_half
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.shared.rows import load_decays, load_rows, store_rows


@triton.jit
def score_grads(
    v, do, token, here, h, H, V: tl.constexpr, BV: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """do vᵀ of a chunk, and its transpose from a product of its own, [C, C]."""
    C: tl.constexpr = here.shape[0]
    dp, dpt = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for at in range(0, V, BV):
        cols = at + tl.arange(0, BV)
        vc = load_rows(v, token, here, h, H, cols, V).to(OPERAND)
        doc = load_rows(do, token, here, h, H, cols, V).to(OPERAND)
        dp = tl.dot(doc, tl.trans(vc), dp, input_precision=PRECISION)
        dpt = tl.dot(vc, tl.trans(doc), dpt, input_precision=PRECISION)
    return dp, dpt


@triton.jit
def _gradients(
    q,  # [tokens, H, K]: q̃, then dq
    k,  # [tokens, H, K]: k̃, then dk
    v,  # [tokens, H, V]
    do,
    decay,  # [tokens, H, K]
    ln_ends,  # [slots, H, K] fp32
    ln_chunk_decay,  # [slots, H] fp32
    before,  # [slots, H, K, V]: X̃
    after,  # [slots, H, K, V]: G̃
    dg,  # [tokens, H, K]
    start, length, scale, CHUNKS, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, MAX_LN_DECAY: tl.constexpr,
    PRECISION: tl.constexpr, BY_PRODUCTS: tl.constexpr,
):  # fmt: skip
    i, h, tile = chunk_of_program(CHUNKS, H)
    begin, count = tl.load(start + tile), tl.load(length + tile)
    operand: tl.constexpr = k.dtype.element_ty
    exact: tl.constexpr = decay.dtype.element_ty == tl.bfloat16
    if i * C < count:
        first, second = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        here, token = i * C + tl.arange(0, C) < count, begin + i * C
        slot = (begin // C + tile + i) * H + h
        half = load_half(ln_chunk_decay, slot, MAX_LN_DECAY)
        dp, dpt = score_grads(v, do, token, here, h, H, V, BV, operand, PRECISION)
        lower, upper = (first >= second) & (half > 0.0), (first <= second) & (half > 0.0)
        dp, dpt = tl.where(lower, dp, 0.0).to(operand), tl.where(upper, dpt, 0.0).to(operand)

        for at_k in range(0, K, BK):
            rows = at_k + tl.arange(0, BK)
            dqc, dkc = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
            overlap = tl.zeros([BK], tl.float32)
            for at_v in range(0, V, BV):
                cols = at_v + tl.arange(0, BV)
                vc = load_rows(v, token, here, h, H, cols, V).to(operand)
                doc = load_rows(do, token, here, h, H, cols, V).to(operand)
                x, gc = load_state(before, slot, rows, cols, K, V), load_state(after, slot, rows, cols, K, V)
                dqc = tl.dot(doc, tl.trans(x), dqc, input_precision=PRECISION)
                dkc = tl.dot(vc, tl.trans(gc), dkc, input_precision=PRECISION)
                overlap += tl.sum(x.to(tl.float32) * gc.to(tl.float32), axis=1)
            qc = load_rows(q, token, here, h, H, rows, K)
            kc = load_rows(k, token, here, h, H, rows, K)
            between = (1.0 - 2.0 * half) * tl.load(ln_ends + slot * K + rows, mask=rows < K, other=0.0)[None, :]
            past = kc * dkc
            dqc = tl.dot(dp, kc, dqc, input_precision=PRECISION)
            dkc = tl.dot(dpt, qc, dkc, input_precision=PRECISION)
            dgc = gate_sums(qc * dqc - (kc * dkc - past), past, BY_PRODUCTS) + tl.exp(between) * overlap[None, :]
            store_rows(dg, dgc, token, here, h, H, rows, K)
            g = load_decays(decay, token, here, h, H, rows, K)
            exponent = query_exponents(g, half, BY_PRODUCTS, exact)
            store_rows(q, dqc * (scale * tl.exp(exponent)), token, here, h, H, rows, K)
            exponent = tl.where(half > 0.0, -exponent, 0.0)  # secondary chunks: see secondary.secondary_gradients
            store_rows(k, dkc * tl.exp(exponent), token, here, h, H, rows, K)


@triton.jit
def load_state(x, slot, rows, cols, K: tl.constexpr, V: tl.constexpr):
    mask = (rows < K)[:, None] & (cols < V)[None, :]
    return tl.load((x + slot * K * V) + (rows[:, None] * V + cols[None, :]), mask=mask, other=0.0)


@triton.jit
def query_exponents(g, half, BY_PRODUCTS: tl.constexpr, EXACT: tl.constexpr):
    """b_t - h b_C; on the matrix units straight in the layout of what it multiplies."""
    if BY_PRODUCTS:
        t, j = tl.arange(0, g.shape[0])[:, None], tl.arange(0, g.shape[0])[None, :]
        return weighted_sums((tl.where(j <= t, 1.0, 0.0) - half).to(tl.bfloat16), g, EXACT)
    else:
        return tl.cumsum(g, axis=0) - half * tl.sum(g, axis=0)[None, :]


@triton.jit
def weighted_sums(weights, x, EXACT: tl.constexpr):
    """weights x, the weights exact in bf16; so is x if EXACT, else it is taken as the sum of two such numbers."""
    high = x.to(tl.bfloat16)
    total = tl.dot(weights, high)
    if not EXACT:
        total = tl.dot(weights, (x - high.to(tl.float32)).to(tl.bfloat16), total)
    return total


@triton.jit
def gate_sums(here, past, BY_PRODUCTS: tl.constexpr):
    """Σ_{i>=t} here_i + Σ_{i<t} past_i. Nothing cancels in the second sum: bf16 does for its terms."""
    if BY_PRODUCTS:
        t, j = tl.arange(0, here.shape[0])[:, None], tl.arange(0, here.shape[0])[None, :]
        later, earlier = (j >= t).to(tl.bfloat16), (j < t).to(tl.bfloat16)
        return tl.dot(earlier, past.to(tl.bfloat16), weighted_sums(later, here, False))
    else:
        return tl.cumsum(here, axis=0, reverse=True) + tl.cumsum(past, axis=0) - past


def gradients(
    tiles: Tiles, x: Rescaled, v: Tensor, decay: Tensor, do: Tensor, before: Tensor, after: Tensor, scale: float,
    config: DiagonalConfig,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq and dk, in the places of x.q and x.k, per value head, and dg; of secondary chunks all but what is local to
    them."""
    dg = torch.empty_like(decay)
    heads, key_dim, value_dim = *x.k.shape[2:], v.shape[3]
    chunks = cdiv(tiles.size, config.chunk)
    launch(
        _gradients, (chunks * heads * tiles.count,),
        x.q, x.k, v, do, decay, x.ln_ends, x.ln_chunk_decay, before, after, dg, tiles.start, tiles.length,
        scale, chunks, heads,
        K=key_dim, V=value_dim, BK=min(64, block_of(key_dim)), BV=min(config.gradients.columns, block_of(value_dim)),
        C=config.chunk, MAX_LN_DECAY=config.max_ln_decay, PRECISION=config.precision,
        BY_PRODUCTS=config.sums_by_products, num_stages=config.gradients.stages, num_warps=config.gradients.warps,
    )  # fmt: skip
    return x.q, x.k, dg
