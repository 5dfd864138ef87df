"""Tensors that outlive the call that made them."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def lasting(make: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`make`, whose result is kept: also when first asked for in inference mode, it consists of tensors that autograd
    may save, not of those that are good for nothing but inference."""

    @wraps(make)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return make(*args, **kwargs)
        return make(*args, **kwargs)

    return call
