"""Phase 2 of the delta rule: the state passes from tile to tile, X -> A X + S with a matrix A (math §1).

As in `state_passing` it need not wait for what enters a segment: the products of transitions that this meets are
states, too, which start from the identity and to which nothing is added. Their columns are found beside those of the
states.

Products of many transitions must not lose precision: three TF32 products stand for one of fp32. Where decays leave
nothing of any state over a whole tile (`reach`), no product is needed: what leaves a tile is its summary.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import block_of, cdiv, multiprocessors
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.reach import tiles_are_erased
from lasp.kernels.triton.shared.tiles import CHUNK


class Bounds(NamedTuple):
    """log2: [chunks, H], by how much a chunk's transition may enlarge a state (see reach). first_chunk: [M], of every
    tile."""

    log2: Tensor
    first_chunk: Tensor


@triton.jit
def _pass_by_matrix(
    states,  # [M, H, K, V] summaries of the tiles: forward S, backward D
    transitions,  # [M, H, K, K]
    start,  # [N, H, K, V] what enters each segment; None is zero
    initial,  # [M, H, K, V] what enters each tile
    end,  # [N, H, K, V] what leaves each segment
    passed,  # [M, H, K, K] the product of the transitions before each tile, unless None
    total,  # [N, H, K, K] and that of all of a segment
    first,  # [N + 1] tiles of each segment
    log2_bounds, first_chunk,  # see Bounds, or None
    length,  # [M] tokens of the tiles
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,  # from the last tile to the first, with Aᵀ
    STAGES: tl.constexpr,
):  # fmt: skip
    n, h, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    low, high = tl.load(first + n).to(tl.int64), tl.load(first + n + 1).to(tl.int64)
    erased = False
    if log2_bounds is not None:
        erased = tiles_are_erased(log2_bounds, first_chunk, length, low, high, h, H, C)
    griddepcontrol_wait()
    blocks: tl.constexpr = (V + BV - 1) // BV
    if passed is None or block < blocks:
        _columns(
            block, states, transitions, start, initial, end, low, high, erased, n, h, H, K, V, BK, BV, BLOCK, REVERSE,
            STAGES,
        )  # fmt: skip
    else:
        _columns(
            block - blocks, None, transitions, None, passed, total, low, high, erased, n, h, H, K, K, BK, BV, BLOCK,
            REVERSE, STAGES,
        )  # fmt: skip


@triton.jit
def _columns(
    block, states, transitions, start, initial, end, low, high, erased, n, h, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A block of columns of the states, or, where these are None, of the identity."""
    rows, cols = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    inside = (rows < K)[:, None] & (cols < V)[None, :]
    place = rows[:, None] * V + cols[None, :]
    x = tl.zeros([BK, BV], tl.float32)
    if states is None:
        x = tl.where(inside & (rows[:, None] == cols[None, :]), 1.0, x)
    if start is not None:
        x += tl.load(start + (n * H + h) * K * V + place, mask=inside, other=0.0)
    if erased:
        for i in tl.range(0, high - low, num_stages=4):  # or each load would wait for the store before it
            tile = ((high - 1 - i) if REVERSE else (low + i)) * H + h
            tl.store(initial + tile * K * V + place, x, mask=inside)
            x = tl.zeros([BK, BV], tl.float32)
            if states is not None:
                x = tl.load(states + tile * K * V + place, mask=inside, other=0.0)
    else:
        for i in tl.range(0, high - low, num_stages=STAGES):
            tile = ((high - 1 - i) if REVERSE else (low + i)) * H + h
            s = tl.zeros([BK, BV], tl.float32)
            if states is not None:
                s = tl.load(states + tile * K * V + place, mask=inside, other=0.0)
            tl.store(initial + tile * K * V + place, x, mask=inside)
            if BK == BLOCK:
                k = tl.arange(0, BK)
                square = (rows < K)[:, None] & (k < K)[None, :]
                across = k[None, :] * K + rows[:, None] if REVERSE else rows[:, None] * K + k[None, :]
                a = tl.load(transitions + tile * K * K + across, mask=square, other=0.0)
                x = tl.dot(a, x, s, input_precision="tf32x3")
            else:  # A is too large to be held: x comes back in pieces from where it has just been written
                tl.debug_barrier()
                x = s
                for piece in range(tl.cdiv(K, BLOCK)):
                    k = piece * BLOCK + tl.arange(0, BLOCK)
                    square = (rows < K)[:, None] & (k < K)[None, :]
                    across = k[None, :] * K + rows[:, None] if REVERSE else rows[:, None] * K + k[None, :]
                    a = tl.load(transitions + tile * K * K + across, mask=square, other=0.0)
                    part = (k < K)[:, None] & (cols < V)[None, :]
                    y = tl.load(initial + tile * K * V + k[:, None] * V + cols[None, :], mask=part, other=0.0)
                    x = tl.dot(a, y, x, input_precision="tf32x3")
    tl.store(end + (n * H + h) * K * V + place, x, mask=inside)


