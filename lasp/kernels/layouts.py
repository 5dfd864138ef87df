"""Where tensors lie in memory, for kernels that do not ask: what they cannot read is copied."""

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, of what GPUs load at once


def laid_out(x: Tensor) -> Tensor:
    """x in one piece that begins at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def in_rows(x: Tensor) -> Tensor:
    """x with every row [D] in one piece, no two rows in one place, and on a GPU each at a multiple of 16 bytes."""
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    fits = x.stride(-1) == 1 and all(stride >= x.shape[-1] for stride in strides)
    if x.is_cuda:
        fits &= all(place % ALIGNMENT == 0 for place in (x.data_ptr(), *(s * x.element_size() for s in strides)))
    return x if fits else x.clone(memory_format=torch.contiguous_format)
