"""The causal depthwise convolution with what follows it in a layer (math §6).

    z_t = b + Σ_s w_s x_{t-s}      a = z or SiLU(z)      y = a or a / sqrt(Σ a² + eps), over the channels of a head

    da = r (dy - y Σ dy y), r = 1 / sqrt(Σ a² + eps)      dz = da σ(z) (1 + z (1 - σ(z)))
    dw_s = Σ_t dz_t x_{t-s}      db = Σ_t dz_t      dx_t = Σ_s w_s dz_{t+s}

One kernel forward. Nothing but the inputs is kept: backward forms z again, and writes dz where dx will be. A second
kernel turns the one into the other in place; what tiles need of the next, its first width - 1 rows, is put aside for
that. A program scans a tile for the channels of one head's part. Its share of dw and db goes to a row of its own: sums
are in fp32 and in a fixed order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels.autocast import Function
from lasp.kernels.layouts import in_rows
from lasp.kernels.parts import EPS, Parts
from lasp.kernels.segments import Segments, Tiles
from lasp.kernels.triton.device import cdiv, next_power_of_2
from lasp.kernels.triton.launch import launch

TILE = 256  # tokens that a program scans, and so many rows of sums of dw there are
WIDEST = 128  # block of channels, where no sum over all of a head is needed
ELEMENTS = 1024  # of a block: 8 for each thread of 4 warps, 16 bytes of them in half precision


@triton.jit
def _load_rows(
    x, tail, begin, position, low, BT: tl.constexpr, end, n, channels, inside, D, X_ROW, W: tl.constexpr
):  # fmt: skip
    """x at BT rows of a tile from `low` on, counted from its begin, which has that position in its segment; those
    before the segment come from its tail, those from `end` on are zero."""
    row = low + tl.arange(0, BT)
    mask = (row < end) & (position + row >= 0)
    value = tl.load((x + begin * X_ROW) + (row[:, None] * X_ROW + channels), mask=mask[:, None] & inside, other=0.0)
    if tail is not None:  # noqa: SIM102  # asked when it is compiled
        if position + low < 0:
            place = (position + row + (W - 1)).to(tl.int32)
            before = ((place >= 0) & (place < W - 1))[:, None] & inside
            value += tl.load((tail + n * (W - 1) * D) + (place[:, None] * D + channels), mask=before, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _load_weights(weight, channels, inside, W: tl.constexpr):
    """w_0 … w_{W-1}, a row [1, BP] each."""
    rows = ()
    for shift in tl.static_range(W):
        row = tl.load(weight + channels * W + (W - 1 - shift), mask=inside, other=0.0).to(tl.float32)
        rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005  # Triton unpacks no tuples
    return rows


@triton.jit
def _load_shifted(
    x, tail, begin, position, low, BT: tl.constexpr, end, n, channels, inside, D, X_ROW, W: tl.constexpr
):  # fmt: skip
    """x_t, x_{t-1} … x_{t-W+1} at the BT rows t from `low` on, as in `_load_rows`."""
    rows = ()
    for shift in tl.static_range(W):
        row = _load_rows(x, tail, begin, position, low - shift, BT, end, n, channels, inside, D, X_ROW, W)
        rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
    return rows


@triton.jit
def _convolved(rows, weights, bias, channels, inside, W: tl.constexpr):
    """z of shifted rows."""
    z = rows[0] * weights[0]
    for shift in tl.static_range(1, W):
        z += rows[shift] * weights[shift]
    if bias is not None:
        z += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    return z


@triton.jit
def _where(start, length, owner, first, tile):
    """A tile's segment, its begin, length and position in its segment, and how many tokens follow its begin there."""
    n = tl.load(owner + tile).to(tl.int64)
    begin, count = tl.load(start + tile), tl.load(length + tile)
    last = tl.load(first + n + 1) - 1
    after = tl.load(start + last) + tl.load(length + last) - begin
    return n, begin, count, begin - tl.load(start + tl.load(first + n)), after


