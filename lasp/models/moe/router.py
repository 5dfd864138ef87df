"""Which experts a token goes to, and with which weights. N tokens, E experts, k experts per token."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.config import ModelConfig
from lasp.kernels.experts import tally
from lasp.models.layers import WideBuffers, at_least_float32


class Routing(NamedTuple):
    """What a layer's router did with this rank's tokens, padding left out: sums, so that ranks' parts add up.

    counts: [E] int64, how many tokens chose each expert.
    scores: [E], every expert's scores, those of a token normalised to the sum 1. Differentiable.
    squared_z: scalar, (log Σ exp logits)² (arXiv:2202.08906). Differentiable.
    """

    counts: Tensor
    scores: Tensor
    squared_z: Tensor


class Router(WideBuffers):
    """Scores s = softmax(W x) or sigmoid(W x), of which the k highest are chosen; computed in float32 at least.

    With `expert_bias_rate` the choice, and nothing else, is by s + b, where b is moved after each step
    (arXiv:2408.15664): a buffer, saved with the model.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.experts, self.experts_per_token = config.num_experts, config.experts_per_token
        self.softmax, self.normalize = config.router_scores == "softmax", config.normalize_expert_weights
        self.rate = config.expert_bias_rate
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.bias: Tensor | None
        self.register_buffer("bias", at_least_float32(torch.zeros(config.num_experts)) if self.rate else None)

    def init_parameters(self, generator: torch.Generator | None) -> None:
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """x [N, hidden], valid [N] bool -> the chosen experts [N, k] int64, their weights [N, k], and the sums."""
        wide = at_least_float32(x)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(wide, self.proj.weight.to(wide.dtype))
        log_scores = logits.log_softmax(-1) if self.softmax else F.logsigmoid(logits)
        ranked = log_scores if self.bias is None else log_scores.exp() + self.bias
        chosen = ranked.detach().topk(self.experts_per_token).indices
        weights = log_scores.gather(-1, chosen)
        weights = weights.softmax(-1) if self.normalize else weights.exp()
        real = valid[:, None]
        routing = Routing(
            counts=tally(chosen.flatten(), self.experts, times=real.expand_as(chosen).flatten()),
            scores=log_scores.softmax(-1).where(real, 0).sum(0),
            squared_z=logits.logsumexp(-1).where(valid, 0).square().sum(),
        )
        return chosen, weights.where(real, 0), routing

    @torch.no_grad()
    def move_bias(self, load: Tensor) -> None:
        """b += rate * sign(mean load - load), with the load [E] of a whole step: equal on all ranks."""
        if self.bias is not None:
            self.bias += self.rate * (load.sum() - len(load) * load).sign().to(self.bias)
