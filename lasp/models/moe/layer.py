"""The mixture of experts that stands in a block's MLP's place. N tokens, E experts, k experts per token."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lasp.config import ModelConfig
from lasp.kernels.experts import RowOrder, swiglu_experts, tally
from lasp.kernels.fused import fused
from lasp.models.layers import SwiGLU
from lasp.models.moe.router import Router, Routing
from lasp.models.sequence import SequenceOps


class Experts(nn.Module):
    """SwiGLU MLPs in two stacks of matrices, gate_up_proj [E, hidden, 2 I] and out_proj [E, I, hidden].

    run: (x, counts, *matrices) -> y as `swiglu_experts`; whoever spreads the experts over ranks puts their own here.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.std, self.layers = config.init_std, config.num_layers
        self.run: Callable[..., Tensor] = swiglu_experts
        hidden, intermediate = config.hidden_size, config.expert_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, hidden, 2 * intermediate))
        self.out_proj = nn.Parameter(torch.empty(config.num_experts, intermediate, hidden))

    def init_parameters(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.gate_up_proj, std=self.std, generator=generator)
        nn.init.normal_(self.out_proj, std=self.std * (2 * self.layers) ** -0.5, generator=generator)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, hidden] in the experts' order, counts [E] int64 rows for each -> [N, hidden]."""
        return self.run(x, counts, self.gate_up_proj, self.out_proj)


class MixtureOfExperts(nn.Module):
    """Σ over a token's k experts of weight · expert(x), and the shared experts of every token (arXiv:2401.06066).

    No token is dropped, however many choose one expert. The shared experts are one MLP, as wide as all of them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        shared = config.num_shared_experts * config.expert_size
        self.shared = SwiGLU(config.hidden_size, shared) if shared else None

    def forward(self, x: Tensor, seq: SequenceOps) -> tuple[Tensor, Routing]:
        """[B, T, hidden] -> the same, and the router's sums. Padding counts nowhere; its experts weigh nothing."""
        tokens = x.flatten(0, 1)
        valid = seq.valid.to(x.device).expand(x.shape[:2]).flatten()
        chosen, weights, routing = self.router(tokens, valid)
        mixed = mix(tokens, chosen, weights, self.experts, self.router.experts).view_as(x)
        return mixed if self.shared is None else mixed + self.shared(x), routing


def mix(x: Tensor, chosen: Tensor, weights: Tensor, experts: Callable[[Tensor, Tensor], Tensor], number: int) -> Tensor:
    """Σ over the k experts [N, k] int64 that x's rows [N, D] chose of weight [N, k] · expert(x): [N, D].

    experts: of which there are `number`; called as `Experts` is.
    """
    copies = chosen.shape[1]
    by_expert = RowOrder.sorting(chosen.flatten())
    y = experts(by_expert.apply(x, copies), tally(chosen.flatten(), number))
    return _weighted_sum(by_expert.undo(y).unflatten(0, (-1, copies)), weights)


@fused
def _weighted_sum(y: Tensor, weights: Tensor) -> Tensor:
    """[N, k, D], [N, k] -> [N, D] in y's dtype."""
    return (y * weights[..., None].to(y.dtype)).sum(1)
