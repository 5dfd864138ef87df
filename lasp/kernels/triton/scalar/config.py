"""How the kernels are launched: a small table keyed on head size and dtype, never on the length of a sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.triton.device import is_roomy


@dataclass(frozen=True)
class ScalarConfig:
    """chunk: tokens per step of a scan. widest: columns of the state that one program of a scan holds.

    max_log2_decay: the largest decay of a chunk, as a power of two, whose weights are products (see chunk_scan):
        2^{max_log2_decay/2} must leave room in the dtype, and its exponent's rounding must not show in fp32.
    """

    chunk: int
    warps: int
    stages: int
    widest: int
    state_stages: int = 3
    max_log2_decay: float = 160.0
    precision: str = "tf32"  # of products in fp32, where states meet fp16 inputs


def scalar_config(k: Tensor, v: Tensor, gated: bool) -> ScalarConfig:
    """The configuration of the scalar classes' kernels for these head sizes and dtype."""
    widest = max(k.shape[-1], v.shape[-1])
    if v.dtype == torch.float32:
        return ScalarConfig(
            chunk=32, warps=8, stages=1, widest=64, state_stages=1, max_log2_decay=32.0, precision="ieee"
        )
    max_log2_decay = 16.0 if v.dtype == torch.float16 else 160.0
    if widest > 128:
        return ScalarConfig(chunk=64, warps=8, stages=1, widest=64, max_log2_decay=max_log2_decay)
    if widest > 64 and not gated and (v.dtype == torch.bfloat16 or is_roomy(v.device)):
        return ScalarConfig(chunk=128, warps=8, stages=2, widest=128)
    return ScalarConfig(chunk=64, warps=4, stages=2, widest=64, max_log2_decay=max_log2_decay)
