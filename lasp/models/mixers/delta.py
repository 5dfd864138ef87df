"""The delta-rule family: DeltaNet, Gated DeltaNet and Kimi Delta Attention differ by their decay and gate, Gated
DeltaProduct by the number of its steps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.config import ModelConfig
from lasp.kernels.parts import Part, Parts
from lasp.models.decays import SoftplusDecay
from lasp.models.layers import Activation, GatedOutput, ShortConv, at_least_float32
from lasp.models.products import product
from lasp.models.sequence import SequenceOps


@dataclass(frozen=True, kw_only=True)
class DeltaKind:
    """decay: its module, from the config; gate: of the output; negative: β lies in (0, 2), so that I - β k kᵀ, with
    eigenvalues down to -1, may turn a direction around (arXiv:2411.12537)."""

    decay: Callable[[ModelConfig], nn.Module] | None
    gate: Activation
    negative: bool = False


def _of_heads(config: ModelConfig) -> nn.Module:
    return SoftplusDecay(config.hidden_size, config.num_heads, start=config.decay_init)


DELTA_KINDS = {
    # arXiv:2406.06484, with the output gate of its successor
    "delta_net": DeltaKind(decay=None, gate=F.silu),
    # arXiv:2412.06464
    "gated_delta_net": DeltaKind(decay=_of_heads, gate=F.silu),
    # arXiv:2502.10297
    "gated_delta_product": DeltaKind(decay=_of_heads, gate=F.silu, negative=True),
    # arXiv:2510.26692; the output gate's projection has full rank here
    "kda": DeltaKind(
        decay=lambda c: SoftplusDecay(c.hidden_size, c.num_heads, c.key_dim, c.decay_init), gate=torch.sigmoid
    ),
}


class DeltaMixer(nn.Module):
    """One of DELTA_KINDS: S_t = (I - β_t k_t k_tᵀ) Diag(exp g_t) S_{t-1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t.

    q and k have unit length and β lies in (0, 1), or (0, 2), so that no step enlarges the state.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        kind = DELTA_KINDS[config.plain_mixer]
        self.negative = kind.negative if config.negative_eigenvalues is None else config.negative_eigenvalues
        self.heads, self.steps = config.num_heads, (steps := config.steps)
        self.sizes = [config.key_dim, steps * config.key_dim, steps * config.value_dim]
        key = Part(config.key_dim, unit_length=True)
        parts = Parts(self.heads, (key, *[key] * steps, *[Part(config.value_dim)] * steps))
        self.qkv_proj = nn.Linear(config.hidden_size, parts.channels, bias=False)
        self.conv = ShortConv(parts, config.conv_width)
        self.beta_proj = nn.Linear(config.hidden_size, self.heads * steps, bias=False)
        self.decay = kind.decay(config) if kind.decay else None
        self.output = GatedOutput(config.hidden_size, self.heads, config.value_dim, kind.gate, config.norm_eps)

    def forward(self, x: Tensor, seq: SequenceOps) -> Tensor:
        q, *kv = self.conv(product(self.qkv_proj, x), seq)
        beta = at_least_float32(product(self.beta_proj, x)).sigmoid()
        decay = self.decay(x) if self.decay is not None else None
        k, v = self.together(kv)
        return self.output(self.attend(x, seq, q, k, v, 2 * beta if self.negative else beta, decay), x)

    def together(self, kv: list[Tensor]) -> list[Tensor]:
        """k and v, from those of each step."""
        return kv

    def attend(
        self, x: Tensor, seq: SequenceOps, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None
    ) -> Tensor:
        """o_t = S_tᵀ q_t."""
        return seq.delta_rule(q, k, v, beta, decay)[0]


class DeltaProductMixer(DeltaMixer):
    """n = `config.num_householder` steps of the delta rule for each token, each with a k, v and β of its own:
    S_t = Π_j (I - β_tj k_tj k_tjᵀ) exp(g_t) S_{t-1} + …, o_t = S_tᵀ q_t."""

    def together(self, kv: list[Tensor]) -> list[Tensor]:
        return [torch.stack(kv[: self.steps], 2), torch.stack(kv[self.steps :], 2)]

    def attend(
        self, x: Tensor, seq: SequenceOps, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None
    ) -> Tensor:
        return seq.delta_product(q, k, v, beta.unflatten(-1, (self.heads, self.steps)).mT, decay)[0]
