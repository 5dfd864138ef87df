"""How the channels of a short convolution become the queries, keys and values of a layer."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.dtypes import accumulation_dtype

EPS = 1e-6


@dataclass(frozen=True)
class Part:
    """So many channels of every head. unit_length: they are divided by sqrt(|x|² + EPS), as the delta rule asks of
    keys (math §2)."""

    size: int
    unit_length: bool = False


@dataclass(frozen=True)
class Parts:
    """[B, T, H · (all sizes)], head by head -> a tensor [B, T, H, size] of every part."""

    heads: int
    parts: tuple[Part, ...]

    @property
    def channels(self) -> int:
        return self.heads * sum(part.size for part in self.parts)


def undivided(x: Tensor) -> Parts:
    """All channels of x [B, T, D]: see `whole`."""
    return Parts(1, (Part(x.shape[2]),))


def whole(parts: tuple[Tensor, ...]) -> Tensor:
    """The one part of what is undivided, [B, T, D]."""
    (part,) = parts
    return part.flatten(2)


def unit_length(x: Tensor) -> Tensor:
    """x / sqrt(|x|² + EPS) over the last dimension, in x's dtype."""
    wide = x.to(accumulation_dtype(x))
    return (wide * (wide.square().sum(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def activate(x: Tensor, silu: bool, parts: Parts) -> tuple[Tensor, ...]:
    """The parts of x, or of SiLU(x)."""
    x = (F.silu(x) if silu else x).unflatten(-1, (parts.heads, -1))
    rows = zip(x.split([part.size for part in parts.parts], dim=-1), parts.parts, strict=True)
    return tuple(unit_length(y) if part.unit_length else y.contiguous() for y, part in rows)
