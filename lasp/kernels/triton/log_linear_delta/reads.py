"""Outputs, a program for every leaf and some columns: o = (P ⊙ Λ) V + Σ_h λ_h R_h S_h, with the rows R_h and the left
siblings' states S_h at the heights h where the leaf lies in a right one; R_{h+1} = R_h A_h. Initial slots are read
likewise."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import block_of, cdiv, warps_of
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.log_linear.levels import bit_length, level_of, scales_at
from lasp.kernels.triton.log_linear.tree import Tree
from lasp.kernels.triton.shared.rows import load_rows, store_rows


@triton.jit
def load_state(x, at, rows, cols, D1: tl.constexpr, D2: tl.constexpr):
    """The matrix [D1, D2] that lies there."""
    place = rows[:, None] * D2 + cols[None, :]
    return tl.load(x + at * D1 * D2 + place, mask=(rows < D1)[:, None] & (cols < D2)[None, :], other=0.0)


@triton.jit
def level_weights(scales, tokens, here, levels, h, H, L, LOG_C: tl.constexpr):
    """Λ: the scales of queries (rows) at the levels of the sources in their leaf (columns)."""
    weights = tl.zeros([levels.shape[0], levels.shape[1]], tl.float32)
    for level in tl.static_range(LOG_C + 1):
        scale = scales_at(scales, level, tokens, here, h, H, L)
        weights = tl.where(levels == level, scale[:, None], weights)
    return weights


@triton.jit
def node_at(seen_pairs, seen_heights, lefts, leaf, n, h, H, HEIGHTS):
    """Where the state of the n-th node that a leaf sees lies, and its height."""
    pair, height = tl.load(seen_pairs + leaf * HEIGHTS + n), tl.load(seen_heights + leaf * HEIGHTS + n)
    return tl.load(lefts + pair).to(tl.int64) * H + h, height


@triton.jit(do_not_specialize=["M", "I", "L", "HEIGHTS"])
def _reads(
    v,  # [tokens, H, V]
    rows,  # [tokens, H, K]: R
    reads,  # [tokens, H, C]: P
    scales,  # [tokens, H, L]
    states,  # [M + P, H, K, V] fp32
    transitions,  # [M + P, H, K, K] fp32
    incoming,  # [I, H, K, V] fp32, or None
    o,  # [tokens, H, V]
    start,
    length,
    leaves,  # see tree.Tree
    seen_pairs,
    seen_heights,
    lefts,  # [P]: the pairs' left nodes
    slots, slots_first, before, M, I, H, L, HEIGHTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    leaf, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, count = tl.load(start + leaf), tl.load(length + leaf)
    c, kk, vv = tl.arange(0, C), tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    here, tokens, place = c < count, begin + c, c + tl.load(leaves + M + leaf)
    work: tl.constexpr = rows.dtype.element_ty
    weights = level_weights(scales, tokens, here, bit_length(place[:, None] ^ place[None, :]), h, H, L, LOG_C)
    p = load_rows(reads, begin, here, h, H, c, C).to(tl.float32) * weights
    vc = load_rows(v, begin, here, h, H, vv, V).to(work)
    acc = tl.dot(p.to(work), vc, input_precision=PRECISION)
    r = load_rows(rows, begin, here, h, H, kk, K).to(tl.float32)
    for n in range(tl.load(leaves + 5 * M + leaf)):
        at, height = node_at(seen_pairs, seen_heights, lefts, leaf, n, h, H, HEIGHTS)
        s = load_state(states, at, kk, vv, K, V).to(work)
        scale = scales_at(scales, LOG_C + 1 + height, tokens, here, h, H, L)
        acc += tl.dot(r.to(work), s, input_precision=PRECISION) * scale[:, None]
        r = tl.dot(r, load_state(transitions, at, kk, kk, K, K), input_precision=PRECISION)
    if incoming is not None:
        segment = tl.load(leaves + 4 * M + leaf).to(tl.int64)
        had, position = tl.load(before + segment), tl.load(leaves + 3 * M + leaf) * C + place
        first = tl.load(slots_first + segment).to(tl.int64)
        for j in range(tl.load(slots_first + segment + 1) - tl.load(slots_first + segment)):
            slot = tl.load(slots + I + first + j)
            s = load_state(incoming, (first + j) * H + h, kk, vv, K, V).to(work)
            seen_at = level_of(position, (had >> (slot + 1)) << (slot + 1), C, LOG_C)
            scale = scales_at(scales, seen_at, tokens, here, h, H, L)
            acc += tl.dot(r.to(work), s, input_precision=PRECISION) * scale[:, None]
    store_rows(o, acc.to(o.dtype.element_ty), begin, here, h, H, vv, V)


def outputs(
    tree: Tree, v: Tensor, rows: Tensor, reads: Tensor, scales: Tensor, states: Tensor,
    transitions: Tensor, incoming: Tensor | None, precision: str,
) -> Tensor:  # fmt: skip
    """o [B, T, H, V]. incoming: [I, H, K, V] fp32."""
    (heads, value_dim), key_dim, tiles, size = v.shape[2:], rows.shape[-1], tree.tiles, reads.shape[-1]
    o, columns = torch.empty_like(v), min(block_of(value_dim), 128)
    launch(
        _reads, (tiles.count, heads, cdiv(value_dim, columns)),
        v, rows, reads, scales, states, transitions, incoming, o, tiles.start, tiles.length, tree.leaves,
        tree.seen_pairs, tree.seen_heights, tree.lefts, tree.incoming, tree.incoming_first, tree.before,
        tiles.count, tree.incoming.shape[1], heads, scales.shape[3], tree.seen_pairs.shape[1],
        K=key_dim, V=value_dim, BK=block_of(key_dim), BV=columns, C=size, LOG_C=size.bit_length() - 1,
        PRECISION=precision, num_warps=warps_of(key_dim, value_dim), num_stages=1,
    )  # fmt: skip
    return o
