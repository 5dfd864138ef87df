"""Log-linear Mamba-2 and Gated DeltaNet (arXiv:2506.04761): those mixers on a sequence that tells levels of the past
apart, with weights of the levels computed from each token."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.config import ModelConfig
from lasp.models.layers import at_least_float32
from lasp.models.mixers.delta import DeltaMixer
from lasp.models.mixers.mamba2 import Mamba2Mixer
from lasp.models.sequence import SequenceOps

LEVELS = 24  # contexts of up to 2^23 tokens


class LevelScales(nn.Module):
    """[B, T, H, LEVELS] softplus of a projection of x [B, T, hidden], 1 at all levels where that is 0; float32."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.proj = nn.Linear(hidden, heads * LEVELS, bias=False)
        self.bias = nn.Parameter(torch.empty(heads * LEVELS))

    def init_parameters(self, generator: torch.Generator | None) -> None:
        nn.init.constant_(self.bias, torch.tensor(1.0, dtype=torch.float64).expm1().log().item())

    def forward(self, x: Tensor) -> Tensor:
        scales = F.softplus(at_least_float32(self.proj(x)) + at_least_float32(self.bias))
        return scales.unflatten(-1, (self.heads, LEVELS))


class _Leveled:
    """A `seq` whose linear attention and delta rule weigh levels."""

    def __init__(self, seq: Any, level_scales: Tensor):
        self._seq, self._level_scales = seq, level_scales

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seq, name)

    def linear_attention(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return self._seq.log_linear_attention(q, k, v, decay, self._level_scales, scale=scale)

    def delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None = None, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return self._seq.log_linear_delta_rule(q, k, v, beta, decay, self._level_scales, scale=scale)


class LogLinearMamba2Mixer(Mamba2Mixer):
    """o_t = Σ_l λ_t^(l) S_t^(l)ᵀ C_t + D x_t, with the states of all levels updated as Mamba-2's is."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.level_scales = LevelScales(config.hidden_size, config.num_heads)

    def forward(self, hidden: Tensor, seq: SequenceOps) -> Tensor:
        return super().forward(hidden, _Leveled(seq, self.level_scales(hidden)))


class LogLinearDeltaMixer(DeltaMixer):
    """o_t = Σ_l λ_t^(l) S_t^(l)ᵀ q_t, with the states of all levels updated as Gated DeltaNet's is."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(replace(config, mixer="gated_delta_net"), layer)
        self.level_scales = LevelScales(config.hidden_size, config.num_heads)

    def forward(self, x: Tensor, seq: SequenceOps) -> Tensor:
        return super().forward(x, _Leveled(seq, self.level_scales(x)))
