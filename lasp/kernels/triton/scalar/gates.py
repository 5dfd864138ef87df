"""Scalar and constant gates: what the other kernels read of them, and the gradient of scalar ones."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import cdiv, next_power_of_2
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import CONSTANT, LOG2_E, bounded, sums_dtype, unless_shut


@triton.jit
def _cumulate(
    decay,  # [tokens, H]
    cumulated,  # [tokens, H]
    start, length, H,
    BH: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(2) * BH + tl.arange(0, BH)
    griddepcontrol_wait()
    begin, count = tl.load(start + tile), tl.load(length + tile)
    place = tl.program_id(1) * C + tl.arange(0, C)
    at = (begin + place)[:, None] * H + heads[None, :]
    here = (place < count)[:, None] & (heads < H)[None, :]
    g = bounded(tl.load(decay + at, mask=here, other=0.0)).to(cumulated.dtype.element_ty)
    tl.store(cumulated + at, tl.cumsum(g, axis=0) * LOG2_E, mask=here)


@triton.jit
def load_gates(gates, begin, i, count, h, H, C: tl.constexpr, CHUNK: tl.constexpr, DECAY: tl.constexpr):
    """C tokens from i · C of a tile on: b [C], the log2 decay from their start up to each, and that of them all.

    Places without a token carry the latter, so that no difference from the others is above zero.
    gates: see `cumulate`, summed within chunks of CHUNK. b is in their dtype, and so should differences be taken.
    """
    here = tl.minimum(C, count - i * C)
    place = tl.arange(0, C)
    if DECAY == CONSTANT:
        dtype: tl.constexpr = tl.float64 if gates.dtype.element_ty == tl.float64 else tl.float32
        rate = bounded(tl.load(gates + h)).to(dtype) * LOG2_E
        return rate * tl.minimum(place + 1, here).to(dtype), rate * here.to(dtype)
    else:
        end = tl.load(gates + (begin + i * C + here - 1) * H + h)
        b = tl.load(gates + (begin + i * C + place) * H + h, mask=place < here, other=0.0)
        if C != CHUNK:
            before = tl.load(gates + (begin + i * C - 1) * H + h, mask=i * C % CHUNK != 0, other=0.0)
            b, end = b - before, end - before
        return tl.where(place < here, b, end), end


@triton.jit
def load_chunk_decays(
    gates, begin, count, h, H, C: tl.constexpr, CHUNKS: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """The log2 decay of each of a tile's chunks, [CHUNKS], the first or, if REVERSE, the last one first; 0 beyond."""
    n, chunks = tl.arange(0, CHUNKS), tl.cdiv(count, C)
    i = chunks - 1 - n if REVERSE else n
    here = tl.minimum(C, count - i * C)
    if DECAY == CONSTANT:
        dtype: tl.constexpr = tl.float64 if gates.dtype.element_ty == tl.float64 else tl.float32
        return tl.where(n < chunks, bounded(tl.load(gates + h)).to(dtype) * LOG2_E * here.to(dtype), 0.0)
    else:
        return tl.load(gates + (begin + i * C + here - 1) * H + h, mask=n < chunks, other=0.0)


LAST = tl.constexpr(32)  # tokens of a tile, see gate_grads
NOTHING = tl.constexpr(-17.0)  # a log decay of which fp32 shows nothing beside 1


@triton.jit
def _before_last(carry, v_dv, decay, begin, low, count, heads, TOKENS, H, VB: tl.constexpr):
    """<X, G> at a tile's end without what its tokens from `low` on have added to X."""
    place = low + tl.arange(0, LAST)
    at = (begin + place)[:, None] * H + heads[None, :]
    here = (place < count)[:, None] & (heads < H)[None, :]
    added = tl.zeros([LAST, heads.shape[0]], tl.float32)
    for block in tl.static_range(VB):
        added += tl.load(v_dv + tl.full([], block, tl.int64) * TOKENS * H + at, mask=here, other=0.0)
    decayed = tl.sum(bounded(tl.load(decay + at, mask=here, other=0.0)), axis=0)
    return tl.where(decayed < NOTHING, 0.0, carry - tl.sum(added, axis=0))


