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
    totals,  # [N, H] or [N, H, K] the segments' transitions, if WRITES_TOTALS
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
    WRITES_TOTALS: tl.constexpr,
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
    total = tl.zeros([BK], tl.float32)
    low, high = tl.load(first + n).to(tl.int64), tl.load(first + n + 1).to(tl.int64)
    for i in tl.range(0, high - low, num_stages=4):  # or each load would wait for the store before it
        tile = ((high - 1 - i) if BACKWARD else (low + i)) * H + h
        s = tl.load(states + tile * K * V + place, mask=inside, other=0.0)
        if WRITES_ENTERING:
            tl.store(entering + tile * K * V + place, x, mask=inside)
        if CLASS != NONE:
            if CLASS == SCALAR:
                log = tl.load(transitions + tile) + tl.zeros([BK], tl.float32)
            else:
                log = tl.load(transitions + tile * K + rows, mask=rows < K, other=0.0)
            x *= tl.exp(log)[:, None]
            total += log
        x += s
    tl.store(end + (n * H + h) * K * V + place, x, mask=inside)
    if WRITES_TOTALS:
        if CLASS == SCALAR:
            tl.store(totals + n * H + h + tl.zeros([BK], tl.int64), total, mask=(rows == 0) & (block == 0))
        else:
            tl.store(totals + (n * H + h) * K + rows, total, mask=(rows < K) & (block % tl.cdiv(V, BV) == 0))


def scan(
    tiles: Tiles, states: Tensor, transitions: Tensor | None, start: Tensor | None, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """What enters each tile [M, H, K, V] and what leaves each segment [N, H, K, V], all fp32; `start` None is zero."""
    entering = torch.empty_like(states)
    start = None if start is None else start.contiguous()
    return entering, _launch(tiles, states, transitions, start, entering, None, backward)


def whole_summary(
    tiles: Tiles, states: Tensor, transitions: Tensor | None, *, backward: bool
) -> tuple[Tensor, Tensor | None]:
    """S [N, H, K, V] of every segment (backward D), and forward its log decay, [N, H] or [N, H, K], from its tiles'."""
    totals = None
    if transitions is not None and not backward:
        totals = transitions.new_empty(tiles.first.numel() - 1, *transitions.shape[1:])
    return _launch(tiles, states, transitions, None, None, totals, backward), totals


def _launch(
    tiles: Tiles,
    states: Tensor,
    transitions: Tensor | None,
    start: Tensor | None,
    entering: Tensor | None,
    totals: Tensor | None,
    backward: bool,
) -> Tensor:
    heads, key_dim, value_dim = states.shape[1:]
    segments = tiles.first.numel() - 1
    end = states.new_empty(segments, heads, key_dim, value_dim)
    kind = {None: NONE, 2: SCALAR, 3: DIAGONAL}[None if transitions is None else transitions.ndim].value
    block_k, block_v = min(32, next_power_of_2(key_dim)), min(64, block_of(value_dim))
    launch(
        _scan, (segments, heads, cdiv(key_dim, block_k) * cdiv(value_dim, block_v)),
        states, transitions, start, entering, end, totals, tiles.first, heads,
        K=key_dim, V=value_dim, BK=block_k, BV=block_v, CLASS=kind, BACKWARD=backward, STARTS_FROM_ZERO=start is None,
        WRITES_ENTERING=entering is not None, WRITES_TOTALS=totals is not None, num_warps=4,
    )  # fmt: skip
    return end
