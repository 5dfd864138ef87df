"""Tensors that outlive the call that made them."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

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


def kept(most: int) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Keeps what a function of hashable arguments, of which the last is the device, made of the `most` that were asked
    for last.

    Every stream has its own: what is made on one may not be there yet for another, and its memory, given back, is that
    stream's. Only what is captured takes another's if it has none, for it has to be there before; and since a graph
    goes on reading it, that is kept for good.
    """

    def decorate(make: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        captured: dict[tuple[Any, ...], dict[int, Result]] = {}
        make = lasting(make)

        @lru_cache(most)
        def of_streams(*args: Any) -> dict[int, Result]:
            return {}

        @wraps(make)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            stream, capturing = _stream(args[-1])
            found = captured.get(args) or of_streams(*args)
            if not capturing:
                if stream not in found:
                    found[stream] = make(*args, **kwargs)
                return found[stream]
            if not found:
                return make(*args, **kwargs)  # nothing is in it before the graph runs
            captured[args] = found
            return found[stream if stream in found else next(iter(found))]

        return call

    return decorate


def _stream(device: Any) -> tuple[int, bool]:
    """The current one, and whether it is being captured."""
    if device.type != "cuda":
        return 0, False
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index), torch.cuda.is_current_stream_capturing()
