"""The delta rule's walk up a tile with the state X in registers: summaries, outputs, or the state of every chunk.

    r = beta (V - e^b K X)        u = T r        o = e^b Q X + P u        X <- e^{b_C} X + (K e^{b_C - b})ᵀ u

T comes from `delta_wy`, P_ij = e^{b_i - b_j} q_i·k_j for j <= i. Columns of X (of V) are independent of each other, so
a program holds some of them; all is transposed, so that what one product yields is the next one's first operand and
never leaves registers. The same walk from X = I with V = 0 gives the tile's transition. With a diagonal decay q and k
come with e^b, and k to be written with e^{b_C - b} (`delta_diagonal`).
"""

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.config import GLUON, block_of, cdiv
from lasp.kernels.triton.delta_config import OUTPUTS, STATES, SUMMARY, TRANSITION, DeltaConfig, walks_on_hopper
from lasp.kernels.triton.delta_diagonal import Factors
from lasp.kernels.triton.delta_wy import CHUNK
from lasp.kernels.triton.gates import DIAGONAL, NONE, SCALAR
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.overlap import await_previous

if GLUON:
    from lasp.kernels.triton.hopper.delta_up import walk_up as walk_up_on_hopper


@triton.jit(do_not_specialize=["FIRST_HEAD"])
def _walk_up(
    q,  # [tokens, Hq, K]; q⁺, k⁺, k⁻ [tokens, H, K] if DIAGONAL
    k,
    written,
    totals,  # [chunks, H, K] fp32: e^{b_C}, if DIAGONAL
    v,  # [tokens, H, V]
    gates,  # [chunks, H, 4, C]: beta, b, e^b, e^{b_C - b}
    wy,  # [tokens, H, C]: T
    scores,  # [tokens, H, C]: P, for OUTPUTS
    entering,  # [M, H, K, V] fp32, for OUTPUTS and STATES, or None: zero
    end,  # [M, H, K, V] fp32, the state at the tile's end, if ENDS
    o,  # [tokens, H, V], for OUTPUTS
    u,  # [tokens, HEADS, V], for STATES
    states,  # [chunks, HEADS, V, K], for STATES: the state that enters each chunk, transposed
    start,
    length,
    first_chunk,  # [M]
    scale,
    H,
    G,
    FIRST_HEAD,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    MODE: tl.constexpr,
    ENDS: tl.constexpr,
    DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    if MODE != STATES:  # see overlap
        await_previous()
    tile, row, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    h = FIRST_HEAD + row
    begin, count = tl.load(start + tile), tl.load(length + tile)
    cols, rows = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    in_k, in_v = cols < K, rows < V
    c = tl.arange(0, C)
    work = wy.dtype.element_ty
    wy += (begin * H + h) * C  # within a tile 32 bits are enough
    k += (begin * (H // G) + h // G) * K
    written += (begin * (H // G) + h // G) * K
    if MODE != TRANSITION:
        v += (begin * H + h) * V
    if MODE == OUTPUTS:
        q += (begin * (H // G) + h // G) * K
        scores += (begin * H + h) * C
        o += (begin * H + h) * V
    if MODE == STATES:
        u += (begin * heads + row) * V
    inside = in_v[:, None] & in_k[None, :]
    at_state = (tile * H + h) * K * V + cols[None, :] * V + rows[:, None]
    if MODE == TRANSITION:
        x = tl.where(inside & (rows[:, None] == cols[None, :]), 1.0, 0.0)
    elif entering is None:
        x = tl.zeros([BV, BK], tl.float32)
    else:
        x = tl.load(entering + at_state, mask=inside, other=0.0)
    chunk = tl.load(first_chunk + tile)
    if MODE != TRANSITION:
        v_next = tl.load(
            v + (c * (H * V))[None, :] + rows[:, None], mask=(c < count)[None, :] & in_v[:, None], other=0.0
        )
    for i in tl.range(0, tl.cdiv(count, C), num_stages=STAGES):
        place = i * C + c
        here = place < count
        at_k = (place * (H // G * K))[:, None] + cols[None, :]
        at_v = (place * (H * V))[None, :] + rows[:, None]
        here_k = here[:, None] if K == BK else here[:, None] & in_k[None, :]
        kc = tl.load(k + at_k, mask=here_k, other=0.0).to(work)
        wc = kc
        tc = tl.load(wy + (place * (H * C))[:, None] + c[None, :], mask=here[:, None], other=0.0)
        ahead = place + C < count
        gate = gates + ((chunk + i) * H + h) * 4 * C + c
        betas = tl.load(gate).to(tl.float32)
        if DECAY == DIAGONAL:
            wc = tl.load(written + at_k, mask=here_k, other=0.0).to(work)
            total = tl.load(totals + ((chunk + i) * H + h) * K + cols, mask=in_k, other=0.0)[None, :]
        elif DECAY != NONE:
            from_start, to_end = tl.load(gate + 2 * C).to(tl.float32), tl.load(gate + 3 * C).to(tl.float32)
            total = tl.load(gates + ((chunk + i) * H + h) * 4 * C + 3 * C - 1).to(tl.float32)
        if MODE != TRANSITION:
            vt = v_next
            v_next = tl.load(v + at_v + C * H * V, mask=ahead[None, :] & in_v[:, None], other=0.0)
        if MODE == STATES:
            tl.store(
                states + ((chunk + i) * heads + row) * K * V + rows[:, None] * K + cols[None, :],
                x.to(states.dtype.element_ty),
                mask=inside,
            )
        r = tl.dot(x.to(work), tl.trans(kc), input_precision=PRECISION)
        here_v = here[None, :] if V % BV == 0 else in_v[:, None] & here[None, :]
        if DECAY == SCALAR:
            r *= from_start[None, :]
        if MODE == TRANSITION:
            r *= -betas[None, :]
        else:
            r = betas[None, :] * (vt.to(tl.float32) - r)
        ut = tl.dot(r.to(work), tl.trans(tc), input_precision=PRECISION)
        if MODE == OUTPUTS:
            qt = tl.trans(tl.load(q + at_k, mask=here_k, other=0.0).to(work))
            pc = tl.load(scores + (place * (H * C))[:, None] + c[None, :], mask=here[:, None], other=0.0)
            ot = tl.dot(x.to(work), qt, input_precision=PRECISION) * scale
            if DECAY == SCALAR:
                ot *= from_start[None, :]
            ot = tl.dot(ut.to(work), tl.trans(pc), ot, input_precision=PRECISION)
            tl.store(o + at_v, ot.to(o.dtype.element_ty), mask=here_v)
        if MODE == STATES:
            tl.store(u + (place * (heads * V))[None, :] + rows[:, None], ut.to(work), mask=here_v)
        if DECAY != NONE:
            x *= total
        if DECAY == SCALAR:
            ut *= to_end[None, :]
        x = tl.dot(ut.to(work), wc, x, input_precision=PRECISION)
    if MODE == STATES:
        await_previous()
    if ENDS:
        tl.store(end + at_state, x, mask=inside)


def walk_up(
    mode: tl.constexpr,
    tiles: Tiles,
    x: Factors,
    v: Tensor,
    gates: Tensor,
    wy: Tensor,
    scores: Tensor | None,
    config: DeltaConfig,
    *,
    scale: float = 1.0,
    entering: Tensor | None = None,
    end: Tensor | None = None,
    o: Tensor | None = None,
    u: Tensor | None = None,
    states: Tensor | None = None,
    first_chunk: Tensor,
    decay: int,
    head_range: range | None = None,
    overlaps: bool = True,
) -> None:
    """Runs the walk over every tile and head (of `head_range`); `mode` says which of the tensors it fills.

    overlaps: if STATES, nothing that it reads or writes has to do with the kernel before (lasp.kernels.triton.overlap).
    """
    (heads, value_dim), (q_heads, key_dim) = v.shape[2:], x.k.shape[2:]
    value_dim = key_dim if mode is TRANSITION else value_dim
    how = config.outputs if mode is OUTPUTS else config.walk
    block_v = min(block_of(value_dim), how.block)
    some = head_range or range(heads)
    if walks_on_hopper(x.k, v, decay):
        y = o if u is None else u
        walk_up_on_hopper(
            mode.value, tiles, x.q, x.k, v, gates, wy, scores, scale, entering, end, None, y, states,
            first_chunk, decay, some, overlaps,
        )  # fmt: skip
        return
    launch(
        _walk_up, (tiles.count, len(some), cdiv(value_dim, block_v)),
        x.q, x.k, x.written, x.totals, v, gates, wy, scores, entering, end, o, u, states,
        tiles.start, tiles.length, first_chunk, scale, heads, heads // q_heads, some.start,
        K=key_dim, V=value_dim, BK=block_of(key_dim), BV=block_v, C=CHUNK, MODE=mode, ENDS=end is not None,
        DECAY=decay, PRECISION=config.precision, STAGES=how.stages, num_warps=how.warps, overlaps=overlaps,
    )  # fmt: skip


def summaries(
    tiles: Tiles,
    x: Factors,
    v: Tensor,
    gates: Tensor,
    wy: Tensor,
    config: DeltaConfig,
    states: Tensor,
    transitions: Tensor,
    first_chunk: Tensor,
    decay: int,
) -> None:
    """Fills S [M, H, K, V] and A [M, H, K, K] of every tile."""
    if walks_on_hopper(x.k, v, decay):
        walk_up_on_hopper(
            SUMMARY.value, tiles, x.q, x.k, v, gates, wy, None, 1.0, None, states, transitions, None, None,
            first_chunk, decay, range(v.shape[2]), True,
        )  # fmt: skip
        return
    for mode, end in ((SUMMARY, states), (TRANSITION, transitions)):
        walk_up(mode, tiles, x, v, gates, wy, None, config, end=end, first_chunk=first_chunk, decay=decay)
