"""Phase 2 of the delta rule: the state passes from tile to tile, X -> A X + S with a matrix A (math §1).

Products of many transitions must not lose precision: three TF32 products stand for one of fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.config import block_of, cdiv
from lasp.kernels.triton.launch import launch


@triton.jit
def _scan(
    states,  # [M, H, K, V] summaries of the tiles: forward S, backward D
    transitions,  # [M, H, K, K]
    start,  # [N, H, K, V] what enters each segment; None is zero
    entering,  # [M, H, K, V] what enters each tile
    end,  # [N, H, K, V] what leaves each segment
    first,  # [N + 1] tiles of each segment
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,  # from the last tile to the first, with Aᵀ
    STAGES: tl.constexpr,
):
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, cols = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    inside = (rows < K)[:, None] & (cols < V)[None, :]
    place = rows[:, None] * V + cols[None, :]
    x = tl.zeros([BK, BV], tl.float32)
    if start is not None:
        x += tl.load(start + (n * H + h) * K * V + place, mask=inside, other=0.0)
    low, high = tl.load(first + n).to(tl.int64), tl.load(first + n + 1).to(tl.int64)
    for i in tl.range(0, high - low, num_stages=STAGES):
        tile = ((high - 1 - i) if BACKWARD else (low + i)) * H + h
        s = tl.load(states + tile * K * V + place, mask=inside, other=0.0)
        tl.store(entering + tile * K * V + place, x, mask=inside)
        if BK == BLOCK:
            k = tl.arange(0, BK)
            square = (rows < K)[:, None] & (k < K)[None, :]
            across = k[None, :] * K + rows[:, None] if BACKWARD else rows[:, None] * K + k[None, :]
            a = tl.load(transitions + tile * K * K + across, mask=square, other=0.0)
            x = tl.dot(a, x, s, input_precision="tf32x3")
        else:  # A is too large to be held: x comes back in pieces from where it has just been written
            tl.debug_barrier()
            x = s
            for block in range(tl.cdiv(K, BLOCK)):
                k = block * BLOCK + tl.arange(0, BLOCK)
                square = (rows < K)[:, None] & (k < K)[None, :]
                across = k[None, :] * K + rows[:, None] if BACKWARD else rows[:, None] * K + k[None, :]
                a = tl.load(transitions + tile * K * K + across, mask=square, other=0.0)
                part = (k < K)[:, None] & (cols < V)[None, :]
                y = tl.load(entering + tile * K * V + k[:, None] * V + cols[None, :], mask=part, other=0.0)
                x = tl.dot(a, y, x, input_precision="tf32x3")
    tl.store(end + (n * H + h) * K * V + place, x, mask=inside)


def scan(
    tiles: Tiles, states: Tensor, transitions: Tensor, start: Tensor | None, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """What enters each tile [M, H, K, V] and what leaves each segment [N, H, K, V], all fp32; `start` None is zero."""
    start = None if start is None else start.contiguous()
    _, heads, key_dim, value_dim = states.shape
    segments = tiles.first.numel() - 1
    entering, end = torch.empty_like(states), states.new_empty(segments, heads, key_dim, value_dim)
    block_k = block_of(key_dim)
    launch(
        _scan, (segments, heads, cdiv(value_dim, 16)),
        states, transitions, start, entering, end, tiles.first, heads,
        K=key_dim, V=value_dim, BK=block_k, BV=16, BLOCK=block_k if block_k <= 128 else 32,
        BACKWARD=backward, STAGES=3 if block_k <= 128 else 1, num_warps=8,
    )  # fmt: skip
    return entering, end
