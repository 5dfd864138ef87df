"""Backward of `reads` for the queries, a program for every leaf. With t_h = do S_hᵀ, from the leaf up and then back,

    R_{h+1} = R_h A_h        dλ_h = rowsum(R_h ⊙ t_h)        dR_h = λ_h t_h + dR_{h+1} A_hᵀ

and within the leaf dP = (do Vᵀ) ⊙ Λ, dλ_l the sums of P ⊙ (do Vᵀ) over the sources at level l, dV = (P ⊙ Λ)ᵀ do. What
nodes get from their queries needs all R_h and dR_{h+1}: they are kept by height, those of initial slots behind them.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import block_of, warps_of
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.log_linear.levels import add_share, bit_length, level_of, scales_at
from lasp.kernels.triton.log_linear.tree import Tree
from lasp.kernels.triton.log_linear_delta.reads import level_weights, load_state, node_at
from lasp.kernels.triton.log_linear_delta.terms import columns_of
from lasp.kernels.triton.shared.rows import load_rows, store_rows


@triton.jit
def _through_state(
    doc, do, states, begin, here, h, H, at, kk, vv, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """do Sᵀ [C, BK] of the state that lies there. doc: the first columns of do."""
    t = tl.dot(doc, tl.trans(load_state(states, at, kk, vv, K, V).to(doc.dtype)), input_precision=PRECISION)
    for block in tl.static_range(1, (V + BV - 1) // BV):
        cols = block * BV + vv
        part = load_rows(do, begin, here, h, H, cols, V).to(doc.dtype)
        s = load_state(states, at, kk, cols, K, V).to(doc.dtype)
        t = tl.dot(part, tl.trans(s), t, input_precision=PRECISION)
    return t


@triton.jit(do_not_specialize=["TOKENS", "M", "I", "L", "HEIGHTS"])
def _query_grads(
    v,  # [tokens, H, V]
    do,  # [tokens, H, V]
    rows,  # [tokens, H, K]: R
    reads,  # [tokens, H, C]: P
    scales,  # [tokens, H, L]
    states,  # [M + P, H, K, V] fp32
    transitions,  # [M + P, H, K, K] fp32
    incoming,  # [I, H, K, V] fp32, or None
    kept_rows,  # [heights + 1, tokens, H, K]: R_h
    kept_grads,  # [heights, tokens, H, K]: dR_{h+1}
    d_rows,  # [tokens, H, K]
    d_reads,  # [tokens, H, C]
    d_values,  # [tokens, H, V] fp32
    d_scales,  # [tokens, H, L] fp32, zero
    start,
    length,
    leaves,  # see tree.Tree
    seen_pairs, seen_heights, lefts, slots, slots_first, before, TOKENS, M, I, H, L, HEIGHTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    leaf, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, count = tl.load(start + leaf), tl.load(length + leaf)
    c, kk, vv = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    here, tokens, place = c < count, begin + c, c + tl.load(leaves + M + leaf)
    work: tl.constexpr = rows.dtype.element_ty
    doc = load_rows(do, begin, here, h, H, vv, V).to(work)

    levels = bit_length(place[:, None] ^ place[None, :])
    weights = level_weights(scales, tokens, here, levels, h, H, L, LOG_C)
    p = load_rows(reads, begin, here, h, H, c, C).to(tl.float32)
    weighted = tl.trans((p * weights).to(work))
    products = tl.zeros([C, C], tl.float32)
    for block in tl.static_range((V + BV - 1) // BV):
        cols = block * BV + vv
        part = load_rows(do, begin, here, h, H, cols, V).to(work)
        vc = load_rows(v, begin, here, h, H, cols, V).to(work)
        products = tl.dot(part, tl.trans(vc), products, input_precision=PRECISION)
        store_rows(d_values, tl.dot(weighted, part, input_precision=PRECISION), begin, here, h, H, cols, V)
    store_rows(d_reads, (products * weights).to(work), begin, here, h, H, c, C)
    products *= p
    for level in tl.static_range(LOG_C + 1):
        share = tl.sum(tl.where(levels == level, products, 0.0), axis=1)
        add_share(d_scales, level, share, tokens, here, h, H, L, True)

    r = load_rows(rows, begin, here, h, H, kk, K).to(tl.float32)
    pairs = tl.load(leaves + 5 * M + leaf)
    for n in range(pairs):
        at, height = node_at(seen_pairs, seen_heights, lefts, leaf, n, h, H, HEIGHTS)
        t = _through_state(doc, do, states, begin, here, h, H, at, kk, vv, K, V, BV, PRECISION)
        add_share(d_scales, LOG_C + 1 + height, tl.sum(r * t, axis=1), tokens, here, h, H, L, True)
        store_rows(kept_rows + height.to(tl.int64) * TOKENS * H * K, r.to(work), begin, here, h, H, kk, K)
        r = tl.dot(r, load_state(transitions, at, kk, kk, K, K), input_precision=PRECISION)
    store_rows(kept_rows + tl.full([], HEIGHTS, tl.int64) * TOKENS * H * K, r.to(work), begin, here, h, H, kk, K)
    dr = tl.zeros([C, BK], tl.float32)
    if incoming is not None:
        segment = tl.load(leaves + 4 * M + leaf).to(tl.int64)
        had, position = tl.load(before + segment), tl.load(leaves + 3 * M + leaf) * C + place
        first = tl.load(slots_first + segment).to(tl.int64)
        for j in range(tl.load(slots_first + segment + 1) - tl.load(slots_first + segment)):
            slot = tl.load(slots + I + first + j)
            at = (first + j) * H + h
            seen_at = level_of(position, (had >> (slot + 1)) << (slot + 1), C, LOG_C)
            t = _through_state(doc, do, incoming, begin, here, h, H, at, kk, vv, K, V, BV, PRECISION)
            add_share(d_scales, seen_at, tl.sum(r * t, axis=1), tokens, here, h, H, L, False)
            dr += t * scales_at(scales, seen_at, tokens, here, h, H, L)[:, None]
    for i in range(pairs):
        n = pairs - 1 - i
        at, height = node_at(seen_pairs, seen_heights, lefts, leaf, n, h, H, HEIGHTS)
        store_rows(kept_grads + height.to(tl.int64) * TOKENS * H * K, dr.to(work), begin, here, h, H, kk, K)
        t = _through_state(doc, do, states, begin, here, h, H, at, kk, vv, K, V, BV, PRECISION)
        t *= scales_at(scales, LOG_C + 1 + height, tokens, here, h, H, L)[:, None]
        dr = tl.dot(dr, tl.trans(load_state(transitions, at, kk, kk, K, K)), t, input_precision=PRECISION)
    store_rows(d_rows, dr.to(work), begin, here, h, H, kk, K)


class KeptRows(NamedTuple):
    """Of every height, see the kernel: rows, of initial slots behind those of nodes, and grads."""

    rows: Tensor
    grads: Tensor


class QueryGrads(NamedTuple):
    """See the kernel."""

    d_rows: Tensor
    d_reads: Tensor
    d_values: Tensor
    d_scales: Tensor


def query_grads(
    tree: Tree, v: Tensor, do: Tensor, rows: Tensor, reads: Tensor, scales: Tensor, states: Tensor,
    transitions: Tensor, incoming: Tensor | None, precision: str,
) -> tuple[QueryGrads, KeptRows]:  # fmt: skip
    """incoming: [I, H, K, V] fp32."""
    (heads, value_dim), key_dim, tiles, size = v.shape[2:], rows.shape[-1], tree.tiles, reads.shape[-1]
    heights = tree.seen_pairs.shape[1]
    kept = KeptRows(rows.new_empty(heights + 1, *rows.shape), rows.new_empty(heights, *rows.shape))
    grads = QueryGrads(
        rows.new_empty(rows.shape),
        reads.new_empty(reads.shape),
        states.new_empty(v.shape),
        states.new_zeros(scales.shape),
    )
    launch(
        _query_grads, (tiles.count, heads),
        v, do, rows, reads, scales, states, transitions, incoming, *kept, *grads, tiles.start, tiles.length,
        tree.leaves, tree.seen_pairs, tree.seen_heights, tree.lefts, tree.incoming, tree.incoming_first, tree.before,
        v.shape[0] * v.shape[1], tiles.count, tree.incoming.shape[1], heads, scales.shape[3], heights,
        K=key_dim, V=value_dim, BK=block_of(key_dim), BV=columns_of(value_dim, rows), C=size,
        LOG_C=size.bit_length() - 1, PRECISION=precision, num_warps=warps_of(key_dim, value_dim), num_stages=1,
    )  # fmt: skip
    return grads, kept