@triton.jit
def _forward(
    x,  # [tokens, …] with rows X_ROW apart, D channels
    tail,  # [N, W - 1, D] or None
    weight,  # [D, W]
    bias,  # [D] or None
    y,  # [tokens, H, P]
    start,
    length,
    owner,
    first,
    H,
    D,
    X_ROW,
    HEAD,  # channels of a head, D / H
    OFFSET,  # of the part among them
    P: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, W: tl.constexpr, EPS: tl.constexpr, SILU: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    tile, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, begin, count, position, after = _where(start, length, owner, first, tile)
    cols = tl.program_id(2) * BP + tl.arange(0, BP)[None, :]
    inside, channels = cols < P, h * HEAD + OFFSET + cols
    weights = _load_weights(weight, channels, inside, W)
    for i in range(tl.cdiv(count, BT)):
        row = i * BT + tl.arange(0, BT)
        rows = _load_shifted(x, tail, begin, position, i * BT, BT, after, n, channels, inside, D, X_ROW, W)
        z = _convolved(rows, weights, bias, channels, inside, W)
        if SILU:
            z *= tl.sigmoid(z)
        if UNIT:
            z *= tl.rsqrt(tl.sum(z * z, axis=1) + EPS)[:, None]
        tl.store(
            (y + (begin * H + h) * P) + (row[:, None] * (H * P) + cols),
            z.to(y.dtype.element_ty),
            mask=(row < count)[:, None] & inside,
        )


@triton.jit
def _dz(
    x,  # as in _forward
    tail,
    weight,
    bias,
    dy,  # [tokens, H, P]
    dz,  # [tokens, D]
    heads_of_tiles,  # [M, W - 1, D]: dz of each tile's first tokens; None if W is 1
    dw,  # [M, W, D] fp32: a tile's part of the sum
    db,  # [M, D] fp32, likewise, or None
    start, length, owner, first, H, D, X_ROW, HEAD, OFFSET,
    P: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, W: tl.constexpr, EPS: tl.constexpr, SILU: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    tile, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, begin, count, position, _ = _where(start, length, owner, first, tile)
    cols = tl.program_id(2) * BP + tl.arange(0, BP)[None, :]
    inside, channels = cols < P, h * HEAD + OFFSET + cols
    weights = _load_weights(weight, channels, inside, W)
    total, sums = tl.zeros([BT, BP], tl.float32), ()  # of rows i, BT + i, 2 BT + i …: threads add up what is their own
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros([BT, BP], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for i in range(tl.cdiv(count, BT)):
        row = i * BT + tl.arange(0, BT)
        here = (row < count)[:, None] & inside
        d = tl.load((dy + (begin * H + h) * P) + (row[:, None] * (H * P) + cols), mask=here, other=0.0).to(tl.float32)
        rows = _load_shifted(x, tail, begin, position, i * BT, BT, count, n, channels, inside, D, X_ROW, W)
        if SILU or UNIT:
            z = _convolved(rows, weights, bias, channels, inside, W)
            gate = tl.sigmoid(z)
            if UNIT:
                a = z * gate if SILU else z
                inverse = tl.rsqrt(tl.sum(a * a, axis=1) + EPS)[:, None]
                y = a * inverse
                d = inverse * (d - y * tl.sum(d * y, axis=1)[:, None])
            if SILU:
                d *= gate * (1.0 + z * (1.0 - gate))
        total += d
        more = ()
        for shift in tl.static_range(W):
            more = more + (sums[shift] + d * rows[shift],)  # type: ignore[assignment]  # noqa: RUF005
        sums = more
        d = d.to(dz.dtype.element_ty)
        at = row[:, None] * D + channels
        tl.store((dz + begin * D) + at, d, mask=here)
        if heads_of_tiles is not None:
            tl.store((heads_of_tiles + tile * (W - 1) * D) + at, d, mask=here & (row < W - 1)[:, None])
    for shift in tl.static_range(W):
        tl.store(dw + (tile * W + (W - 1 - shift)) * D + channels, tl.sum(sums[shift], axis=0)[None, :], mask=inside)
    if db is not None:
        tl.store(db + tile * D + channels, tl.sum(total, axis=0)[None, :], mask=inside)


@triton.jit
def _load_dz(dz, heads_of_tiles, tile, begin, row, count, after, channels, inside, D, W: tl.constexpr):
    """dz at rows of a tile and of those behind it in its segment, zero elsewhere."""
    mask = (row >= 0) & (row < count)
    d = tl.load((dz + begin * D) + (row[:, None] * D + channels), mask=mask[:, None] & inside, other=0.0)
    if heads_of_tiles is not None:
        behind, at = (row >= count) & (row < after), (row - count)[:, None] * D + channels
        d += tl.load((heads_of_tiles + (tile + 1) * (W - 1) * D) + at, mask=behind[:, None] & inside, other=0.0)
    return d.to(tl.float32)


@triton.jit
def _load_dx(dz, heads_of_tiles, weights, tile, begin, row, count, after, channels, inside, D, W: tl.constexpr):
    total = tl.zeros([row.shape[0], channels.shape[1]], tl.float32)
    for shift in tl.static_range(W):
        d = _load_dz(dz, heads_of_tiles, tile, begin, row + shift, count, after, channels, inside, D, W)
        total += d * weights[shift]
    return total


@triton.jit
def _dx(
    dx,  # [tokens, D]: dz, then dx
    heads_of_tiles,  # [M, W - 1, D], or None
    weight,  # [D, W]
    d_tail,  # [N, W - 1, D], or None
    start, length, owner, first, D,
    BP: tl.constexpr, BT: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    n, begin, count, position, after = _where(start, length, owner, first, tile)
    channels = tl.program_id(1) * BP + tl.arange(0, BP)[None, :]
    inside = channels < D
    weights = _load_weights(weight, channels, inside, W)
    if d_tail is not None:  # noqa: SIM102  # asked when it is compiled
        if (position == 0) & (count > 0):
            row = tl.arange(0, BT) - (W - 1)
            d = _load_dx(dx, heads_of_tiles, weights, tile, begin, row, count, after, channels, inside, D, W)
            at = (row + (W - 1))[:, None] * D + channels
            tl.store((d_tail + n * (W - 1) * D) + at, d.to(d_tail.dtype.element_ty), mask=(row < 0)[:, None] & inside)
            tl.debug_barrier()
    for i in range(tl.cdiv(count, BT)):
        row = i * BT + tl.arange(0, BT)
        d = _load_dx(dx, heads_of_tiles, weights, tile, begin, row, count, after, channels, inside, D, W)
        tl.debug_barrier()  # all have read before one writes
        tl.store(
            (dx + begin * D) + (row[:, None] * D + channels),
            d.to(dx.dtype.element_ty),
            mask=(row < count)[:, None] & inside,
        )


class Convolution(Function):
    """A tensor [B, T, H, P] for every part of the channels; see `lasp.kernels.conv.convolve`."""

    @staticmethod
    def forward(ctx, x, weight, bias, tail, segments: Segments, silu: bool, parts: Parts):
        batch, tokens, _ = x.shape
        rows, weight = in_rows(x.flatten(0, 1)), weight.contiguous()
        tail = None if tail is None else tail.contiguous()
        results = tuple(x.new_empty(batch, tokens, parts.heads, part.size) for part in parts.parts)
        tiles = segments.tiles(TILE, x.device)
        for (grid, tensors, constants), y in zip(_launches(rows, weight, tiles, silu, parts), results, strict=True):
            launch(_forward, grid, rows, tail, weight, bias, y, *tensors, **constants)
        ctx.save_for_backward(rows, weight, bias, tail)
        ctx.call, ctx.shape = (segments, silu, parts), x.shape
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        (rows, weight, bias, tail), (segments, silu, parts) = ctx.saved_tensors, ctx.call
        tiles, (channels, width) = segments.tiles(TILE, rows.device), weight.shape
        dx = rows.new_empty(ctx.shape)
        d_tail = None if tail is None else torch.zeros_like(tail)
        heads_of_tiles = rows.new_zeros(tiles.count + 1, width - 1, channels) if width > 1 else None
        dw = rows.new_empty(tiles.count, width, channels, dtype=torch.float32)
        db = None if bias is None else rows.new_empty(tiles.count, channels, dtype=torch.float32)
        for (grid, tensors, constants), dy in zip(_launches(rows, weight, tiles, silu, parts), dys, strict=True):
            launch(
                _dz, grid, rows, tail, weight, bias, dy.contiguous(), dx, heads_of_tiles, dw, db, *tensors, **constants,
            )  # fmt: skip
        launch(
            _dx, (tiles.count, cdiv(channels, WIDEST)),
            dx, heads_of_tiles, weight, d_tail, tiles.start, tiles.length, tiles.owner, tiles.first, channels,
            BP=WIDEST, BT=tokens_at_once(WIDEST, width), W=width, num_warps=4,
        )  # fmt: skip
        dw = dw.sum(0).mT.to(weight.dtype)
        return dx, dw, None if db is None else db.sum(0).to(bias.dtype), d_tail, None, None, None


def tokens_at_once(block: int, width: int) -> int:
    return max(next_power_of_2(width), ELEMENTS // block)


def _launches(rows: Tensor, weight: Tensor, tiles: Tiles, silu: bool, parts: Parts) -> Iterator[tuple]:
    """Of every part: the grid, the tensors and numbers behind those of its own, and the constants."""
    (channels, width), offset = weight.shape, 0
    for part in parts.parts:
        block = next_power_of_2(part.size)
        block = max(16, block if part.unit_length else min(block, WIDEST))
        grid = tiles.count, parts.heads, cdiv(part.size, block)
        numbers = parts.heads, channels, rows.stride(0), channels // parts.heads, offset
        constants = {"P": part.size, "BP": block, "BT": tokens_at_once(block, width), "W": width, "EPS": EPS,
                     "SILU": silu, "UNIT": part.unit_length, "num_warps": 4}  # fmt: skip
        yield grid, (tiles.start, tiles.length, tiles.owner, tiles.first, *numbers), constants
        offset += part.size
