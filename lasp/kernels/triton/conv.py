"""The causal depthwise convolution with what follows it in a layer (math §6).

    z_t = b + Σ_s w_s x_{t-s}      a = z or SiLU(z)      y = a or a / sqrt(Σ a² + eps), over the channels of a head

    da = r (dy - y Σ dy y), r = 1 / sqrt(Σ a² + eps)      dz = da σ(z) (1 + z (1 - σ(z)))
    dw_s = Σ_t dz_t x_{t-s}      db = Σ_t dz_t      dx_t = Σ_s w_s dz_{t+s}

One kernel in each direction, and nothing but the inputs is kept. A warp walks along a tile, for some channels of one
part, and holds what the next token needs of the last ones: forward x_t … x_{t-W+1}; backward, from the tile's end to
its begin, dz_t … dz_{t+W-1} as well, of which it forms those behind the tile again. Its share of dw and db goes to a
row of its own: sums are in fp32 and in a fixed order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.autocast import Function
from lasp.kernels.layouts import in_rows
from lasp.kernels.once_differentiable import once_differentiable
from lasp.kernels.parts import EPS, Parts
from lasp.kernels.segments import Segments, Tiles
from lasp.kernels.triton.device import cdiv, next_power_of_2
from lasp.kernels.triton.launch import launch

TILE = 128  # tokens that a program walks along, and so many rows of sums of dw there are
BLOCK = 128  # channels of a program, but of a part that is divided by its length all: 4 for each thread of a warp
AHEAD = 4  # tokens that are fetched at once


@triton.jit
def _load(x, begin, row, end, channels, inside, ROW):
    """A row of a tile that begins there; zeros from `end` on. Rows lie ROW apart."""
    return tl.load((x + (begin + row) * ROW) + channels, mask=inside & (row < end), other=0.0)


@triton.jit
def _load_before(x, tail, begin, position, row, n, channels, inside, D, X_ROW, W: tl.constexpr):
    """x at a row < 0 of a tile, whose begin has that position in its segment; what is before that is in the tail."""
    x_mask = inside & (position + row >= 0)
    value = tl.load((x + (begin + row) * X_ROW) + channels, mask=x_mask, other=0.0).to(tl.float32)
    if tail is not None:
        place = position + row + (W - 1)
        mask = inside & (position + row < 0) & (place >= 0)
        value += tl.load((tail + (n * (W - 1) + place) * D) + channels, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _load_weights(weight, channels, inside, W: tl.constexpr):
    """w_0 … w_{W-1} of the channels."""
    weights = ()
    for shift in tl.static_range(W):
        w = tl.load(weight + channels * W + (W - 1 - shift), mask=inside, other=0.0).to(tl.float32)
        weights = weights + (w,)  # type: ignore[assignment]  # noqa: RUF005  # Triton unpacks no tuples
    return weights


@triton.jit
def _behind(newest, window, W: tl.constexpr):
    """The newest, and all but the oldest of a window of W."""
    moved = (newest,)
    for shift in tl.static_range(W - 1):
        moved = moved + (window[shift],)  # type: ignore[assignment]  # noqa: RUF005
    return moved


@triton.jit
def _before(window, oldest, W: tl.constexpr):
    """All but the newest of a window of W, and the oldest."""
    moved = ()
    for shift in tl.static_range(1, W):
        moved = moved + (window[shift],)  # type: ignore[assignment]  # noqa: RUF005
    return moved + (oldest,)  # noqa: RUF005


@triton.jit
def _dot(window, weights, W: tl.constexpr):
    """Σ_s w_s window_s."""
    total = window[0] * weights[0]
    for shift in tl.static_range(1, W):
        total += window[shift] * weights[shift]
    return total


@triton.jit
def _load_bias(bias, channels, inside):
    """None, if there is none."""
    b = None
    if bias is not None:
        b = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    return b


@triton.jit
def _convolved(rows, weights, bias, W: tl.constexpr):
    """z, from x_t … x_{t-W+1}."""
    z = _dot(rows, weights, W)
    if bias is not None:
        z += bias
    return z


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(z * -1.4426950408889634))


@triton.jit
def _channels(H, HEAD, OFFSET, P: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr):
    """Of this program [BH, BP]: in x, in a part's own tensor, and which there are."""
    h = tl.program_id(1) * BH + tl.arange(0, BH)[:, None]
    cols = tl.program_id(2) * BP + tl.arange(0, BP)[None, :]
    return h * HEAD + OFFSET + cols, h * P + cols, (h < H) & (cols < P)


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
    start, length, owner, first, H, D, X_ROW,
    HEAD,  # channels of a head, D / H
    OFFSET,  # of the part among them
    P: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr, W: tl.constexpr, EPS: tl.constexpr, SILU: tl.constexpr,
    UNIT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    n, begin, count, position, _ = _where(start, length, owner, first, tl.program_id(0).to(tl.int64))
    channels, at, inside = _channels(H, HEAD, OFFSET, P, BP, BH)
    weights = _load_weights(weight, channels, inside, W)
    b = _load_bias(bias, channels, inside)
    rows = ()  # x_t … x_{t-W+1}, here of t = -1; the last is not asked for
    for shift in tl.static_range(W):
        row = _load_before(x, tail, begin, position, -1 - shift, n, channels, inside & (shift < W - 1), D, X_ROW, W)
        rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
    for i in range(0, count, AHEAD):
        fetched = ()
        for j in tl.static_range(AHEAD):
            newest = _load(x, begin, i + j, count, channels, inside, X_ROW)
            fetched = fetched + (newest,)  # type: ignore[assignment]  # noqa: RUF005
        for j in tl.static_range(AHEAD):
            rows = _behind(fetched[j].to(tl.float32), rows, W)
            a = _convolved(rows, weights, b, W)
            if SILU:
                a *= _sigmoid(a)
            if UNIT:
                a *= tl.rsqrt(tl.sum(a * a, axis=1) + EPS)[:, None]
            tl.store((y + (begin + i + j) * (H * P)) + at, a.to(y.dtype.element_ty), mask=inside & (i + j < count))


