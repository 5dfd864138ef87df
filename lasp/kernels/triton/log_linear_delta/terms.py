"""What a leaf is to others: the rows R by which its queries read what enters it, its coefficients P, state S and
transition A (see the package)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import block_of, warps_of
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.shared.rows import load_rows, store_rows


@triton.jit
def load_gates(gates, at, c, C: tl.constexpr):
    """A leaf's beta, b, e^b and e^{b_C - b}, [C] each, and e^{b_C}."""
    gate = gates + at * 4 * C
    beta, b = tl.load(gate + c).to(tl.float32), tl.load(gate + C + c)
    from_start, to_end = tl.load(gate + 2 * C + c).to(tl.float32), tl.load(gate + 3 * C + c).to(tl.float32)
    return beta, b, from_start, to_end, tl.load(gate + 3 * C - 1).to(tl.float32)


@triton.jit
def _terms(
    q,  # [tokens, Hq, K]
    k,
    v,  # [tokens, H, V]
    ut,  # [tokens, H, C]
    scores,  # [tokens, H, C], scaled
    gates,  # [M, H, 4, C]: beta, b, e^b, e^{b_C - b}
    rows,  # [tokens, H, K]: R
    reads,  # [tokens, H, C]: P
    states,  # [M + pairs, H, K, V] fp32
    transitions,  # [M + pairs, H, K, K] fp32
    start, length, scale, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    leaf, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, count = tl.load(start + leaf), tl.load(length + leaf)
    c, kk = tl.arange(0, C), tl.arange(0, BK)
    here = c < count
    work: tl.constexpr = ut.dtype.element_ty
    beta, _, from_start, to_end, total = load_gates(gates, leaf * H + h, c, C)
    kc = load_rows(k, begin, here, h // G, H // G, kk, K).to(tl.float32)
    qc = load_rows(q, begin, here, h // G, H // G, kk, K).to(tl.float32)
    t = load_rows(ut, begin, here, h, H, c, C)
    f = load_rows(scores, begin, here, h, H, c, C)
    w = tl.dot(t, (kc * (beta * from_start)[:, None]).to(work), input_precision=PRECISION).to(work)
    r = qc * (scale * from_start)[:, None] - tl.dot(f, w, input_precision=PRECISION)
    store_rows(rows, r.to(work), begin, here, h, H, kk, K)
    p = tl.dot(f, t, input_precision=PRECISION) * beta[None, :]
    store_rows(reads, p.to(work), begin, here, h, H, c, C)

    written = tl.trans((kc * to_end[:, None]).to(work))
    a = tl.where(kk[:, None] == kk[None, :], total, 0.0) - tl.dot(written, w, input_precision=PRECISION)
    at_a = transitions + (leaf * H + h) * K * K + kk[:, None] * K + kk[None, :]
    tl.store(at_a, a, mask=(kk < K)[:, None] & (kk < K)[None, :])
    for block in tl.static_range((V + BV - 1) // BV):
        vv = block * BV + tl.arange(0, BV)
        vc = load_rows(v, begin, here, h, H, vv, V).to(tl.float32) * beta[:, None]
        u = tl.dot(t, vc.to(work), input_precision=PRECISION).to(work)
        at_s = states + (leaf * H + h) * K * V + kk[:, None] * V + vv[None, :]
        tl.store(at_s, tl.dot(written, u, input_precision=PRECISION), mask=(kk < K)[:, None] & (vv < V)[None, :])


def columns_of(size: int, rows: Tensor) -> int:
    """How many columns of values, which are `size`, a program holds at a time beside such rows."""
    return min(block_of(size), 64 if rows.dtype == torch.float32 else 128)


def leaf_terms(
    tiles, q: Tensor, k: Tensor, v: Tensor, ut: Tensor, scores: Tensor, gates: Tensor, states: Tensor,
    transitions: Tensor, scale: float, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """R [B, T, H, K] and P [B, T, H, C]; fills the leaves' part of states and transitions."""
    (heads, value_dim), (q_heads, key_dim) = v.shape[2:], k.shape[2:]
    rows, reads = ut.new_empty(*v.shape[:3], key_dim), torch.empty_like(ut)
    launch(
        _terms, (tiles.count, heads),
        q, k, v, ut, scores, gates, rows, reads, states, transitions, tiles.start, tiles.length, scale,
        heads, heads // q_heads, K=key_dim, V=value_dim, BK=block_of(key_dim), BV=columns_of(value_dim, ut),
        C=ut.shape[-1], PRECISION=precision, num_warps=warps_of(key_dim, value_dim), num_stages=1,
    )  # fmt: skip
    return rows, reads
