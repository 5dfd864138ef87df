"""Low-rank adapters (LoRA, arXiv:2106.09685) as parametrizations of weights: the layers stay what they are."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lasp.config import LINEAR
from lasp.models import Decoder

ADAPTED = ("qkv_proj", "xbc_proj", "out_proj", "gate_up_proj")  # what has its weights of the teacher


class LowRank(nn.Module):
    """W -> W + up · down, with up [out, rank] 0 at first, and down [rank, in]."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, columns))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.normal_(self.down, std=columns**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def adapt(decoder: Decoder, rank: int) -> None:
    """Leaves to be trained adapters of the layers' projections, and what else the linear mixers have.

    Of rank 0 everything is trained, without adapters.
    """
    if rank == 0:
        return
    decoder.requires_grad_(False)
    block: nn.Module
    for letter, block in zip(decoder.config.layers, decoder.layers, strict=True):
        if letter == LINEAR:
            block.get_submodule("mixer").requires_grad_(True)
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ADAPTED:
                module.weight.requires_grad_(False)
                parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))


@torch.no_grad()
def merge(decoder: Decoder) -> None:
    """Makes the adapters a part of the weights."""
    for module in list(decoder.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
