"""Phase 2: the state passes from tile to tile of a segment, X -> A X + S (math §1), up or, for gradients, down."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.config import block_of, cdiv, next_power_of_2
from lasp.kernels.triton.launch import launch

NONE, SCALAR, DIAGONAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _scan(
    states,  # [M, H, K, V] summaries of the tiles (forward S, backward D)
    transitions,  # [M, H] or [M, H, K] logarithms
    start,  # [N, H, K, V] what enters each segment, unless STARTS_FROM_ZERO
    entering,  # [M, H, K, V] what enters each tile
    end,  # [N, H, K, V] what leaves each segment
    first,  # [N + 1] tiles of each segment
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CLASS: tl.constexpr,
    BACKWARD: tl.constexpr,
    STARTS_FROM_ZERO: tl.constexpr,
    WRITES_ENTERING: tl.constexpr,
):
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = tl.program_id(2)
    rows = (block // tl.cdiv(V, BV)) * BK + tl.arange(0, BK)
    cols = (block % tl.cdiv(V, BV)) * BV + tl.arange(0, BV)
    inside = (rows < K)[:, None] & (cols < V)[None, :]
    place = rows[:, None] * V + cols[None, :]
    x = tl.zeros([BK, BV], tl.float32)
    if not STARTS_FROM_ZERO:
        x += tl.load(start + (n * H + h) * K * V + place, mask=inside, other=0.0)
    low, high = tl.load(first + n).to(tl.int64), tl.load(first + n + 1).to(tl.int64)
    for i in range(high - low):
        tile = ((high - 1 - i) if BACKWARD else (low + i)) * H + h
        s = tl.load(states + tile * K * V + place, mask=inside, other=0.0)
        if WRITES_ENTERING:
            tl.store(entering + tile * K * V + place, x, mask=inside)
        if CLASS == SCALAR:
            x *= tl.exp(tl.load(transitions + tile))
        elif CLASS == DIAGONAL:
            x *= tl.exp(tl.load(transitions + tile * K + rows, mask=rows < K, other=0.0))[:, None]
        x += s
    tl.store(end + (n * H + h) * K * V + place, x, mask=inside)


def scan(
    tiles: Tiles,
    states: Tensor,
    transitions: Tensor | None,
    start: Tensor | None,
    *,
    backward: bool,
    write_entering: bool = True,
) -> tuple[Tensor, Tensor]:
    """What enters each tile [M, H, K, V] and what leaves each segment [N, H, K, V], all fp32; `start` None is zero."""
    start = None if start is None else start.contiguous()
    heads, key_dim, value_dim = states.shape[1:]
    segments = tiles.first.numel() - 1
    end = states.new_empty(segments, heads, key_dim, value_dim)
    entering = torch.empty_like(states) if write_entering else states
    classes = {None: NONE, 2: SCALAR, 3: DIAGONAL}
    kind = classes[None if transitions is None else transitions.ndim].value
    block_k = min(32, next_power_of_2(key_dim))
    block_v = min(64, block_of(value_dim))
    grid = (segments, heads, cdiv(key_dim, block_k) * cdiv(value_dim, block_v))
    launch(
        _scan, grid,
        states, transitions, start, entering, end, tiles.first, heads,
        K=key_dim, V=value_dim, BK=block_k, BV=block_v, CLASS=kind, BACKWARD=backward,
        STARTS_FROM_ZERO=start is None, WRITES_ENTERING=write_entering, num_warps=4, num_stages=3,
    )  # fmt: skip
    return entering, end


def total_decay(tiles: Tiles, transitions: Tensor | None) -> Tensor | None:
    """The log decay of each segment, [N, H] or [N, H, K], from that of its tiles, summed in a fixed order."""
    if transitions is None:
        return None
    rows = transitions.reshape(tiles.count, 1, -1, 1)  # a state of one column per number
    return scan(tiles, rows, None, None, backward=False, write_entering=False)[1].reshape(-1, *transitions.shape[1:])
