"""The mean of a loss over valid tokens on all ranks."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import checks
from lasp.kernels.autocast import Function
from lasp.kernels.dtypes import accumulation_dtype
from lasp.parallel import comm
from lasp.parallel.comm import Group


def check_mean(loss_sum: Tensor, count: Tensor) -> dict[str, object]:
    """What all ranks have to agree on. Raises ValueError for what is no sum and its count."""
    checks.tensor("loss_sum", loss_sum)
    checks.require(loss_sum.is_floating_point(), "loss_sum", f"dtype {loss_sum.dtype}", "floating point")
    checks.shape("loss_sum", loss_sum, (), "a scalar")
    if isinstance(count, Tensor):
        checks.shape("count", count, (), "a scalar")
    else:
        checks.number("count", count, Real, "a number")
    return {"loss_sum": accumulation_dtype(loss_sum)}


def global_mean(loss_sum: Tensor, count: Tensor, group: Group) -> Tensor:
    """Σ loss_sum / Σ count over the ranks of `group`, the same on each; 0 if no rank counts anything.

    The gradient of each rank's loss_sum is that of the mean, 1 / Σ count: parameters' gradients then add up over the
    ranks to the gradient of the mean, and no factor of the world size appears anywhere.
    """
    return _GlobalMean.apply(loss_sum, count, group)


class _GlobalMean(Function):
    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, count: Tensor, group: Group) -> Tensor:
        dtype = accumulation_dtype(loss_sum)
        both = torch.stack([loss_sum.to(dtype), torch.as_tensor(count, device=loss_sum.device).to(dtype)])
        total, number = comm.all_reduce(both, group).wait()
        number = number.where(number != 0, 1)
        ctx.save_for_backward(number)
        ctx.dtype = loss_sum.dtype
        return total / number

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        (number,) = ctx.saved_tensors
        return (d / number).to(ctx.dtype), None, None
