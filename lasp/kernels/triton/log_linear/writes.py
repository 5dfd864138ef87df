"""What is read of a token: dv and dk alike, a program for every chunk of sources.

For row j, the rows i behind it in the leaf, and the gradient G of the nearest state beyond the leaf that it is part of,

    y_j = scale · Σ_i λ_i^(l(i, j)) e^{b_i - b_j} (a_j·b_i) c_i + e^{b_end - b_j} a_jᵀ G

    dv   a, b, c = k, q, do
    dk   a, b, c = v, do, q     G transposed

with the cumulative decay b of the leaf. Behind the last leaf of a segment the tokens belong to final slots. With a
partner (v for dv) the shares of y · partner tell what goes through the gates between the token and those that read it.
"""

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.log_linear.config import LogLinearConfig
from lasp.kernels.triton.log_linear.levels import bit_length, scales_at
from lasp.kernels.triton.log_linear.tree import Tree
from lasp.kernels.triton.shared.rows import load_rows, store_rows


@triton.jit(do_not_specialize=["TOKENS", "M", "J", "L"])
def _writes(
    a,  # [tokens, H // GA, DA]
    b,  # [tokens, H // GB, DA]
    c,  # [tokens, H // GC, DC]
    gates,  # [tokens, H] log2 decay from a leaf's start
    scales,  # [tokens, H, L]
    grads,  # [P, H, DA, DC], or [P, H, DC, DA] if TRANSPOSED
    final,  # [N, J, H, DA, DC], likewise, or None
    y,  # [tokens, H, DC]
    partner,  # [tokens, H // GP, DC], if SUMS, and then
    within,  # [blocks, tokens, H] fp32: y · partner from queries behind the token in its leaf
    beyond,  # [blocks, tokens, H] fp32: and from those beyond the leaf
    leaves,  # see tree.Tree
    last, scale, TOKENS, M, J, H, L, GA, GB, GC, GP,
    DA: tl.constexpr, DC: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    LEAF: tl.constexpr, LOG_LEAF: tl.constexpr, TRANSPOSED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = LEAF // C
    leaf, i = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    h, block = tl.program_id(1), tl.program_id(2)
    rows, cols = tl.arange(0, BA), block * BC + tl.arange(0, BC)
    low, high = tl.load(leaves + M + leaf), tl.load(leaves + 2 * M + leaf)
    if (i * C >= high) | ((i + 1) * C <= low):
        return
    start = tl.load(leaves + leaf).to(tl.int64)
    place = i * C + tl.arange(0, C)
    here = (place >= low) & (place < high)
    begin = start + i * C
    tokens = begin + tl.arange(0, C)
    dtype: tl.constexpr = c.dtype.element_ty
    ac = load_rows(a, begin, here, h // GA, H // GA, rows, DA)
    bi = tl.load(gates + tokens * H + h, mask=here, other=0.0)
    acc = tl.zeros([C, BC], tl.float32)
    share = tl.zeros([C], tl.float32)
    if SUMS:
        pc = load_rows(partner, begin, here, h // GP, H // GP, cols, DC)

    # later chunks of the leaf
    for j in range(i + 1, tl.cdiv(high, C)):
        at_j = start + j * C
        here_j = j * C + tl.arange(0, C) < high
        tokens_j = at_j + tl.arange(0, C)
        bj = tl.load(gates + tokens_j * H + h, mask=here_j, other=0.0)
        scale_j = scales_at(scales, LOG_C + bit_length(i ^ j), tokens_j, here_j, h, H, L)
        gap = tl.where(here[:, None] & here_j[None, :], (bj[None, :] - bi[:, None]).to(tl.float32), float("-inf"))
        bc = load_rows(b, at_j, here_j, h // GB, H // GB, rows, DA)
        cc = load_rows(c, at_j, here_j, h // GC, H // GC, cols, DC)
        p = tl.dot(ac, tl.trans(bc), input_precision=PRECISION) * tl.exp2(gap) * scale_j[None, :]
        if SUMS:
            share += tl.sum(p * tl.dot(pc, tl.trans(cc), input_precision=PRECISION), axis=1)
        acc = tl.dot(p.to(dtype), cc, acc, input_precision=PRECISION)

    # the chunk itself
    bc = load_rows(b, begin, here, h // GB, H // GB, rows, DA)
    cc = load_rows(c, begin, here, h // GC, H // GC, cols, DC)
    i_row, i_col = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    visible = (i_row <= i_col) & here[:, None] & here[None, :]
    gap = tl.where(visible, (bi[None, :] - bi[:, None]).to(tl.float32), float("-inf"))
    levels = bit_length(i_row ^ i_col)
    weights = tl.zeros([C, C], tl.float32)
    for level in tl.static_range(LOG_C + 1):
        scale_j = scales_at(scales, level, tokens, here, h, H, L)
        weights = tl.where(levels == level, scale_j[None, :], weights)
    p = tl.dot(ac, tl.trans(bc), input_precision=PRECISION) * tl.exp2(gap) * weights
    if SUMS:
        product = p * tl.dot(pc, tl.trans(cc), input_precision=PRECISION)
        share += tl.sum(tl.where(i_row == i_col, 0.0, product), axis=1)
        tl.store(within + (block * TOKENS + tokens) * H + h, share * scale, mask=here)
    acc = tl.dot(p.to(dtype), cc, acc, input_precision=PRECISION) * scale

    # queries beyond the leaf
    state_dtype: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float32
    ac = ac.to(state_dtype)
    state_place = cols[None, :] * DA + rows[:, None] if TRANSPOSED else rows[:, None] * DC + cols[None, :]
    inside = (rows < DA)[:, None] & (cols < DC)[None, :]
    end = tl.load(gates + (start + tl.maximum(high, 1) - 1) * H + h)
    weight = tl.exp2((end - bi).to(tl.float32))
    pair = tl.load(leaves + 6 * M + leaf).to(tl.int64)
    far = tl.zeros([C, BC], tl.float32)
    if pair >= 0:
        g = tl.load(grads + (pair * H + h) * DA * DC + state_place, mask=inside, other=0.0).to(state_dtype)
        far = tl.dot(ac, g, far, input_precision=PRECISION)
    if final is not None:
        n = tl.load(leaves + 4 * M + leaf).to(tl.int64)
        if tl.load(last + n) == leaf:
            slot_of = bit_length(high ^ place)
            for slot in tl.static_range(LOG_LEAF):
                if (high >> slot) & 1:
                    at = final + ((n * J + slot) * H + h) * DA * DC
                    g = tl.load(at + state_place, mask=inside, other=0.0).to(state_dtype)
                    read = tl.dot(ac, g, input_precision=PRECISION)
                    far += tl.where((slot_of == slot + 1)[:, None], read, 0.0)
    far *= weight[:, None]
    if SUMS:
        tl.store(beyond + (block * TOKENS + tokens) * H + h, tl.sum(far * pc, axis=1), mask=here)
    store_rows(y, (acc + far).to(dtype), begin, here, h, H, cols, DC)


def writes(
    tree: Tree,
    grads: Tensor,
    final: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    gates: Tensor,
    scales: Tensor,
    scale: float,
    config: LogLinearConfig,
    *,
    transposed: bool = False,
    partner: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [B, T, H, DC]; with a partner also y · partner from queries in the leaf and beyond it, each [blocks, B, T, H].

    grads: [P, H, K, V], and final: [N, J, H, K, V], the gradients of the final slots; fp32.
    """
    (batch, tokens, heads, levels), size_a, size_c = scales.shape, a.shape[3], c.shape[3]
    width = min(block_of(size_c), config.widest)
    blocks, chunks, count = cdiv(size_c, width), tree.leaf // config.chunk, tree.tiles.count
    y = c.new_empty(batch, tokens, heads, size_c)
    within = beyond = None
    if partner is not None:
        within, beyond = (grads.new_empty(blocks, batch, tokens, heads) for _ in range(2))
    groups = (1 if t is None else heads // t.shape[2] for t in (a, b, c, partner))
    launch(
        _writes, (count * chunks, heads, blocks),
        a, b, c, gates, scales, grads, final, y, partner, within, beyond, tree.leaves, tree.last, scale,
        batch * tokens, count, 0 if final is None else final.shape[1], heads, levels, *groups,
        DA=size_a, DC=size_c, BA=block_of(size_a), BC=width, C=config.chunk, LOG_C=config.chunk.bit_length() - 1,
        LEAF=tree.leaf, LOG_LEAF=tree.leaf.bit_length() - 1, TRANSPOSED=transposed, SUMS=partner is not None,
        PRECISION=config.precision, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y, within, beyond
