"""Where decays come from: constants of the head, or gates computed from the layer's input x [B, T, hidden].

Every module returns natural logarithms <= 0, in float32 (float64 for float64).
"""

import math
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.kernels.fused import fused
from lasp.models.layers import WideBuffers, at_least_float32
from lasp.models.products import product


def retention_decay(heads: int) -> Tensor:
    """[H] log(1 - 2^(-5 - h)), h = 0 … H-1 (RetNet, arXiv:2307.08621)."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float64)))


def lightning_decay(heads: int, depth: float) -> Tensor:
    """[H] -2^(-8h/H) (1 - depth), h = 1 … H: ALiBi's slopes (arXiv:2108.12409), fading with depth = layer / layers as
    in TransNormerLLM (arXiv:2307.14995)."""
    return -torch.exp2(-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads) * (1 - depth)


class ConstantDecay(WideBuffers):
    """[H], the same at every token; a buffer, without gradient."""

    log_decay: Tensor

    def __init__(self, heads: int, values: Callable[[int], Tensor]):
        super().__init__()
        self.values = values
        self.register_buffer("log_decay", at_least_float32(torch.empty(heads)), persistent=False)

    def init_parameters(self, generator: torch.Generator | None) -> None:
        self.log_decay.copy_(self.values(self.log_decay.numel()))

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        dtype = self.log_decay.dtype
        super()._apply(fn, recurse)
        if self.log_decay.dtype == torch.float64 != dtype:  # of float32's the last digits are missing
            self.init_parameters(None)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.log_decay


def low_rank(hidden: int, rank: int, out: int, bias: bool) -> nn.Module:
    """hidden -> rank -> out."""
    return nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, out, bias=bias))


class SigmoidDecay(nn.Module):
    """[B, T, H, K] log(sigmoid(low-rank x)) / 16 (GLA, arXiv:2312.06635)."""

    RANK, TEMPERATURE = 16, 16

    def __init__(self, hidden: int, heads: int, key_dim: int):
        super().__init__()
        self.shape = heads, key_dim
        self.proj = low_rank(hidden, self.RANK, heads * key_dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return log_sigmoid(product(self.proj, x), 1 / self.TEMPERATURE).unflatten(-1, self.shape)


class SoftplusDecay(nn.Module):
    """-exp(A_log) dt with dt = softplus(projected x + dt_bias) (Mamba-2, arXiv:2405.21060).

    Per head, [B, T, H], from one linear projection; or per channel, [B, T, H, K], from one of low rank (KDA,
    arXiv:2510.26692). A_log is [H].
    """

    A_RANGE, DT_RANGE = (1.0, 16.0), (1e-3, 1e-1)

    def __init__(self, hidden: int, heads: int, key_dim: int | None = None, start: float = 1.0):
        super().__init__()
        self.start = start
        self.shape: tuple[int, ...] = (heads,)
        self.proj: nn.Module = nn.Linear(hidden, heads, bias=False)
        if key_dim is not None:
            self.shape = heads, key_dim
            self.proj = low_rank(hidden, key_dim, heads * key_dim, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(math.prod(self.shape)))

    def init_parameters(self, generator: torch.Generator | None) -> None:
        """A uniform in A_RANGE, times `start`; dt, where the projection gives 0, log-uniform in DT_RANGE."""
        low, high = map(math.log, self.DT_RANGE)
        nn.init.uniform_(self.A_log, *self.A_RANGE, generator=generator).mul_(self.start).log_()
        nn.init.uniform_(self.dt_bias, low, high, generator=generator)
        dt = self.dt_bias.exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def dt(self, x: Tensor) -> Tensor:
        return biased_softplus(product(self.proj, x).unflatten(-1, self.shape), self.dt_bias.view(self.shape))

    def decay(self, dt: Tensor) -> Tensor:
        return times_rate(dt, self.A_log)

    def forward(self, x: Tensor) -> Tensor:
        return softplus_decay(
            product(self.proj, x).unflatten(-1, self.shape), self.dt_bias.view(self.shape), self.A_log
        )


@fused
def log_sigmoid(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale · log(sigmoid(x))."""
    return scale * F.logsigmoid(at_least_float32(x))


@fused
def biased_softplus(x: Tensor, bias: Tensor) -> Tensor:
    """softplus(x + bias)."""
    return F.softplus(at_least_float32(x) + at_least_float32(bias))


def times_rate(dt: Tensor, A_log: Tensor) -> Tensor:
    """-exp(A_log) dt, of dt [B, T, H] or [B, T, H, K] and A_log [H]."""
    return -at_least_float32(A_log).exp().view(-1, *(1,) * (dt.ndim - 3)) * dt


@fused
def softplus_decay(x: Tensor, bias: Tensor, A_log: Tensor) -> Tensor:
    """The two together."""
    return times_rate(biased_softplus(x, bias), A_log)