@triton.jit
def _dz(d, z, EPS: tl.constexpr, SILU: tl.constexpr, UNIT: tl.constexpr):
    """dz of d = dy."""
    gate = _sigmoid(z)
    if UNIT:
        a = z * gate if SILU else z
        inverse = tl.rsqrt(tl.sum(a * a, axis=1) + EPS)[:, None]
        y = a * inverse
        d = inverse * (d - y * tl.sum(d * y, axis=1)[:, None])
    if SILU:
        d *= gate * (1.0 + z * (1.0 - gate))
    return d


@triton.jit
def _backward(
    x,  # as in _forward
    tail,
    weight,
    bias,
    dy,  # [tokens, H, P]
    dx,  # [tokens, D]
    d_tail,  # [N, W - 1, D], or None
    dw,  # [M, W, D] fp32: a tile's part of the sum
    db,  # [M, D] fp32, likewise, or None
    start, length, owner, first, H, D, X_ROW, HEAD, OFFSET,
    P: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr, W: tl.constexpr, EPS: tl.constexpr, SILU: tl.constexpr,
    UNIT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """From the last token to the first. With x_r comes dz_t, t = r + W - 1, which is the last that needs it."""
    tile = tl.program_id(0).to(tl.int64)
    n, begin, count, position, after = _where(start, length, owner, first, tile)
    channels, at, inside = _channels(H, HEAD, OFFSET, P, BP, BH)
    weights = _load_weights(weight, channels, inside, W)
    nothing = tl.zeros([BH, BP], tl.float32)
    b = _load_bias(bias, channels, inside)
    blocks = tl.cdiv(count, AHEAD)
    rows, dzs, sums = (), (), ()  # x_t … x_{t-W+1}, dz_t … dz_{t+W-1}, Σ dz_t x_t … Σ dz_t x_{t-W+1}
    for shift in tl.static_range(W):  # rows of the token behind the first t; the first is not asked for
        row = _load(x, begin, blocks * AHEAD + W - 1 - shift, after, channels, inside & (shift > 0), X_ROW)
        rows = rows + (row.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        dzs, sums = dzs + (nothing,), sums + (nothing,)  # type: ignore[assignment]  # noqa: RUF005
    total = nothing
    for i in range(blocks):
        top = (blocks - i) * AHEAD - 1
        xs, ds = (), ()
        for j in tl.static_range(AHEAD):
            oldest = _load(x, begin, top - j, after, channels, inside, X_ROW)
            d = _load(dy, begin, top - j + (W - 1), after, at, inside, H * P)
            xs, ds = xs + (oldest,), ds + (d,)  # type: ignore[assignment]  # noqa: RUF005
        for j in tl.static_range(AHEAD):
            t = top - j + (W - 1)
            rows = _before(rows, xs[j].to(tl.float32), W)
            d = _dz(ds[j].to(tl.float32), _convolved(rows, weights, b, W), EPS, SILU, UNIT)
            dzs = _behind(d, dzs, W)
            own = tl.where(t < count, d, 0.0)
            if db is not None:
                total += own
            sums = _add(sums, own, rows, W)
            here = inside & (t < count)
            tl.store((dx + (begin + t) * D) + channels, _dot(dzs, weights, W).to(dx.dtype.element_ty), mask=here)
    for j in tl.static_range(W - 1):  # with what came before the tile
        t = W - 2 - j
        here = inside & (t < count)
        row = _load_before(x, tail, begin, position, -1 - j, n, channels, inside, D, X_ROW, W)
        d = _load(dy, begin, t, count, at, inside, H * P).to(tl.float32)
        rows = _before(rows, row, W)
        d = _dz(d, _convolved(rows, weights, b, W), EPS, SILU, UNIT)
        dzs = _behind(d, dzs, W)
        total += d
        sums = _add(sums, d, rows, W)
        tl.store((dx + (begin + t) * D) + channels, _dot(dzs, weights, W).to(dx.dtype.element_ty), mask=here)
    if d_tail is not None:
        for j in tl.static_range(W - 1):
            dzs = _behind(nothing, dzs, W)
            place = (d_tail + (n * (W - 1) + (W - 2 - j)) * D) + channels
            here = inside & (position == 0) & (count > 0)
            tl.store(place, _dot(dzs, weights, W).to(d_tail.dtype.element_ty), mask=here)
    for shift in tl.static_range(W):
        tl.store((dw + (tile * W + (W - 1 - shift)) * D) + channels, sums[shift], mask=inside)
    if db is not None:
        tl.store((db + tile * D) + channels, total, mask=inside)


@triton.jit
def _add(sums, d, rows, W: tl.constexpr):
    """sums_s + d x_{t-s}."""
    more = ()
    for shift in tl.static_range(W):
        more = more + (sums[shift] + d * rows[shift],)  # type: ignore[assignment]  # noqa: RUF005
    return more


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
        dw = rows.new_empty(tiles.count, width, channels, dtype=torch.float32)
        db = None if bias is None else rows.new_empty(tiles.count, channels, dtype=torch.float32)
        for (grid, tensors, constants), dy in zip(_launches(rows, weight, tiles, silu, parts), dys, strict=True):
            launch(
                _backward, grid, rows, tail, weight, bias, dy.contiguous(), dx, d_tail, dw, db, *tensors, **constants,
            )  # fmt: skip
        dw = dw.sum(0).mT.to(weight.dtype)
        return dx, dw, None if db is None else db.sum(0).to(bias.dtype), d_tail, None, None, None


def _launches(rows: Tensor, weight: Tensor, tiles: Tiles, silu: bool, parts: Parts) -> Iterator[tuple]:
    """Of every part: the grid, the tensors and numbers behind those of its own, and the constants."""
    (channels, width), offset = weight.shape, 0
    for part in parts.parts:
        block = next_power_of_2(part.size)
        block = block if part.unit_length else min(block, BLOCK)
        heads = max(1, min(BLOCK // block, next_power_of_2(parts.heads)))
        grid = tiles.count, cdiv(parts.heads, heads), cdiv(part.size, block)
        numbers = parts.heads, channels, rows.stride(0), channels // parts.heads, offset
        constants = {"P": part.size, "BP": block, "BH": heads, "W": width, "EPS": EPS, "SILU": silu,
                     "UNIT": part.unit_length, "AHEAD": AHEAD, "num_warps": 1}  # fmt: skip
        yield grid, (tiles.start, tiles.length, tiles.owner, tiles.first, *numbers), constants
        offset += part.size
