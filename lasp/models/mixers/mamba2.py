"""Mamba-2 (arXiv:2405.21060)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.config import ModelConfig
from lasp.kernels.parts import Part, Parts
from lasp.models.decays import SoftplusDecay
from lasp.models.layers import RMSNorm, ShortConv
from lasp.models.products import product
from lasp.models.sequence import SequenceOps


class Mamba2Mixer(nn.Module):
    """S_t = exp(-a dt_t) S_{t-1} + B_t (dt_t x_t)ᵀ, o_t = S_tᵀ C_t + D x_t, per head; B and C are shared by all heads.

    In the words of linear attention B is k, C is q and dt x is v; x, B and C come from a short convolution.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.heads = config.num_heads
        inner = self.heads * config.value_dim
        self.sizes = [inner, config.key_dim, config.key_dim]
        parts = Parts(1, tuple(map(Part, self.sizes)))
        self.xbc_proj = nn.Linear(config.hidden_size, parts.channels, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.conv = ShortConv(parts, config.conv_width, bias=True)
        self.decay = SoftplusDecay(config.hidden_size, self.heads, start=config.decay_init)
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = RMSNorm(inner, eps=config.norm_eps)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def init_parameters(self, generator: torch.Generator | None) -> None:
        nn.init.ones_(self.D)

    def forward(self, hidden: Tensor, seq: SequenceOps) -> Tensor:
        x, b, c = self.conv(product(self.xbc_proj, hidden), seq)
        x = x.flatten(2).unflatten(-1, (self.heads, -1))
        dt = self.decay.dt(hidden)
        v = (x * dt[..., None]).to(x.dtype)
        o = self.attend(hidden, seq, c, b, v, self.decay.decay(dt))
        o = o + x * self.D.to(x.dtype)[:, None]
        return product(self.out_proj, self.norm(o.flatten(2) * F.silu(product(self.gate_proj, hidden))))

    def attend(self, hidden: Tensor, seq: SequenceOps, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        """o_t = S_tᵀ q_t."""
        return seq.linear_attention(q, k, v, decay, scale=1.0)[0]
