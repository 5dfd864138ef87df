"""Outputs and gradients of every chunk for itself, given the states X before all chunks, or in reverse their gradients
G behind them (see chunk_states): no program waits for another, and no state has to stay in registers, which those of
large heads do not fit.

For rows i and the rows j that they see (forward: j <= i, reverse: j >= i), with w the decay between two places,

    y_i = w_i a_iᵀ X + scale · Σ_j w_ij (a_i·b_j) c_j

with a, b, c and what X is as in chunk_scan; G has the scale. For the gradient of gates (SUMS) dq and dv also sum what
gates.chunk_gate_grads reads: with E_ij = w_ij (q_i·k_j) (do_i·v_j), i > j,

    dq    r_i = q_i · w_i Xᵀ do_i          dv    u_j = v_j · w_j Gᵀ k_j + Σ_{i>j} E_ij - Σ_{i<j} E_ji
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.inputs import LinearInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.scalar.chunk_states import ChunkStates
from lasp.kernels.triton.scalar.gates import load_gates
from lasp.kernels.triton.shared.decay import NONE

STEP = 64  # of a state's rows, and of those of it that have a factor in fp16
WIDTH = 128  # columns that a program finds
STAGES = 4


@triton.jit
def _read(
    a, b, c, gates, states, ups, y, partner, sums, chunk, block, begin, count, h,
    scale, state_scale, TOKENS, H, GA, GB, GC, GP,
    DA: tl.constexpr, DC: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, SUMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BC columns of y, from the block'th on, for one chunk."""
    dtype: tl.constexpr = c.dtype.element_ty
    place, cols = tl.arange(0, C), block * BC + tl.arange(0, BC)
    here, inside = place < count, cols < DC
    a += (begin * (H // GA) + h // GA) * DA
    b += (begin * (H // GB) + h // GB) * DA
    c += (begin * (H // GC) + h // GC) * DC
    y += (begin * H + h) * DC
    states += (chunk * H + h) * (DA * DC)
    if dtype == tl.float16:
        ups += (chunk * H + h) * (((DC if TRANSPOSED else DA) + BA - 1) // BA)
    scores, yc = tl.zeros([C, C], tl.float32), tl.zeros([C, BC], tl.float32)
    for step in tl.range(0, (DA + BA - 1) // BA, num_stages=STAGES):
        rows = step * BA + tl.arange(0, BA)
        there = here[:, None] & (rows < DA)[None, :]
        ac = tl.load(a + (place * (H // GA * DA))[:, None] + rows[None, :], mask=there, other=0.0)
        bc = tl.load(b + (place * (H // GB * DA))[:, None] + rows[None, :], mask=there, other=0.0)
        if TRANSPOSED:
            at = cols[:, None] * DA + rows[None, :]
            x = tl.trans(tl.load(states + at, mask=inside[:, None] & (rows < DA)[None, :], other=0.0))
        else:
            at = rows[:, None] * DC + cols[None, :]
            x = tl.load(states + at, mask=(rows < DA)[:, None] & inside[None, :], other=0.0)
        scores = tl.dot(ac, tl.trans(bc), scores)
        if dtype == tl.float16 and not TRANSPOSED:
            yc += tl.dot(ac, x) * tl.load(ups + step)
        else:
            yc = tl.dot(ac, x, yc)
    if dtype == tl.float16 and TRANSPOSED:
        yc *= tl.load(ups + cols // BA, mask=inside, other=0.0)[None, :]
    seen = place[:, None] <= place[None, :] if REVERSE else place[:, None] >= place[None, :]
    if DECAY == NONE:
        scores = tl.where(seen, scores, 0.0)
        yc *= state_scale
    else:
        g, end = load_gates(gates, begin, 0, count, h, H, C, C, DECAY)
        if REVERSE:
            g = end - g
        scores *= tl.exp2(tl.where(seen, g[:, None] - g[None, :], float("-inf")))
        yc *= (tl.exp2(g) * state_scale)[:, None]
    here_c = here[:, None] & inside[None, :]
    cc = tl.load(c + (place * (H // GC * DC))[:, None] + cols[None, :], mask=here_c, other=0.0)
    if SUMS:
        partner += (begin * (H // GP) + h // GP) * DC
        pc = tl.load(partner + (place * (H // GP * DC))[:, None] + cols[None, :], mask=here_c, other=0.0)
        found = tl.sum(pc * yc, axis=1)
        if REVERSE:
            pairs = tl.dot(pc, tl.trans(cc)) * scores
            pairs = tl.where(place[:, None] == place[None, :], 0.0, pairs)
            found += tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)
        tl.store(sums + (block * TOKENS + begin + place) * H + h, found * scale, mask=here)
    yc = tl.dot(scores.to(dtype), cc, yc) * scale
    tl.store(y + (place * (H * DC))[:, None] + cols[None, :], yc.to(dtype), mask=here_c)


@triton.jit
def _chunk_reads(
    a,  # [tokens, H // GA, DA]
    b,  # [tokens, H // GB, DA]
    c,  # [tokens, H // GC, DC]
    gates,  # see gates.cumulate
    states,  # [chunks, H, DA, DC], or [chunks, H, DC, DA] if TRANSPOSED
    ups,  # [chunks, H, blocks]: see ChunkStates
    y,  # [tokens, H, DC]
    start,  # of chunks
    length,
    scale, state_scale, TOKENS, H, GA, GB, GC,
    DA: tl.constexpr, DC: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    griddepcontrol_wait()
    blocks: tl.constexpr = (DC + BC - 1) // BC  # neighbours, so that all but one find a and b in the cache
    chunk, block, h = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    begin, count = tl.load(start + chunk), tl.load(length + chunk)
    if count > 0:
        _read(
            a, b, c, gates, states, ups, y, None, None, chunk, block, begin, count, h,
            scale, state_scale, TOKENS, H, GA, GB, GC, 1,
            DA, DC, BA, BC, C, DECAY, REVERSE, TRANSPOSED, False, STAGES,
        )  # fmt: skip


@triton.jit
def _chunk_gradients(
    q,  # [tokens, H // G, K]
    k,
    v,  # [tokens, H, V]
    do,
    gates,  # see gates.cumulate
    before,  # [chunks, H, K, V]: X
    before_ups,  # [chunks, H, blocks]: see ChunkStates
    behind,  # G, likewise
    behind_ups,
    dq,  # [tokens, H, K]
    dk,
    dv,  # [tokens, H, V]
    reads,  # [blocks of K, tokens, H]: r
    writes,  # [blocks of V, tokens, H]: u
    start,  # of chunks
    length,
    scale, state_scale, TOKENS, H, G,
    K: tl.constexpr, V: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All of a chunk by neighbours, so that all but one find its tensors in the cache."""
    griddepcontrol_wait()
    KB: tl.constexpr = (K + BK - 1) // BK
    VB: tl.constexpr = (V + BV - 1) // BV
    chunk, block = tl.program_id(0).to(tl.int64) // (2 * KB + VB), tl.program_id(0) % (2 * KB + VB)
    h = tl.program_id(1)
    begin, count = tl.load(start + chunk), tl.load(length + chunk)
    if count > 0:
        if block < KB:
            _read(
                do, v, k, gates, before, before_ups, dq, q, reads, chunk, block, begin, count, h,
                scale, 1.0, TOKENS, H, 1, 1, G, G, V, K, BA, BK, C, DECAY, False, True, True, STAGES,
            )  # fmt: skip
        elif block < KB + VB:
            _read(
                k, q, do, gates, behind, behind_ups, dv, v, writes, chunk, block - KB, begin, count, h,
                scale, state_scale, TOKENS, H, G, G, 1, 1, K, V, BA, BV, C, DECAY, True, False, True, STAGES,
            )  # fmt: skip
        else:
            _read(
                v, do, q, gates, behind, behind_ups, dk, None, None, chunk, block - KB - VB, begin, count, h,
                scale, state_scale, TOKENS, H, 1, 1, G, 1, V, K, BA, BK, C, DECAY, True, True, False, STAGES,
            )  # fmt: skip


def chunk_reads(
    chunks: Tiles,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    gates: Tensor | None,
    states: ChunkStates,
    scale: float,
    *,
    reverse: bool = False,
    transposed: bool = False,
) -> Tensor:
    """y [B, T, H, DC], for as many heads as the states have."""
    (batch, tokens), (size_a, size_c), heads = c.shape[:2], (a.shape[3], c.shape[3]), states.states.shape[1]
    width = min(block_of(size_c), WIDTH)
    y = c.new_empty(batch, tokens, heads, size_c)
    launch(
        _chunk_reads, (chunks.count * cdiv(size_c, width), heads),
        a, b, c, gates, *states, y, chunks.start, chunks.length, scale, 1 / scale if reverse else 1.0,
        batch * tokens, heads, *(heads // t.shape[2] for t in (a, b, c)),
        DA=size_a, DC=size_c, BA=STEP, BC=width, C=chunks.size, DECAY=Decay.of(gates).value, REVERSE=reverse,
        TRANSPOSED=transposed, STAGES=STAGES, num_warps=8, pdl=True,
    )  # fmt: skip
    return y


def chunk_gradients(
    chunks: Tiles, x: LinearInputs, do: Tensor, gates: Tensor, before: ChunkStates, behind: ChunkStates
) -> tuple[Tensor, ...]:
    """dq and dk [B, T, H, K], dv [B, T, H, V], and what gates need: reads and writes [blocks, B, T, H]."""
    q, k, v = x.q, x.k, x.v
    (*rows, heads, size_v), size_k = v.shape, k.shape[3]
    width_k, width_v = (min(block_of(size), WIDTH) for size in (size_k, size_v))
    blocks_k, blocks_v = cdiv(size_k, width_k), cdiv(size_v, width_v)
    dq, dk = (v.new_empty(*rows, heads, size_k) for _ in range(2))
    dv = v.new_empty(v.shape)
    reads, writes = (v.new_empty(n, *rows, heads, dtype=torch.float32) for n in (blocks_k, blocks_v))
    launch(
        _chunk_gradients, (chunks.count * (2 * blocks_k + blocks_v), heads),
        q, k, v, do, gates, *before, *behind, dq, dk, dv, reads, writes, chunks.start, chunks.length,
        x.scale, 1 / x.scale, rows[0] * rows[1], heads, heads // q.shape[2],
        K=size_k, V=size_v, BA=STEP, BK=width_k, BV=width_v, C=chunks.size, DECAY=Decay.of(gates).value, STAGES=STAGES,
        num_warps=8, pdl=True,
    )  # fmt: skip
    return dq, dk, dv, reads, writes
