"""Log-linear Mamba-2 and Gated DeltaNet (arXiv:2506.04761): those mixers with a state for each level of the past, and
weights of the levels computed from each token."""

import torch
from torch import Tensor, nn

from lasp.config import LEVELS, ModelConfig
from lasp.models.decays import biased_softplus
from lasp.models.mixers.delta import DeltaMixer
from lasp.models.mixers.mamba2 import Mamba2Mixer
from lasp.models.products import product
from lasp.models.sequence import SequenceOps


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
        return biased_softplus(product(self.proj, x), self.bias).unflatten(-1, (self.heads, LEVELS))


class LogLinearMamba2Mixer(Mamba2Mixer):
    """o_t = Σ_l λ_t^(l) S_t^(l)ᵀ C_t + D x_t, with the states of all levels updated as Mamba-2's is."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.level_scales = LevelScales(config.hidden_size, config.num_heads)

    def attend(self, hidden: Tensor, seq: SequenceOps, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        return seq.log_linear_attention(q, k, v, decay, self.level_scales(hidden), scale=1.0)[0]


class LogLinearDeltaMixer(DeltaMixer):
    """o_t = Σ_l λ_t^(l) S_t^(l)ᵀ q_t, with the states of all levels updated as Gated DeltaNet's is."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.level_scales = LevelScales(config.hidden_size, config.num_heads)

    def attend(
        self, x: Tensor, seq: SequenceOps, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None
    ) -> Tensor:
        return seq.log_linear_delta_rule(q, k, v, beta, decay, self.level_scales(x))[0]
