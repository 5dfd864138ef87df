"""How the delta rule's kernels are launched, by head size and dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.triton.config import block_of


@dataclass(frozen=True)
class Launch:
    """block: columns of V (of K in `gradients`) that a program holds at most; block_v: rows there, of V."""

    block: int
    warps: int
    stages: int
    block_v: int = 128


@dataclass(frozen=True)
class DeltaConfig:
    """One launch per kernel. precision: of products of fp32 numbers."""

    summary: Launch
    transition: Launch
    outputs: Launch
    states: Launch
    down: Launch
    gradients: Launch
    precision: str


def delta_config(k: Tensor, v: Tensor) -> DeltaConfig:
    """From a table, never from the length of a sequence."""
    widest = block_of(max(k.shape[-1], v.shape[-1]))
    if v.dtype == torch.bfloat16 and widest <= 128:
        ahead, walk = Launch(64, warps=4, stages=3), Launch(64, warps=4, stages=2)
        outputs = Launch(128, warps=8, stages=2) if widest == 128 else walk
        return DeltaConfig(ahead, ahead, outputs, ahead, walk, Launch(32, warps=4, stages=2), "tf32")
    if v.dtype == torch.bfloat16:
        walk = Launch(64, warps=8, stages=1)
        return DeltaConfig(walk, walk, walk, walk, walk, Launch(64, warps=4, stages=1), "tf32")
    walk = Launch(64 if widest <= 128 else 32, warps=4 if widest <= 64 else 8, stages=1)
    return DeltaConfig(walk, walk, walk, walk, walk, Launch(32, warps=8, stages=1, block_v=64), "tf32x3")