@triton.jit
def _add_incoming(
    local,  # [M, H, K, V]: see InitialStates
    incoming,  # [N, H, K, V]
    passed,  # [M, H, K, K]
    owner, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    segment = tl.load(owner + tile).to(tl.int64)
    rows, cols = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    inside = (rows < K)[:, None] & (cols < V)[None, :]
    at = local + (tile * H + h) * K * V + rows[:, None] * V + cols[None, :]
    x = tl.load(at, mask=inside, other=0.0)
    for piece in range(tl.cdiv(K, BLOCK)):
        k = piece * BLOCK + tl.arange(0, BLOCK)
        square, part = (rows < K)[:, None] & (k < K)[None, :], (k < K)[:, None] & (cols < V)[None, :]
        a = tl.load(passed + (tile * H + h) * K * K + rows[:, None] * K + k[None, :], mask=square, other=0.0)
        y = tl.load(incoming + (segment * H + h) * K * V + k[:, None] * V + cols[None, :], mask=part, other=0.0)
        x = tl.dot(a, y, x, input_precision="tf32x3")
    tl.store(at, x, mask=inside)


def _held(block_k: int) -> int:
    """Columns of a transition that shared memory holds at once."""
    return block_k if block_k <= 128 else 32


def pass_by_matrix(
    tiles: Tiles,
    states: Tensor,
    transitions: Tensor,
    reverse: bool,
    bounds: Bounds | None,
    start: Tensor | None,
    passed: Tensor | None,
    total: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What enters the tiles [M, H, K, V] and what leaves the segments [N, H, K, V]; fills `passed` and `total`, if they
    are there: see state_passing.StatePassing."""
    heads, key_dim, value_dim = states.shape[1:]
    segments = tiles.first.numel() - 1
    initial, end = torch.empty_like(states), states.new_empty(segments, heads, key_dim, value_dim)
    block_k, columns = block_of(key_dim), value_dim + (0 if passed is None else key_dim)
    at_once = multiprocessors(states.device) // (segments * heads)
    block_v = next((wide for wide in (16, 32) if cdiv(columns, wide) <= at_once), 64)
    blocks = cdiv(value_dim, block_v) + (0 if passed is None else cdiv(key_dim, block_v))
    launch(
        _pass_by_matrix, (segments, heads, blocks),
        states, transitions, start, initial, end, passed, total, tiles.first, *(bounds or (None, None)), tiles.length,
        heads, K=key_dim, V=value_dim, BK=block_k, BV=block_v, BLOCK=_held(block_k), C=CHUNK,
        REVERSE=reverse, STAGES=(3 if block_v == 16 else 2) if block_k <= 128 else 1, num_warps=8, pdl=True,
    )  # fmt: skip
    return initial, end


def add_incoming(tiles: Tiles, local: Tensor, incoming: Tensor | None, passed: Tensor | None) -> Tensor:
    """What enters each tile, [M, H, K, V], of the parts of InitialStates; takes the place of `local`."""
    if incoming is not None:
        count, heads, key_dim, value_dim = local.shape
        block_v = min(64, block_of(value_dim))
        launch(
            _add_incoming, (count, heads, cdiv(value_dim, block_v)),
            local, incoming, passed, tiles.owner, heads,
            K=key_dim, V=value_dim, BK=block_of(key_dim), BV=block_v, BLOCK=_held(block_of(key_dim)), num_warps=8,
        )  # fmt: skip
    return local
