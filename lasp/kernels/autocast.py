"""What torch.autocast does to lasp's operations: it may choose the dtype of their inputs, and nothing else.

An operation computes, exchanges and accumulates in the dtypes that it is given and in those that it states, forward,
backward and when it is recomputed.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

KINDS = ("cpu", "cuda")  # of devices that lasp computes on
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def exempt(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`function` with autocast off."""

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        for kind in KINDS:
            if torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return call(*args, **kwargs)
        return function(*args, **kwargs)

    return call


class Function(torch.autograd.Function):
    """An autograd function whose two directions are exempt from autocast."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name in ("forward", "backward"):
            setattr(cls, name, staticmethod(exempt(getattr(cls, name))))


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast in its dtype, as PyTorch's fused attention and matrix products take their inputs: all floating
    point numbers but float64. What is no tensor is left for others to refuse."""
    return tuple(x.to(torch.get_autocast_dtype(x.device.type)) if _is_cast(x) else x for x in tensors)


def unify(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`cast`, if the tensors differ in dtype; else as they are, so that who asks for float32 throughout gets it."""
    return cast(*tensors) if len({getattr(x, "dtype", None) for x in tensors}) > 1 else tensors


def _is_cast(x: Any) -> bool:
    if not isinstance(x, Tensor) or x.device.type not in KINDS or not torch.is_autocast_enabled(x.device.type):
        return False
    return x.is_floating_point() and x.dtype != torch.float64
