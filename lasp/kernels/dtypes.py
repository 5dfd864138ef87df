"""The dtype of sums: of states, gates, losses and whatever else is accumulated."""

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """That in which sums of numbers like x are taken: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
