"""RMSNorm (arXiv:1910.07467) of a residual stream, with the addition before it; on GPUs one Triton kernel in each
direction.

    s = x + h      y = w ⊙ ŝ,  ŝ = s / sqrt(mean(s²) + eps)      the mean being over the channels
    d = ds + (w ⊙ dy - ŝ mean(w ⊙ dy ⊙ ŝ)) / sqrt(mean(s²) + eps), for x and for h      dw = Σ dy ⊙ ŝ

ds is the gradient of s as a residual: what goes around the norm and what goes through it meet in float32.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.autocast import Function
from lasp.kernels.fused import by_kernel
from lasp.kernels.once_differentiable import once_differentiable

WIDEST = 8192  # channels that the kernel takes: a program has all of a token's


def add_rms_norm(x: Tensor, h: Tensor | None, weight: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """(s, y): x + h, or x if there is no h, and its RMSNorm. x, h [..., D], weight [D]; all of one dtype.

    eps: of float32 (float64 for float64), if None, as PyTorch's.
    Differentiable as often as PyTorch's own; by the kernel once.
    """
    if by_kernel(x) and x.shape[-1] <= WIDEST:
        return _AddRMSNorm.apply(x, h, weight, eps)
    s = x if h is None else x + h
    return s, F.rms_norm(s, s.shape[-1:], weight, eps)


class _AddRMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor | None, weight: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
        from lasp.kernels.triton.rms_norm import add_rms_norm

        s, y, scale = add_rms_norm(x, h, weight, eps)
        ctx.save_for_backward(s, scale, weight)
        ctx.set_materialize_grads(False)
        return s.view_as(s), y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return ds, ds if ctx.needs_input_grad[1] else None, None, None
        from lasp.kernels.triton.rms_norm import rms_norm_grad

        s, scale, weight = ctx.saved_tensors
        d, dw = rms_norm_grad(s, scale, weight, ds, dy)
        return d, d if ctx.needs_input_grad[1] else None, dw, None
