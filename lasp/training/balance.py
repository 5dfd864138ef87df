"""Once a step, after the optimiser's: how busy the experts were, over all ranks and contexts, and their biases."""

from collections.abc import Callable

import torch
from torch import Tensor

from lasp.models import Decoder


def balance_experts(
    model: Decoder, all_ranks: Callable[[Tensor], Tensor], halted: Tensor | None = None
) -> dict[str, Tensor]:
    """Moves the biases of the model's routers, if they have any, and returns what to report of the step, on the device.

    all_ranks: sums a tensor over the world. halted: as of an engine, if there is one; where it is 1 nothing moves.

    Returns:
        balance_loss: the part of the step's loss that stems from the balancing losses.
        expert_load: the tokens of the busiest expert / those of the mean one, in the layer where that is largest.
    """
    load, loss, labels = model.balance.take()
    total = all_ranks(torch.cat([load.flatten().double(), torch.stack([loss, labels.double()])]))
    load, (loss, labels) = total[:-2].view_as(load), total[-2:]
    model.move_expert_biases(load if halted is None else load * (1 - halted))
    busiest = (load.amax(-1) / load.mean(-1)).max()
    return {"balance_loss": loss / labels.clamp(min=1), "expert_load": busiest}
