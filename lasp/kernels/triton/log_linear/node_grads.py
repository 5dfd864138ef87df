"""Gradients of what queries read: D = scale · Σ_t λ_t^(l) e^{b_t} q_t do_tᵀ over the queries of a piece. All see one
earlier state, at the level l of their position and its origin; b is the cumulative decay from the piece's start."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import block_of, cdiv, warps_of
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.log_linear.config import LogLinearConfig
from lasp.kernels.triton.log_linear.levels import level_of, scales_at
from lasp.kernels.triton.log_linear.tree import Tree
from lasp.kernels.triton.shared.decay import LOG2_E
from lasp.kernels.triton.shared.rows import load_rows


@triton.jit(do_not_specialize=["M", "L"])
def _node_grads(
    q,  # [tokens, Hq, K]
    do,  # [tokens, H, V]
    gates,  # [tokens, H] log2 decay from a leaf's start
    scales,  # [tokens, H, L]
    decays,  # [M, H] log decays of the leaves
    parts,  # [Q, H, K, V] fp32
    totals,  # [Q, H] fp32 log decays of the pieces
    leaves,  # see tree.Tree
    pieces, scale, M, H, G, L,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEAF: tl.constexpr,
    LOG_LEAF: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    count = tl.num_programs(0)
    piece, h, block = (count - 1 - tl.program_id(0)).to(tl.int64), tl.program_id(1), tl.program_id(2)  # longest first
    rows = (block % tl.cdiv(K, BK)) * BK + tl.arange(0, BK)
    cols = (block // tl.cdiv(K, BK)) * BV + tl.arange(0, BV)
    first, length = tl.load(pieces + piece), tl.load(pieces + count + piece)
    origin = tl.load(pieces + 2 * count + piece)
    half: tl.constexpr = do.dtype.element_ty == tl.float16
    dtype: tl.constexpr = tl.float32 if half else do.dtype.element_ty  # fp16 holds no small decay
    state = tl.zeros([BK, BV], tl.float32)
    passed = 0.0
    steps: tl.constexpr = LEAF // C
    for step in tl.range(0, length * steps, num_stages=STAGES):
        leaf, i = first + step // steps, step % steps
        begin = tl.load(leaves + leaf).to(tl.int64) + i * C
        place = i * C + tl.arange(0, C)
        here = (place >= tl.load(leaves + M + leaf)) & (place < tl.load(leaves + 2 * M + leaf))
        tokens = begin + tl.arange(0, C)
        b = tl.load(gates + tokens * H + h, mask=here, other=0.0).to(tl.float32)
        level = level_of(tl.load(leaves + 3 * M + leaf) * LEAF + place, origin, LEAF, LOG_LEAF)
        weight = scales_at(scales, level, tokens, here, h, H, L) * tl.exp2(passed + b)
        qc = load_rows(q, begin, here, h // G, H // G, rows, K)
        doc = load_rows(do, begin, here, h, H, cols, V)
        doc = (doc * weight[:, None]).to(dtype)
        state = tl.dot(tl.trans(qc).to(dtype), doc, state, input_precision=PRECISION)
        passed += tl.where(i == steps - 1, tl.load(decays + leaf.to(tl.int64) * H + h) * LOG2_E, 0.0)
    inside = (rows < K)[:, None] & (cols < V)[None, :]
    at = piece * H + h
    tl.store(parts + at * K * V + rows[:, None] * V + cols[None, :], state * scale, mask=inside)
    tl.store(totals + at, passed / LOG2_E, mask=block == 0)


def node_grads(
    tree: Tree,
    q: Tensor,
    do: Tensor,
    gates: Tensor,
    scales: Tensor,
    decays: Tensor,
    scale: float,
    config: LogLinearConfig,
) -> tuple[Tensor, Tensor]:
    """D [Q, H, K, V] of all pieces and their log decays [Q, H], in fp32."""
    (heads, value_dim), (q_heads, key_dim) = do.shape[2:], q.shape[2:]
    count = tree.pieces.shape[1]
    parts = do.new_empty(count, heads, key_dim, value_dim, dtype=torch.float32)
    totals = parts.new_empty(count, heads)
    block_k, block_v = min(128, block_of(key_dim)), min(128, block_of(value_dim))
    if count:
        launch(
            _node_grads, (count, heads, cdiv(key_dim, block_k) * cdiv(value_dim, block_v)),
            q, do, gates, scales, decays, parts, totals, tree.leaves, tree.pieces, scale,
            tree.tiles.count, heads, heads // q_heads, scales.shape[-1],
            K=key_dim, V=value_dim, BK=block_k, BV=block_v, C=config.chunk, LEAF=tree.leaf,
            LOG_LEAF=tree.leaf.bit_length() - 1, PRECISION=config.precision, STAGES=config.stages,
            num_warps=warps_of(value_dim),
        )  # fmt: skip
    return parts, totals
