"""Chains of pointwise operations that a GPU is to run as one kernel in each direction."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def is_large(x: Tensor) -> bool:
    """On a GPU, and of so many numbers that memory takes longer than to look up what was compiled."""
    return x.is_cuda and x.numel() >= 2**20


def by_kernel(x: Tensor) -> bool:
    """Whether a chain that has a Triton kernel of lasp's is to be that kernel.

    Of small tensors plain operations are over before it has started; what is compiled as a whole sees to itself.
    """
    return not torch.compiler.is_compiling() and is_large(x) and x.dtype != torch.float64


def fused(function: Callable[Concatenate[Tensor, Rest], Result]) -> Callable[Concatenate[Tensor, Rest], Result]:
    """`function`, a chain of tensor operations, compiled by PyTorch where its first argument is large.

    Kernel by kernel such a chain reads and writes memory at every step, and keeps what backward needs of each; fused it
    reads its inputs, writes its outputs, and keeps little but its inputs. It is compiled once for each dtype, and from
    the second length on for all lengths. Differentiable once.
    """
    compiled = cache(lambda: torch.compile(function))

    @wraps(function)
    def call(x: Tensor, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        at_once = not torch.compiler.is_compiling() and is_large(x)  # in this order: compilers take sizes for facts
        return (compiled() if at_once else function)(x, *args, **kwargs)

    return call
