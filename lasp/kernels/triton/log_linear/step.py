"""One token of every sequence: its output, and the slots after it, in one launch.

A program holds all of K and some columns of V, which do not depend on each other, of one slot after the other: what the
query reads of them, and the sum of those that become one with the token, which is all that is written. The delta rule
also erases from every slot, in place. Everything is fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.parked import to_device
from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.shared.decay import bounded

COLUMNS = 32  # of a state that a program holds


@triton.jit
def _step(
    q,  # [N, Hq, K]
    k,
    v,  # [N, H, V]
    decay,  # [N, H], or None
    scales,  # [N, H, L]
    beta,  # [N, H], or None
    slots,  # [N, J, H, K, V] fp32, changed
    since,  # [N, J, H] fp32
    since_after,  # [N, J, H] fp32
    tokens,  # [2, N] int64: how many each row has had, and which slot the token enters
    o,  # [N, H, V]
    scale, J, H, G, L,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    n, h, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows, cols = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_k, in_v = rows < K, cols < V
    inside = in_k[:, None] & in_v[None, :]
    place = rows[:, None] * V + cols[None, :]
    had, into = tl.load(tokens + n), tl.load(tokens + tl.num_programs(0) + n)
    head, q_head = n * H + h, n * (H // G) + h // G
    qc = tl.load(q + q_head * K + rows, mask=in_k, other=0.0).to(tl.float32) * scale
    kc = tl.load(k + q_head * K + rows, mask=in_k, other=0.0).to(tl.float32)
    vc = tl.load(v + head * V + cols, mask=in_v, other=0.0).to(tl.float32)
    g = 0.0
    if decay is not None:
        g = bounded(tl.load(decay + head))
    if beta is not None:
        strength = tl.load(beta + head).to(tl.float32)
        vc *= strength
    merged = kc[:, None] * vc[None, :]
    read = merged * tl.load(scales + head * L).to(tl.float32)
    for j in range(J):
        at = (n * J + j) * H + h
        left = tl.load(since + at) + g
        if (had >> j) & 1:
            state = tl.load(slots + at * K * V + place, mask=inside, other=0.0)
            if beta is not None:
                state -= kc[:, None] * (strength * tl.sum(kc[:, None] * state, axis=0))[None, :]
                tl.store(slots + at * K * V + place, state, mask=inside)
            state *= tl.exp(left)
            read += state * tl.load(scales + head * L + j + 1).to(tl.float32)
            if j < into:
                merged += state
        tl.store(since_after + at, tl.where(j == into, 0.0, left), mask=block == 0)
    tl.store(slots + ((n * J + into) * H + h) * K * V + place, merged, mask=inside)
    tl.store(o + head * V + cols, tl.sum(qc[:, None] * read, axis=0).to(o.dtype.element_ty), mask=in_v)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    level_scales: Tensor,
    beta: Tensor | None,
    slots: Tensor,
    since: Tensor,
    tokens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o [N, 1, H, V] and since [N, J, H] after the token; slots are changed. See lasp.kernels.log_linear_step."""
    (heads, value_dim), (q_heads, key_dim), count = v.shape[2:], k.shape[2:], slots.shape[1]
    o, after = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(since)
    had = tokens.tolist()
    had_and_into = [had, [(~n & n + 1).bit_length() - 1 for n in had]]  # fenwick.entered, in less of the host's time
    with torch.cuda.device_of(v):
        launch(
            _step, (len(v), heads, cdiv(value_dim, COLUMNS)),
            *(None if x is None else x.contiguous() for x in (q, k, v, decay, level_scales, beta)),
            slots, since, after, to_device(torch.tensor(had_and_into), v.device), o, scale,
            count, heads, heads // q_heads, level_scales.shape[-1],
            K=key_dim, V=value_dim, BK=block_of(key_dim), BV=COLUMNS, num_warps=4,
        )  # fmt: skip
    return o, after
