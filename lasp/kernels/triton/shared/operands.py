"""Tensors as the kernels take and give them."""

from typing import TypeVar

import torch
from torch import Tensor

from lasp.kernels.inputs import Inputs
from lasp.kernels.layouts import laid_out

Call = TypeVar("Call", bound=Inputs)


def contiguous(x: Call) -> Call:
    """The same inputs, laid out as the kernels assume.

    Copies have to live until their half of the op has ended, since kernels that overlap may get their memory (see pdl).
    """
    return x.having({name: laid_out(t) if name in "qkv" else t.contiguous() for name, t in x.tensors.items()})


def per_q_head(d: Tensor, q: Tensor) -> Tensor:
    """[B, T, H, K] -> [B, T, Hq, K]: the sum over the value heads that share a q/k head."""
    if d.shape[2] != q.shape[2]:
        d = d.unflatten(2, (q.shape[2], -1)).sum(3, dtype=torch.float32)
    return d.to(q.dtype)
