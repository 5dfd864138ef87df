"""Tensors that outlive the call that made them."""

from collections.abc import Callable
from functools import lru_cache, wraps
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


def kept(size: int) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """`lasting`, with the results of the last `size` arguments remembered, and for ever those with which a CUDA
    graph was made: it reads them in every replay."""

    def decorate(make: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        remembered: Callable[..., Result] = lru_cache(maxsize=size)(lasting(make))
        of_graphs: dict[int, Result] = {}

        @wraps(make)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            result = remembered(*args, **kwargs)
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                of_graphs[id(result)] = result
            return result

        return call

    return decorate
