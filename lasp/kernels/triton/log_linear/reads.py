"""What queries read: outputs and their gradients alike, a program for every chunk of queries.

For row i and the rows j before it in the leaf, and the nodes n whose states X_n it sees beyond,

    y_i = scale · (Σ_j λ_i^(l(i, j)) e^{b_i - b_j} (a_i·b_j) c_j + Σ_n λ_i^(l(n)) e^{b_i + a_n} a_iᵀ X_n)

    o    a, b, c = q, k, v
    dq   a, b, c = do, v, k     X transposed

with the cumulative decay b of the leaf and a_n that from the node's end to the leaf; initial slots are read likewise.
With a partner (q for dq) a query's share of y · partner at each level is, without its scale λ, that scale's gradient;
with it, it says what goes through the gates between the query and what it reads.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.log_linear.config import LogLinearConfig
from lasp.kernels.triton.log_linear.levels import add_share, bit_length, level_of, scales_at
from lasp.kernels.triton.log_linear.merging import NodeStates
from lasp.kernels.triton.log_linear.tree import Tree
from lasp.kernels.triton.shared.decay import LOG2_E
from lasp.kernels.triton.shared.rows import load_rows, store_rows


@triton.jit(do_not_specialize=["TOKENS", "M", "I", "L", "HEIGHTS"])
def _reads(
    a,  # [tokens, H // GA, DA]
    b,  # [tokens, H // GB, DA]
    c,  # [tokens, H // GC, DC]
    gates,  # [tokens, H] log2 decay from a leaf's start
    scales,  # [tokens, H, L]
    seen,  # [P, H, DA, DC], or [P, H, DC, DA] if TRANSPOSED, and the log decays [P, H] of those nodes
    spans,
    incoming,  # [I, H, DA, DC], likewise, or None
    y,  # [tokens, H, DC]
    partner,  # [tokens, H // GP, DC], if SUMS, and then
    d_scales,  # [blocks, tokens, H, L] fp32, zero
    through,  # [blocks, tokens, H] fp32: y · partner of what lies before the token itself
    of_heights,  # [blocks, M, chunks, heights + 1, H] fp32, zero: sums of that over a chunk, for each height of nodes,
    #              and for initial slots
    leaves,  # see tree.Tree
    seen_pairs, seen_heights, slots, slots_first, before, scale, TOKENS, M, I, H, L, HEIGHTS, GA, GB, GC, GP,
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
    if SUMS:
        pc = load_rows(partner, begin, here, h // GP, H // GP, cols, DC)
        d_scales += block.to(tl.int64) * TOKENS * H * L
        of_heights += (((block * M + leaf) * chunks + i) * (HEIGHTS + 1)) * H + h
        crossing = tl.zeros([C], tl.float32)

    # earlier chunks of the leaf, at one level each
    for x in tl.static_range(LOG_LEAF - LOG_C):
        scale_i = scales_at(scales, LOG_C + 1 + x, tokens, here, h, H, L)
        share = tl.zeros([C], tl.float32)
        for j in range(tl.maximum(((i >> x) - 1) << x, low // C), ((i >> x) & 1) * ((i >> x) << x)):
            at_j, place_j = start + j * C, j * C + tl.arange(0, C)
            here_j = place_j >= low
            bj = tl.load(gates + (at_j + tl.arange(0, C)) * H + h, mask=here_j, other=0.0)
            gap = tl.where(here[:, None] & here_j[None, :], (bi[:, None] - bj[None, :]).to(tl.float32), float("-inf"))
            bc = load_rows(b, at_j, here_j, h // GB, H // GB, rows, DA)
            cc = load_rows(c, at_j, here_j, h // GC, H // GC, cols, DC)
            p = tl.dot(ac, tl.trans(bc), input_precision=PRECISION) * tl.exp2(gap)
            if SUMS:
                share += tl.sum(p * tl.dot(pc, tl.trans(cc), input_precision=PRECISION), axis=1)
            acc = tl.dot((p * scale_i[:, None]).to(dtype), cc, acc, input_precision=PRECISION)
        if SUMS:
            add_share(d_scales, LOG_C + 1 + x, share * scale, tokens, here, h, H, L, True)
            crossing += share * scale_i

    # the chunk itself
    bc = load_rows(b, begin, here, h // GB, H // GB, rows, DA)
    cc = load_rows(c, begin, here, h // GC, H // GC, cols, DC)
    i_row, i_col = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    visible = (i_row >= i_col) & here[:, None] & here[None, :]
    gap = tl.where(visible, (bi[:, None] - bi[None, :]).to(tl.float32), float("-inf"))
    p = tl.dot(ac, tl.trans(bc), input_precision=PRECISION) * tl.exp2(gap)
    levels = bit_length(i_row ^ i_col)
    weights = tl.zeros([C, C], tl.float32)
    if SUMS:
        product = p * tl.dot(pc, tl.trans(cc), input_precision=PRECISION)
    for level in tl.static_range(LOG_C + 1):
        scale_i = scales_at(scales, level, tokens, here, h, H, L)
        weights = tl.where(levels == level, scale_i[:, None], weights)
        if SUMS:
            share = tl.sum(tl.where(levels == level, product, 0.0), axis=1)
            add_share(d_scales, level, share * scale, tokens, here, h, H, L, True)
            if level > 0:
                crossing += share * scale_i
    acc = tl.dot((p * weights).to(dtype), cc, acc, input_precision=PRECISION)

    # nodes before the leaf
    bi = bi.to(tl.float32)
    state_dtype: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float32
    ac = ac.to(state_dtype)
    state_place = cols[None, :] * DA + rows[:, None] if TRANSPOSED else rows[:, None] * DC + cols[None, :]
    inside = (rows < DA)[:, None] & (cols < DC)[None, :]
    passed = 0.0
    for n in range(tl.load(leaves + 5 * M + leaf)):
        pair = tl.load(seen_pairs + leaf * HEIGHTS + n).to(tl.int64)
        height = tl.load(seen_heights + leaf * HEIGHTS + n)
        state = tl.load(seen + (pair * H + h) * DA * DC + state_place, mask=inside, other=0.0)
        read = tl.dot(ac, state, input_precision=PRECISION) * tl.exp2(bi + passed)[:, None]
        scale_i = scales_at(scales, LOG_LEAF + 1 + height, tokens, here, h, H, L)
        acc += read * scale_i[:, None]
        if SUMS:
            share = tl.sum(read * pc, axis=1)
            add_share(d_scales, LOG_LEAF + 1 + height, share * scale, tokens, here, h, H, L, True)
            tl.store(of_heights + height * H, tl.sum(share * scale_i, axis=0) * scale)
            crossing += share * scale_i
        passed += tl.load(spans + pair * H + h) * LOG2_E

    # initial slots
    if incoming is not None:
        n = tl.load(leaves + 4 * M + leaf).to(tl.int64)
        had = tl.load(before + n)
        position = tl.load(leaves + 3 * M + leaf) * LEAF + place
        total = 0.0
        first = tl.load(slots_first + n).to(tl.int64)
        for j in range(tl.load(slots_first + n + 1) - tl.load(slots_first + n)):
            slot = tl.load(slots + I + first + j)
            at = incoming + ((first + j) * H + h) * DA * DC
            state = tl.load(at + state_place, mask=inside, other=0.0)
            seen_at = level_of(position, (had >> (slot + 1)) << (slot + 1), LEAF, LOG_LEAF)
            scale_i = scales_at(scales, seen_at, tokens, here, h, H, L)
            read = tl.dot(ac, state, input_precision=PRECISION) * tl.exp2(bi + passed)[:, None]
            acc += read * scale_i[:, None]
            if SUMS:
                share = tl.sum(read * pc, axis=1)
                add_share(d_scales, seen_at, share * scale, tokens, here, h, H, L, False)
                total += tl.sum(share * scale_i, axis=0)
                crossing += share * scale_i
        if SUMS:
            tl.store(of_heights + HEIGHTS * H, total * scale)
    store_rows(y, (acc * scale).to(dtype), begin, here, h, H, cols, DC)
    if SUMS:
        tl.store(through + (block * TOKENS + tokens) * H + h, crossing * scale, mask=here)


@dataclass(frozen=True)
class Shares:
    """What queries' results have to do with a partner, in partial sums: d_scales [blocks, B, T, H, L], through [blocks,
    B, T, H] and of_heights [blocks, M, chunks, heights + 1, H], see the kernel."""

    d_scales: Tensor
    through: Tensor
    of_heights: Tensor


def reads(
    tree: Tree,
    states: NodeStates,
    incoming: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    gates: Tensor,
    scales: Tensor,
    scale: float,
    config: LogLinearConfig,
    partner: Tensor | None = None,
) -> tuple[Tensor, Shares | None]:
    """y [B, T, H, DC], from transposed states with a partner, and then what it has to do with that.

    incoming: [I, H, K, V], as `states.seen`.
    """
    (batch, tokens, heads, _), size_a, size_c = scales.shape, a.shape[3], c.shape[3]
    width = min(block_of(size_c), config.widest)
    blocks, chunks, count, heights = (
        cdiv(size_c, width),
        tree.leaf // config.chunk,
        tree.tiles.count,
        tree.seen_pairs.shape[1],
    )
    y = c.new_empty(batch, tokens, heads, size_c)
    shares = None
    if partner is not None:
        sums = scales.new_zeros(blocks, *scales.shape, dtype=torch.float32)
        shares = Shares(
            sums,
            sums.new_empty(blocks, batch, tokens, heads),
            sums.new_zeros(blocks, count, chunks, heights + 1, heads),
        )
    groups = (1 if t is None else heads // t.shape[2] for t in (a, b, c, partner))
    launch(
        _reads, (count * chunks, heads, blocks),
        a, b, c, gates, scales, states.seen, states.spans, incoming, y, partner,
        *((None,) * 3 if shares is None else (shares.d_scales, shares.through, shares.of_heights)),
        tree.leaves, tree.seen_pairs, tree.seen_heights, tree.incoming, tree.incoming_first, tree.before, scale,
        batch * tokens, count, tree.incoming.shape[1], heads, scales.shape[3], heights, *groups,
        DA=size_a, DC=size_c, BA=block_of(size_a), BC=width, C=config.chunk, LOG_C=config.chunk.bit_length() - 1,
        LEAF=tree.leaf, LOG_LEAF=tree.leaf.bit_length() - 1, TRANSPOSED=partner is not None, SUMS=partner is not None,
        PRECISION=config.precision, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y, shares
