"""Once a step, after the optimiser's: how busy the experts were, over all ranks and contexts, and their biases."""

from collections.abc import Callable

import torch
from torch import Tensor

from lasp.models import Decoder


def balance_experts(model: Decoder, all_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Moves the biases of the model's routers, if they have any, and returns what to report of the step.

    all_ranks: sums a tensor over the world.

    Returns:
        balance_loss: the part of the step's loss that stems from the balancing losses.
        expert_load: the tokens of the busiest expert / those of the mean one, in the layer where that is largest.
    """
    load, loss, labels = model.balance.take()
    total = all_ranks(torch.cat([load.flatten().double(), torch.stack([loss, labels.double()])]))
    load, (loss, labels) = total[:-2].view_as(load), total[-2:]
    model.move_expert_biases(load)
    busiest = (load.amax(-1) / load.mean(-1)).max()
    return {"balance_loss": (loss / labels.clamp(min=1)).item(), "expert_load": busiest.item()}
