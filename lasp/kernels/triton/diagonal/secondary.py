"""Secondary chunks of a diagonal decay (see rescale): what the tokens of one have to do with each other (math §8).

In sub-chunks of 16. For i in sub-chunk n and j in an earlier one, b_i - b_j splits at the start of n into two sums of
gates, none above zero: one within n, the other accumulated sub-chunk by sub-chunk, so that nothing is lost by
differences. Within a sub-chunk: one product with its middle as reference point if it decays little, else the 16
diagonals of the scores one at a time in fp32, from rows of k (or q) loaded with an offset.
"""

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.diagonal.gradients import score_grads
from lasp.kernels.triton.diagonal.rescale import DiagonalConfig, operand
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.shared.decay import unless_shut
from lasp.kernels.triton.shared.rows import add_rows, load_decays, load_rows, store_rows

CHUNKS = 8  # that one program looks at; most often none of them is secondary
SUB = tl.constexpr(16)


@triton.jit
def _within(decay, g, token, place, here, count, h, H, cols, K: tl.constexpr):
    """Gates from a sub-chunk's start up to each token, and from each token (without it) to the sub-chunk's end."""
    following = here & (place % SUB + 1 < SUB) & (place + 1 < count)
    after = load_decays(decay, token + 1, following, h, H, cols, K)
    shape: tl.constexpr = [g.shape[0] // SUB, SUB, g.shape[1]]
    up = tl.cumsum(tl.reshape(g, shape), axis=1)
    down = tl.cumsum(tl.reshape(after, shape), axis=1, reverse=True)
    return tl.reshape(up, g.shape), tl.reshape(down, g.shape)


@triton.jit
def _same(row):
    """Which tokens share a sub-chunk, [C, C]."""
    return row[:, None] // SUB == row[None, :] // SUB


@triton.jit
def _any_secondary(
    ln_chunk_decay, begin, tile, first, count, h, H, C: tl.constexpr, N: tl.constexpr, MAX_LN_DECAY: tl.constexpr
):
    chunk = first + tl.arange(0, N)
    found = tl.load(ln_chunk_decay + (begin // C + tile + chunk) * H + h, mask=chunk < tl.cdiv(count, C), other=0.0)
    return tl.max(found) > MAX_LN_DECAY


@triton.jit
def _chunk_outputs(
    q, k, v, decay, o, begin, count, i, h, scale, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, MAX_LN_DECAY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to the rows of o that belong to chunk i of a tile."""
    row, token = tl.arange(0, C), begin + i * C
    place, here = i * C + row, i * C + row < count
    p = tl.zeros([C, C], tl.float32)
    for at in range(0, K, BK):
        cols = at + tl.arange(0, BK)
        qc = load_rows(q, token, here, h // G, H // G, cols, K).to(tl.float32) * scale
        kc = load_rows(k, token, here, h // G, H // G, cols, K).to(tl.float32)
        g = load_decays(decay, token, here, h, H, cols, K)
        up, down = _within(decay, g, token, place, here, count, h, H, cols, K)
        q_up = qc * tl.exp(up)
        weight = tl.zeros([C, BK], tl.float32)
        for n in range(C // SUB):
            now = (row // SUB == n)[:, None]
            q_now = tl.where(now, q_up, 0.0).to(OPERAND)
            p = tl.dot(q_now, tl.trans((kc * weight).to(OPERAND)), p, input_precision=PRECISION)
            weight = weight * tl.exp(tl.sum(tl.where(now, g, 0.0), axis=0))[None, :] + tl.where(now, tl.exp(down), 0.0)
        if tl.max(-(up + down)) <= MAX_LN_DECAY:
            middle = 0.5 * (up - down)
            q_mid, k_mid = (qc * tl.exp(middle)).to(OPERAND), (kc * tl.exp(-middle)).to(OPERAND)
            near = tl.dot(q_mid, tl.trans(k_mid), input_precision=PRECISION)
            p += tl.where(_same(row) & (row[:, None] >= row[None, :]), near, 0.0)
        else:
            gap = tl.zeros([C, BK], tl.float32)
            for d in range(SUB):
                behind = here & (place % SUB >= d)
                k_behind = load_rows(k, token - d, behind, h // G, H // G, cols, K)
                score = tl.sum(qc * k_behind * tl.exp(gap), axis=1)
                p += tl.where(row[None, :] == row[:, None] - d, score[:, None], 0.0)
                gap += load_decays(decay, token - d, behind, h, H, cols, K)
    for at in range(0, V, BV):
        rows = at + tl.arange(0, BV)
        vc = load_rows(v, token, here, h, H, rows, V).to(OPERAND)
        add_rows(o, tl.dot(p.to(OPERAND), vc, input_precision=PRECISION), token, here, h, H, rows, V)


@triton.jit
def _chunk_gradients(
    q, k, v, do, decay, dq, dk, dv, dg, begin, count, i, h, scale, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, MAX_LN_DECAY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients that belong to chunk i of a tile."""
    row, token = tl.arange(0, C), begin + i * C
    place, here = i * C + row, i * C + row < count
    dp, dpt = score_grads(v, do, token, here, h, H, V, BV, OPERAND, PRECISION)
    pt = tl.zeros([C, C], tl.float32)
    for at in range(0, K, BK):
        cols = at + tl.arange(0, BK)
        qc = load_rows(q, token, here, h // G, H // G, cols, K).to(tl.float32) * scale
        kc = load_rows(k, token, here, h // G, H // G, cols, K).to(tl.float32)
        g = load_decays(decay, token, here, h, H, cols, K)
        up, down = _within(decay, g, token, place, here, count, h, H, cols, K)
        e_up = tl.exp(up)
        zero = tl.zeros([C, BK], tl.float32)
        dqc, dkc, both, weight = zero, zero, zero, zero
        for n in range(C // SUB):  # q of sub-chunk n with k of the earlier ones; what cancels in dg is rounded once
            now = (row // SUB == n)[:, None]
            q_now = tl.where(now, qc * e_up, 0.0).to(OPERAND)
            k_past = (kc * weight).to(OPERAND)
            pt = tl.dot(k_past, tl.trans(q_now), pt, input_precision=PRECISION)
            from_k = tl.where(now, tl.dot(dp.to(OPERAND), k_past, input_precision=PRECISION), 0.0)
            from_q = tl.dot(dpt.to(OPERAND), q_now, input_precision=PRECISION)
            dqc += e_up * from_k
            dkc += weight * from_q
            both += q_now * from_k - k_past * from_q
            weight = weight * tl.exp(tl.sum(tl.where(now, g, 0.0), axis=0))[None, :] + tl.where(now, tl.exp(down), 0.0)
        if tl.max(-(up + down)) <= MAX_LN_DECAY:
            e_mid, e_back = tl.exp(0.5 * (up - down)), tl.exp(0.5 * (down - up))
            q_mid, k_mid = (qc * e_mid).to(OPERAND), (kc * e_back).to(OPERAND)
            lower = _same(row) & (row[:, None] >= row[None, :])
            upper = _same(row) & (row[:, None] <= row[None, :])
            near = tl.dot(k_mid, tl.trans(q_mid), input_precision=PRECISION)
            pt += tl.where(upper, near, 0.0)
            near_dp, near_dpt = tl.where(lower, dp, 0.0).to(OPERAND), tl.where(upper, dpt, 0.0).to(OPERAND)
            from_k = tl.dot(near_dp, k_mid, input_precision=PRECISION)
            from_q = tl.dot(near_dpt, q_mid, input_precision=PRECISION)
            dqc += e_mid * from_k
            dkc += e_back * from_q
            both += q_mid * from_k - k_mid * from_q
        else:
            gap, gap_ahead = zero, zero
            for d in range(SUB):  # q_i with k_{i-d}, and k_j with q_{j+d}
                behind, ahead = here & (place % SUB >= d), (place % SUB + d < SUB) & (place + d < count)
                if d > 0:
                    gap_ahead += load_decays(decay, token + d, ahead, h, H, cols, K)
                k_behind = load_rows(k, token - d, behind, h // G, H // G, cols, K) * tl.exp(gap)
                q_ahead = load_rows(q, token + d, ahead, h // G, H // G, cols, K).to(tl.float32)
                q_ahead = (q_ahead * scale) * tl.exp(gap_ahead)
                score = tl.sum(qc * k_behind, axis=1)
                pt += tl.where(row[:, None] == row[None, :] - d, score[None, :], 0.0)
                at_behind, at_ahead = row[None, :] == row[:, None] - d, row[None, :] == row[:, None] + d
                from_k = k_behind * tl.sum(tl.where(at_behind, dp, 0.0), axis=1)[:, None]
                from_q = q_ahead * tl.sum(tl.where(at_ahead, dpt, 0.0), axis=1)[:, None]
                dqc += from_k
                dkc += from_q
                if d > 0:  # a token's own score does not decay
                    both += qc * from_k - kc * from_q
                gap += load_decays(decay, token - d, behind, h, H, cols, K)
        add_rows(dq, dqc * scale, token, here, h, H, cols, K)
        # There b_C - b_t, a difference of large sums, would have too few digits.
        to_end = tl.cumsum(g, axis=0, reverse=True) - g
        dkc += tl.exp(to_end) * load_rows(dk, token, here, h, H, cols, K)
        store_rows(dk, dkc, token, here, h, H, cols, K)
        dgc = load_rows(dg, token, here, h, H, cols, K).to(tl.float32)
        dgc += tl.cumsum(both, axis=0, reverse=True)
        store_rows(dg, unless_shut(dgc, g), token, here, h, H, cols, K)
    for at in range(0, V, BV):
        rows = at + tl.arange(0, BV)
        doc = load_rows(do, token, here, h, H, rows, V).to(OPERAND)
        add_rows(dv, tl.dot(pt.to(OPERAND), doc, input_precision=PRECISION), token, here, h, H, rows, V)


@triton.jit
def _secondary(
    q,  # [tokens, Hq, K]
    k,
    v,  # [tokens, H, V]
    decay,  # [tokens, H, K]
    ln_chunk_decay,  # [slots, H] fp32
    o,  # [tokens, H, V], or None and gradients:
    do,  # [tokens, H, V]
    dq,  # [tokens, H, K]
    dk,
    dv,  # [tokens, H, V]
    dg,  # [tokens, H, K]
    start, length, scale, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    MAX_LN_DECAY: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, h = tl.program_id(0).to(tl.int64), tl.program_id(2)
    first = tl.program_id(1) * N
    begin, count = tl.load(start + tile), tl.load(length + tile)
    if _any_secondary(ln_chunk_decay, begin, tile, first, count, h, H, C, N, MAX_LN_DECAY):
        for i in range(first, tl.minimum(first + N, tl.cdiv(count, C))):
            if tl.load(ln_chunk_decay + (begin // C + tile + i) * H + h) > MAX_LN_DECAY:
                if o is None:
                    _chunk_gradients(
                        q, k, v, do, decay, dq, dk, dv, dg, begin, count, i, h, scale, H, G,
                        K, V, BK, BV, C, MAX_LN_DECAY, OPERAND, PRECISION,
                    )  # fmt: skip
                else:
                    _chunk_outputs(
                        q, k, v, decay, o, begin, count, i, h, scale, H, G,
                        K, V, BK, BV, C, MAX_LN_DECAY, OPERAND, PRECISION,
                    )  # fmt: skip


def secondary_outputs(
    tiles: Tiles,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    ln_chunk_decay: Tensor,
    o: Tensor,
    scale: float,
    config: DiagonalConfig,
) -> None:
    """Adds Σ_{j<=i, same chunk} P_ij v_j to the rows of o [B, T, H, V] that belong to secondary chunks."""
    _over_chunks(tiles, q, k, v, (decay, ln_chunk_decay, o, None, None, None, None, None), scale, config)


def secondary_gradients(
    tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, do: Tensor, ln_chunk_decay: Tensor,
    grads: tuple[Tensor, Tensor, Tensor, Tensor], scale: float, config: DiagonalConfig,
) -> None:  # fmt: skip
    """Adds the gradients through the same sums to those rows of dq, dk, dv, dg; dk before that times e^{b_C - b_t}."""
    _over_chunks(tiles, q, k, v, (decay, ln_chunk_decay, None, do, *grads), scale, config)


def _over_chunks(
    tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, others: tuple[Tensor | None, ...], scale: float,
    config: DiagonalConfig,
) -> None:  # fmt: skip
    (heads, value_dim), (q_heads, key_dim) = v.shape[2:], q.shape[2:]
    parts = cdiv(cdiv(tiles.size, config.chunk), CHUNKS)
    launch(
        _secondary, (tiles.count, parts, heads),
        q, k, v, *others, tiles.start, tiles.length, scale, heads, heads // q_heads,
        K=key_dim, V=value_dim, BK=min(32, block_of(key_dim)), BV=min(64, block_of(value_dim)), C=config.chunk,
        N=CHUNKS, MAX_LN_DECAY=config.max_ln_decay, OPERAND=operand(config), PRECISION=config.precision,
        num_warps=8, num_stages=1,
    )  # fmt: skip