@triton.jit
def _gate_grads(
    q_dq,  # [QB, tokens, H]
    v_dv,  # [VB, tokens, H]
    at_end,  # [EB, M, H]
    decay,  # [tokens, H]
    dg,  # [tokens, H]
    start, length, TOKENS, H,
    BH: tl.constexpr, C: tl.constexpr, QB: tl.constexpr, VB: tl.constexpr, EB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    griddepcontrol_wait()
    begin, count = tl.load(start + tile), tl.load(length + tile)
    carry = tl.zeros([BH], tl.float32)
    for block in tl.static_range(EB):
        carry += tl.load(at_end + (block * tl.num_programs(0) + tile) * H + heads, mask=heads < H, other=0.0)
    low = (count - 1) // LAST * LAST
    carry = _before_last(carry, v_dv, decay, begin, low, count, heads, TOKENS, H, VB)
    chunks = tl.cdiv(count, C)
    for step in tl.range(0, chunks, num_stages=STAGES):
        place = (chunks - 1 - step) * C + tl.arange(0, C)
        at = (begin + place)[:, None] * H + heads[None, :]
        here = (place < count)[:, None] & (heads < H)[None, :]
        change = tl.zeros([C, BH], tl.float32)
        for block in tl.static_range(QB):
            change += tl.load(q_dq + tl.full([], block, tl.int64) * TOKENS * H + at, mask=here, other=0.0)
        earlier = tl.zeros([C, BH], tl.float32)
        for block in tl.static_range(VB):
            own = v_dv + tl.full([], block, tl.int64) * TOKENS * H + at
            change -= tl.load(own, mask=here & (place < low)[:, None], other=0.0)
            earlier += tl.load(own - H, mask=here & (place > low)[:, None], other=0.0)
        total = tl.sum(change, axis=0)
        from_here = total[None, :] - tl.cumsum(change, axis=0) + change + tl.cumsum(earlier, axis=0)
        g = tl.load(decay + at, mask=here, other=0.0)
        tl.store(dg + at, unless_shut(from_here + carry[None, :], g).to(dg.dtype.element_ty), mask=here)
        carry += total


@triton.jit
def _chunk_gate_grads(
    reads,  # [RB, tokens, H]
    writes,  # [WB, tokens, H]
    products,  # [PB, M, H, D]
    decay,  # [tokens, H]
    dg,  # [tokens, H]
    start,
    length,
    TOKENS,
    H,
    BH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    RB: tl.constexpr,
    WB: tl.constexpr,
    PB: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    griddepcontrol_wait()
    begin, count = tl.load(start + chunk), tl.load(length + chunk)
    place = tl.arange(0, C)
    at = (begin + place)[:, None] * H + heads[None, :]
    here = (place < count)[:, None] & (heads < H)[None, :]
    g = tl.load(decay + at, mask=here, other=0.0)
    passed, place_d = tl.zeros([BH], tl.float32), tl.arange(0, BD)
    for block in tl.static_range(PB):
        rows = ((block * tl.num_programs(0) + chunk) * H + heads)[:, None] * D + place_d[None, :]
        passed += tl.sum(tl.load(products + rows, mask=(heads < H)[:, None] & (place_d < D), other=0.0), axis=1)
    passed *= tl.exp(tl.sum(bounded(g), axis=0))
    read, written = tl.zeros([C, BH], tl.float32), tl.zeros([C, BH], tl.float32)
    for block in tl.static_range(RB):
        read += tl.load(reads + tl.full([], block, tl.int64) * TOKENS * H + at, mask=here, other=0.0)
    for block in tl.static_range(WB):
        before = writes + tl.full([], block, tl.int64) * TOKENS * H + at - H
        written += tl.load(before, mask=here & (place > 0)[:, None], other=0.0)
    from_here = tl.sum(read, axis=0)[None, :] - tl.cumsum(read, axis=0) + read + tl.cumsum(written, axis=0)
    tl.store(dg + at, unless_shut(from_here + passed[None, :], g).to(dg.dtype.element_ty), mask=here)


def cumulate(tiles: Tiles, decay: Tensor | None, v: Tensor, chunk: int) -> Tensor | None:
    """What `load_gates` reads, in sums_dtype(v). For [B, T, H]: log2 decay from a chunk's start up to each token."""
    if decay is None or Decay.of(decay) == Decay.CONSTANT:
        return None if decay is None else decay.to(sums_dtype(v))
    heads = decay.shape[-1]
    cumulated = v.new_empty(v.shape[:3], dtype=sums_dtype(v))
    block = min(16, next_power_of_2(heads))
    launch(
        _cumulate, (tiles.count, cdiv(tiles.size, chunk), cdiv(heads, block)),
        decay, cumulated, tiles.start, tiles.length, heads, BH=block, C=chunk, num_warps=4, pdl=True,
    )  # fmt: skip
    return cumulated


def gate_grads(tiles: Tiles, decay: Tensor, q_dq: Tensor, v_dv: Tensor, at_end: Tensor) -> Tensor:
    """dg_t = Σ_{j>=t} (q_j·dq_j - k_j·dk_j) + <X, G> at the tile's end (math §2), [B, T, H].

    The pairs of tokens within a chunk are all in the first term, which has their difference: see chunk_scan. What the
    last tokens add to the state at the end can be much larger than all else, but belongs to no gate behind them: there
    the sum is k_j·dk_j over earlier ones, and the state from before them comes alone, as <X, G> less theirs.

    q_dq, v_dv: [blocks, B, T, H], at_end: [blocks, M, H] partial products, each in as many blocks as there are.
    """
    dg = torch.empty_like(decay)
    heads = decay.shape[-1]
    block = min(4, next_power_of_2(heads))
    chunk = 4096 // next_power_of_2(len(q_dq) + 2 * len(v_dv) + 1)  # 64 KiB for each that is fetched ahead
    launch(
        _gate_grads, (tiles.count, cdiv(heads, block)),
        q_dq, v_dv, at_end, decay, dg, tiles.start, tiles.length, decay.numel() // heads, heads,
        BH=block, C=chunk, QB=len(q_dq), VB=len(v_dv), EB=len(at_end), STAGES=3, num_warps=8,
        pdl=True,
    )  # fmt: skip
    return dg


def chunk_gate_grads(chunks: Tiles, decay: Tensor, reads: Tensor, writes: Tensor, products: Tensor) -> Tensor:
    """The same from what is known of every chunk, with X the state before it and G its gradient behind it:

        dg_t = Σ_{j>=t} r_j + Σ_{j<t} u_j + e^{Σ g} <X, G>

    reads, writes: r and u (see hopper.chunk_step) [blocks, B, T, H], products: <X, G> [blocks, chunks, H, D], in
    partial sums.
    """
    dg, heads = torch.empty_like(decay), decay.shape[-1]
    block, size = min(16, next_power_of_2(heads)), products.shape[-1]
    launch(
        _chunk_gate_grads, (chunks.count, cdiv(heads, block)),
        reads, writes, products, decay, dg, chunks.start, chunks.length, decay.numel() // heads, heads,
        BH=block, C=chunks.size, D=size, BD=next_power_of_2(size),
        RB=reads.shape[0], WB=writes.shape[0], PB=products.shape[0],
        num_warps=4, pdl=True,
    )  # fmt: skip
    return dg
