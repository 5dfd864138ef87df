"""Backward passes of which there is no derivative."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Backward = Callable[..., Any]


def once_differentiable(backward: Backward) -> Backward:
    """`backward` of an autograd function. Who wants the graph of gradients (`create_graph=True`) gets a RuntimeError.

    PyTorch's decorator of this name lets gradients pass for constants: always, where those that come in have no graph,
    and of what `torch.autograd.grad` is asked for, since its refusal hangs on no input. Second derivatives would lack,
    without a word, what this function adds to them.
    """

    @wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            name = backward.__qualname__.removesuffix(".backward")
            raise RuntimeError(f"{name}: got create_graph=True, expected False: its gradients have no derivatives")
        return backward(ctx, *grads)

    return call
