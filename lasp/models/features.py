"""Feature maps of linear attention: what q and k become, so that q·k may stand for a softmax layer's exp(q·k)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.config import ModelConfig


def identity(x: Tensor) -> Tensor:
    return x


def elu_plus_one(x: Tensor) -> Tensor:
    return F.elu(x) + 1


_FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "elu": elu_plus_one,
    "relu": F.relu,
    "silu": F.silu,
}


class Hedgehog(nn.Module):
    """softmax(W x) and softmax(-W x) side by side, with a W of each head, the identity at first (arXiv:2402.04347).

    [B, T, H, K] -> [B, T, H, 2 K]
    """

    def __init__(self, heads: int, key_dim: int):
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(heads * key_dim, key_dim))

    def init_parameters(self, generator: torch.Generator | None) -> None:
        self.weight.copy_(torch.eye(self.weight.shape[1]).repeat(self.heads, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bthk,hjk->bthj", x, self.weight.to(x.dtype).unflatten(0, (self.heads, -1)))
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)


def feature_map(name: str, config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """A new one, of q or of k."""
    return Hedgehog(config.num_heads, config.key_dim) if name == "hedgehog" else _FIXED[name]


def feature_dim(config: ModelConfig) -> int:
    """Features of q and k in each head."""
    return 2 * config.key_dim if config.feature_map == "hedgehog" else config.key_dim
