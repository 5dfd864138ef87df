"""The mixers whose state only decays: linear attention and its relatives differ by data, not by code."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.config import ModelConfig
from lasp.kernels.fused import fused
from lasp.kernels.parts import Part, Parts
from lasp.models.decays import ConstantDecay, SigmoidDecay, lightning_decay, log_sigmoid, retention_decay
from lasp.models.features import elu_plus_one, feature_dim, feature_map, identity
from lasp.models.layers import Activation, GatedOutput, ShortConv, rotate
from lasp.models.products import product
from lasp.models.sequence import SequenceOps


@dataclass(frozen=True, kw_only=True)
class LinearKind:
    """What tells the mixers apart."""

    features: Activation = identity  # of q and k (of q alone with keys_from_decay)
    decay: Callable[[ModelConfig, int], nn.Module] | None = None  # from (config, layer)
    keys_from_decay: bool = False  # k's projection is a forget gate f: decay = log sigmoid(f), k = 1 - sigmoid(f)
    rotary: bool = False
    gate: Activation | None = None  # of the output


def _lightning(config: ModelConfig, layer: int) -> nn.Module:
    return ConstantDecay(config.num_heads, partial(lightning_decay, depth=layer / config.num_layers))


def _retention(config: ModelConfig, layer: int) -> nn.Module:
    return ConstantDecay(config.num_heads, retention_decay)


def _gla(config: ModelConfig, layer: int) -> nn.Module:
    return SigmoidDecay(config.hidden_size, config.num_heads, feature_dim(config))


LINEAR_KINDS = {
    # arXiv:2006.16236; an RMSNorm stands for the denominator, as in arXiv:2210.10340
    "linear": LinearKind(features=elu_plus_one),
    # Lightning Attention, arXiv:2401.04658, in TransNormerLLM's layer (arXiv:2307.14995), gate of arXiv:2501.08313
    "lightning": LinearKind(features=F.silu, decay=_lightning, gate=torch.sigmoid),
    # RetNet, arXiv:2307.08621
    "retention": LinearKind(decay=_retention, rotary=True, gate=F.silu),
    # Gated Linear Attention, arXiv:2312.06635
    "gla": LinearKind(decay=_gla, gate=F.silu),
    # HGRN2, arXiv:2404.07904, with a lower bound of 0 in every layer
    "hgrn2": LinearKind(features=F.silu, keys_from_decay=True),
}


class LinearMixer(nn.Module):
    """One of LINEAR_KINDS: S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t, then norm, gate and projection."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.kind = LINEAR_KINDS[config.mixer]
        self.heads, self.theta = config.num_heads, config.rope_theta
        self.sizes = [config.key_dim, config.key_dim, config.value_dim]
        self.qkv_proj = nn.Linear(config.hidden_size, self.heads * sum(self.sizes), bias=False)
        parts = Parts(self.heads, tuple(map(Part, self.sizes)))
        self.conv = ShortConv(parts, config.conv_width) if config.short_conv else None
        self.q_features = self.k_features = self.kind.features
        if config.feature_map is not None:
            self.q_features, self.k_features = (feature_map(config.feature_map, config) for _ in "qk")
        self.decay = self.kind.decay(config, layer) if self.kind.decay else None
        self.output = GatedOutput(config.hidden_size, self.heads, config.value_dim, self.kind.gate, config.norm_eps)

    def forward(self, x: Tensor, seq: SequenceOps) -> Tensor:
        qkv = product(self.qkv_proj, x)
        if self.conv is not None:
            q, k, v = self.conv(qkv, seq)
        else:
            q, k, v = qkv.unflatten(-1, (self.heads, -1)).split(self.sizes, dim=-1)
        decay = self.decay(x) if self.decay is not None else None
        if self.kind.rotary and self.theta is not None:
            q, k = (rotate(y, seq.positions, self.theta) for y in (q, k))
        q = self.q_features(q)
        if self.kind.keys_from_decay:
            decay, k = _forget_gate(k)
        else:
            k = self.k_features(k)
        o, _ = seq.linear_attention(q, k, v, decay)
        return self.output(o, x)


@fused
def _forget_gate(f: Tensor) -> tuple[Tensor, Tensor]:
    """log sigmoid(f), in float32 at least, and 1 - sigmoid(f)."""
    decay = log_sigmoid(f)
    return decay, -torch.expm1(decay).to(f.dtype)
