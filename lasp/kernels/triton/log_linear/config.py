"""How the kernels are launched: a small table keyed on head size and dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogLinearConfig:
    """leaf: tokens that see each other pair by pair. chunk: those of one step. piece: leaves whose queries one program
    sums up. widest: columns of a result that one program holds."""

    leaf: int = 256
    chunk: int = 64
    piece: int = 16
    widest: int = 128
    warps: int = 4
    stages: int = 2
    precision: str = "tf32"  # of products in fp32, where states meet fp16 inputs


def log_linear_config(k: Tensor, v: Tensor) -> LogLinearConfig:
    """For these head sizes and dtype."""
    if v.dtype == torch.float32:
        return LogLinearConfig(leaf=128, chunk=32, widest=64, warps=8, stages=1, precision="ieee")
    if max(k.shape[-1], v.shape[-1]) > 128:
        return LogLinearConfig(chunk=32, widest=64, warps=8, stages=1)
    return LogLinearConfig()
