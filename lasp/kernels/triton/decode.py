"""One token: its output and the state after it, in one launch, for every decay and with or without the delta rule.

    S <- Diag(e^g) S + k wᵀ        o = scale · q S        w = v, with the delta rule beta (v - k Diag(e^g) S)

A program holds all of K and some columns of V, which do not depend on each other. Everything is fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.inputs import DeltaInputs, LinearInputs
from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.shared.decay import CONSTANT, DIAGONAL, SCALAR
from lasp.kernels.triton.shared.operands import contiguous

COLUMNS = 32  # of the state that a program holds: 128 programs for 16 heads of 256, and loads of 128 bytes


@triton.jit
def _decode(
    q,  # [B, Hq, K]
    k,
    v,  # [B, H, V]
    decay,  # [H], [B, H] or [B, H, K]
    beta,  # [B, H], if DELTA
    state,  # [B, H, K, V] fp32; None is zero
    o,  # [B, H, V]
    after,  # [B, H, K, V] fp32
    scale, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    row, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, at_q = row * H + h, row * (H // G) + h // G
    rows, cols = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    in_k, in_v = rows < K, cols < V
    inside = in_k[:, None] & in_v[None, :]
    place = at * K * V + rows[:, None] * V + cols[None, :]
    qc = tl.load(q + at_q * K + rows, mask=in_k, other=0.0).to(tl.float32)
    kc = tl.load(k + at_q * K + rows, mask=in_k, other=0.0).to(tl.float32)
    vc = tl.load(v + at * V + cols, mask=in_v, other=0.0).to(tl.float32)
    x = tl.zeros([BK, BV], tl.float32)
    if state is not None:
        x += tl.load(state + place, mask=inside, other=0.0)
    if DECAY == CONSTANT:
        x *= tl.exp(tl.load(decay + h).to(tl.float32))
    elif DECAY == SCALAR:
        x *= tl.exp(tl.load(decay + at).to(tl.float32))
    elif DECAY == DIAGONAL:
        x *= tl.exp(tl.load(decay + at * K + rows, mask=in_k, other=0.0).to(tl.float32))[:, None]
    if DELTA:
        vc = tl.load(beta + at).to(tl.float32) * (vc - tl.sum(kc[:, None] * x, axis=0))
    x += kc[:, None] * vc[None, :]
    tl.store(after + place, x, mask=inside)
    oc = scale * tl.sum(qc[:, None] * x, axis=0)
    tl.store(o + at * V + cols, oc.to(o.dtype.element_ty), mask=in_v)


def decode(x: LinearInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """o [B, 1, H, V] in v's dtype and the new states [B, H, K, V] in fp32, for T = 1; `state` stays as it is.

    Nothing is read on the host, so that a CUDA graph can hold the launch.
    """
    assert x.v.shape[1] == 1 and x.segments.cu_seqlens is None
    x, state = contiguous(x), None if state is None else state.contiguous()
    (batch, _, heads, value_dim), (q_heads, key_dim) = x.v.shape, x.k.shape[2:]
    beta = x.beta if isinstance(x, DeltaInputs) else None
    o, after = torch.empty_like(x.v), x.v.new_empty(x.state_shape, dtype=torch.float32)
    block_v = min(COLUMNS, block_of(value_dim))
    launch(
        _decode, (batch, heads, cdiv(value_dim, block_v)),
        x.q, x.k, x.v, x.decay, beta, state, o, after, x.scale, heads, heads // q_heads,
        K=key_dim, V=value_dim, BK=block_of(key_dim), BV=block_v, DECAY=x.decay_class.value,
        DELTA=beta is not None, num_warps=4,
    )  # fmt: skip
    return o, after
