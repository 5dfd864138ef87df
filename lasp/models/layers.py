"""The parts that mixers share. B batch, T tokens (local), H heads, K key dim, V value dim, D channels."""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.kernels.dtypes import accumulation_dtype
from lasp.kernels.fused import fused
from lasp.kernels.parts import Parts
from lasp.kernels.rms_norm import add_rms_norm
from lasp.kernels.swiglu import swiglu
from lasp.models.products import gated_mlp, in_tiles, product
from lasp.models.sequence import SequenceOps

Activation = Callable[[Tensor], Tensor]


def at_least_float32(x: Tensor) -> Tensor:
    """x in the dtype of gates, decays and rotations: float32 for the half dtypes, float64 stays."""
    return x.to(accumulation_dtype(x))


class WideBuffers(nn.Module):
    """Buffers stay float32 at least, whatever dtype the module is cast to: bfloat16 would round constants and sums by
    0.4 %. Parameters follow."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, cast in self._buffers.items():
            exact = before[name]
            if cast is not None and exact is not None and cast.dtype != (wide := at_least_float32(cast)).dtype:
                self._buffers[name] = exact.to(wide)
        return self


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) of x [B, T, H, K], the two halves of K being the rotated pairs.

    positions: [T], or [B, T]. The angles are formed in float64: at position 1M, float32 would be off by 0.06 radians.
    """
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float64) / half
    angles = positions.to(x.device, torch.float64)[..., None, None] * theta**-exponents
    wide = accumulation_dtype(x)
    return _rotate_pairs(x, angles.cos().to(wide), angles.sin().to(wide))


@fused
def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = at_least_float32(x).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm whose weight follows x's dtype: under autocast the fused kernel takes no mixture."""

    def forward(self, x: Tensor) -> Tensor:
        return add_rms_norm(x, None, self.weight.to(x.dtype), self.eps)[1]


def add_and_norm(norm: nn.Module, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(s, norm(s)) for s = x + h, or x: at once by an `RMSNorm`; what has taken its place is called as it is."""
    if type(norm) is RMSNorm and (h is None or h.dtype == x.dtype):
        return add_rms_norm(x, h, norm.weight.to(x.dtype), norm.eps)
    s = x if h is None else x + h
    return s, norm(s)


class ShortConv(nn.Module):
    """Causal depthwise convolution and SiLU: [B, T, D] -> [B, T, heads, size] of every part of the channels."""

    def __init__(self, parts: Parts, width: int, bias: bool = False):
        super().__init__()
        self.parts, channels = parts, parts.channels
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_parameters(self, generator: torch.Generator | None) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, seq: SequenceOps) -> tuple[Tensor, ...]:
        return seq.short_conv(x, self.weight, self.bias, self.parts)


class GatedOutput(nn.Module):
    """o [B, T, H, V] -> [B, T, hidden]: RMSNorm of every head, a gate computed from the layer's input x, projection."""

    def __init__(self, hidden: int, heads: int, value_dim: int, activation: Activation | None, eps: float):
        super().__init__()
        self.activation = activation
        self.norm = RMSNorm(value_dim, eps=eps)
        self.gate_proj = nn.Linear(hidden, heads * value_dim, bias=False) if activation else None
        self.out_proj = nn.Linear(heads * value_dim, hidden, bias=False)

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        if self.activation is None or self.gate_proj is None:
            return product(self.out_proj, self.norm(o).flatten(2))
        return product(
            self.out_proj,
            _norm_and_gate(o, product(self.gate_proj, x), self.norm.weight, self.activation, self.norm.eps),
        )


@fused
def _norm_and_gate(o: Tensor, gate: Tensor, weight: Tensor, activation: Activation, eps: float | None) -> Tensor:
    return F.rms_norm(o, o.shape[-1:], weight.to(o.dtype), eps).flatten(2) * activation(gate)


class SwiGLU(nn.Module):
    """The gated MLP of arXiv:2002.05202: [B, T, hidden] -> [B, T, hidden]."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.out_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if in_tiles() and type(self.gate_up_proj) is type(self.out_proj) is nn.Linear:  # and no adapter around one
            return gated_mlp(x, self.gate_up_proj.weight, self.out_proj.weight)
        return product(self.out_proj, swiglu(product(self.gate_up_proj, x)))
