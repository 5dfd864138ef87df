"""RMSNorm with an addition before it (`lasp.kernels.rms_norm`): a program takes all channels of some tokens.

Backward's programs take blocks of tokens in turn, so that each sums dw in registers; their sums are added up in a fixed
order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import cdiv, multiprocessors, next_power_of_2
from lasp.kernels.triton.launch import launch

ELEMENTS = 2048  # of a block of tokens: 16 for each thread of 4 warps
PROGRAMS = 4  # of a multiprocessor, backward


@triton.jit
def _add_rms_norm(
    x,  # [N, D]
    h,  # [N, D], or None
    weight,  # [D]
    s,  # [N, D], or None without h
    y,  # [N, D]
    scale,  # [N] fp32: 1 / sqrt(mean(s²) + eps)
    N,
    D,
    EPS: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    row, col = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BD)
    at, inside = row[:, None] * D + col, (row < N)[:, None] & (col < D)
    total = tl.load(x + at, mask=inside, other=0.0)
    if h is not None:
        total = (total.to(tl.float32) + tl.load(h + at, mask=inside, other=0.0).to(tl.float32)).to(total.dtype)
        tl.store(s + at, total, mask=inside)
    wide = total.to(tl.float32)
    r = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + EPS)
    tl.store(scale + row, r, mask=row < N)
    w = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
    tl.store(y + at, (wide * r[:, None] * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_grad(
    s,  # [N, D]
    scale,  # [N] fp32
    weight,  # [D]
    ds,  # [N, D], or None
    dy,  # [N, D]
    d,  # [N, D]
    dw,  # [programs, D] fp32: this program's part of the sum
    N,
    D,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    col = tl.arange(0, BD)
    w = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
    sums = tl.zeros([BN, BD], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, BN), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BN + tl.arange(0, BN)
        at, inside = row[:, None] * D + col, (row < N)[:, None] & (col < D)
        r = tl.load(scale + row, mask=row < N, other=0.0)[:, None]
        normed = tl.load(s + at, mask=inside, other=0.0).to(tl.float32) * r
        through = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        sums += through * normed
        through *= w
        total = (through - normed * (tl.sum(through * normed, axis=1) / D)[:, None]) * r
        if ds is not None:
            total += tl.load(ds + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d + at, total.to(d.dtype.element_ty), mask=inside)
    tl.store(dw + tl.program_id(0) * D + col, tl.sum(sums, axis=0), mask=col < D)


def add_rms_norm(x: Tensor, h: Tensor | None, weight: Tensor, eps: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """(x + h, its RMSNorm, [..., D] both, and what the sum was multiplied by, [N] in float32)."""
    x, h = x.contiguous(), None if h is None else h.contiguous()
    channels, rows, blocks, constants = _blocks(x)
    s, y = None if h is None else torch.empty_like(x), torch.empty_like(x)
    scale = x.new_empty(rows, dtype=torch.float32)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    launch(
        _add_rms_norm, (blocks,), x, h, weight.contiguous(), s, y, scale, rows, channels, EPS=eps, **constants,
    )  # fmt: skip
    return x if s is None else s, y, scale


def rms_norm_grad(s: Tensor, scale: Tensor, weight: Tensor, ds: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(The gradient of the sum, [..., D]; that of the weight, [D])."""
    channels, rows, blocks, constants = _blocks(s)
    programs = min(blocks, PROGRAMS * multiprocessors(s.device))
    d, dw = torch.empty_like(s), s.new_empty(programs, channels, dtype=torch.float32)
    launch(
        _rms_norm_grad, (programs,), s, scale, weight.contiguous(), None if ds is None else ds.contiguous(),
        dy.contiguous(), d, dw, rows, channels, **constants,
    )  # fmt: skip
    return d, dw.sum(0).to(weight.dtype)


def _blocks(x: Tensor) -> tuple[int, int, int, dict[str, Any]]:
    """Channels, tokens, blocks of them, and the kernels' constants."""
    channels = x.shape[-1]
    rows, width = x.numel() // channels, next_power_of_2(channels)
    tokens = max(1, ELEMENTS // width)
    warps = max(4, width // 512)
    return channels, rows, cdiv(rows, tokens), {"BN": tokens, "BD": width, "num_warps": warps}
