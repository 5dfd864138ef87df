"""What the queries of a piece give to the node, or the initial slot, that they see:

D = Σ R_hᵀ (λ_h do)        E = Σ R_hᵀ dR_{h+1}        see query_grads
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import block_of, cdiv, warps_of
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.log_linear.levels import bit_length, level_of, scales_at
from lasp.kernels.triton.log_linear.tree import Tree
from lasp.kernels.triton.log_linear_delta.query_grads import KeptRows
from lasp.kernels.triton.shared.rows import load_rows


@triton.jit(do_not_specialize=["OF_PAIRS", "TOKENS", "M", "L", "HEIGHTS"])
def _node_grads(
    do,  # [tokens, H, V]
    scales,  # [tokens, H, L]
    kept_rows,  # [heights + 1, tokens, H, K]
    kept_grads,  # [heights, tokens, H, K]
    parts,  # [Q, H, K, V] fp32
    transition_parts,  # [OF_PAIRS, H, K, K] fp32
    start,
    length,
    leaves,  # see tree.Tree
    pieces,
    OF_PAIRS,  # pieces whose queries see a node; those of initial slots come behind them
    TOKENS, M, H, L, HEIGHTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    count = tl.num_programs(0)
    piece, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_transition = tl.program_id(2) == 0
    if of_transition & (piece >= OF_PAIRS):
        return
    c, kk, vv = tl.arange(0, C), tl.arange(0, BK), (tl.program_id(2) - 1) * BV + tl.arange(0, BV)
    first, number = tl.load(pieces + piece).to(tl.int64), tl.load(pieces + count + piece)
    origin = tl.load(pieces + 2 * count + piece)
    of_pair = bit_length(tl.load(leaves + 3 * M + first) ^ (origin // C)) - 1
    height = tl.where(piece < OF_PAIRS, of_pair, HEIGHTS).to(tl.int64)
    kept_rows += height * TOKENS * H * K
    work: tl.constexpr = kept_rows.dtype.element_ty
    if of_transition:
        kept_grads += height * TOKENS * H * K
        e = tl.zeros([BK, BK], tl.float32)
        for leaf in range(first, first + number):
            begin, here = tl.load(start + leaf), c < tl.load(length + leaf)
            r = load_rows(kept_rows, begin, here, h, H, kk, K)
            dr = load_rows(kept_grads, begin, here, h, H, kk, K)
            e = tl.dot(tl.trans(r), dr, e, input_precision=PRECISION)
        at_e = transition_parts + (piece * H + h) * K * K + kk[:, None] * K + kk[None, :]
        tl.store(at_e, e, mask=(kk < K)[:, None] & (kk < K)[None, :])
    else:
        d = tl.zeros([BK, BV], tl.float32)
        for leaf in range(first, first + number):
            begin, here = tl.load(start + leaf), c < tl.load(length + leaf)
            place = c + tl.load(leaves + M + leaf)
            level = level_of(tl.load(leaves + 3 * M + leaf) * C + place, origin, C, LOG_C)
            scale = scales_at(scales, level, begin + c, here, h, H, L)
            r = load_rows(kept_rows, begin, here, h, H, kk, K)
            doc = load_rows(do, begin, here, h, H, vv, V).to(tl.float32) * scale[:, None]
            d = tl.dot(tl.trans(r), doc.to(work), d, input_precision=PRECISION)
        at_d = parts + (piece * H + h) * K * V + kk[:, None] * V + vv[None, :]
        tl.store(at_d, d, mask=(kk < K)[:, None] & (vv < V)[None, :])


def node_grads(tree: Tree, do: Tensor, scales: Tensor, kept: KeptRows, precision: str) -> tuple[Tensor, Tensor]:
    """D [Q, H, K, V] of all pieces and E [pieces of pairs, H, K, K], in fp32."""
    (heads, value_dim), key_dim, tiles = do.shape[2:], kept.rows.shape[-1], tree.tiles
    count, size, columns = tree.pieces.shape[1], tree.leaf, min(block_of(value_dim), 128)
    parts = do.new_empty(count, heads, key_dim, value_dim, dtype=torch.float32)
    transition_parts = parts.new_empty(tree.pair_pieces, heads, key_dim, key_dim)
    if count:
        launch(
            _node_grads, (count, heads, 1 + cdiv(value_dim, columns)),
            do, scales, kept.rows, kept.grads, parts, transition_parts, tiles.start, tiles.length,
            tree.leaves, tree.pieces, tree.pair_pieces, do.shape[0] * do.shape[1], tiles.count, heads, scales.shape[3],
            tree.seen_pairs.shape[1], K=key_dim, V=value_dim, BK=block_of(key_dim), BV=columns, C=size,
            LOG_C=size.bit_length() - 1, PRECISION=precision, num_warps=warps_of(key_dim, value_dim), num_stages=2,
        )  # fmt: skip
    return parts, transition_parts
