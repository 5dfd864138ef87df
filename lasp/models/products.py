"""Matrix products of layers: computed once where a part of the model runs twice, and the gated MLP in tiles.

D hidden size, I intermediate size, N tokens of all sequences.

A gated MLP has 3 I numbers for each token between its products, and their gradients: of a long context more than all
else of a layer. Where a layer is recomputed, or nobody wants a gradient, it works on tiles of tokens one after the
other, forward and backward, so that all of this is bounded by the tile. Backward needs the input alone, or, where
products are kept, the first product as well. Gradients of the weights are summed over the tiles in float32 at least.
"""

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.kernels.autocast import Function, cast
from lasp.kernels.dtypes import accumulation_dtype
from lasp.kernels.once import Results, is_kept, once, runs_twice
from lasp.kernels.once_differentiable import once_differentiable
from lasp.kernels.swiglu import swiglu, swiglu_and_grad

TILE = 2**28  # numbers in the first product of a tile: 512 MiB in bfloat16, 16,384 tokens with I = 8192


def product(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x), of a torch.nn.Linear or several in a row; where products are kept, computed once.

    What has taken a layer's place, such as an adapter around it, is called as it is.
    """
    if isinstance(linear, nn.Sequential):
        return reduce(lambda y, each: product(each, y), linear, x)
    if type(linear) is not nn.Linear or not is_kept():
        return linear(x)
    x, weight = cast(x, linear.weight)
    return _Product.apply(x, weight, None if linear.bias is None else linear.bias.to(weight.dtype))


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return once(lambda: F.linear(x, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = dy.flatten(0, -2)
        return (
            dy @ weight if for_x else None,
            rows.mT @ x.flatten(0, -2) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def gated_mlp(x: Tensor, gate_up: Tensor, out: Tensor) -> Tensor:
    """out (silu(gate x) ⊙ up x) in tiles. x [..., D], gate_up [2 I, D] (gate before up), out [D, I] -> [..., D]."""
    shape = x.shape
    x, gate_up, out = cast(x.flatten(0, -2), gate_up, out)
    if not torch.is_grad_enabled():
        return _forward(x, gate_up, out, None).view(shape)
    saved = _Saved()
    inputs = _Inputs.apply(saved, x, gate_up, out)
    return _GatedMLP.apply(saved, Results() if is_kept() else None, *inputs).view(shape)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, total [M, N] being in float32 at least; on GPUs within the product, which is then not rounded."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


def in_tiles() -> bool:
    """Whether MLPs work in tiles here: where a layer runs twice, or nobody wants a gradient."""
    return runs_twice() or not torch.is_grad_enabled()


def _forward(x: Tensor, gate_up: Tensor, out: Tensor, kept: Results | None) -> Tensor:
    y = x.new_empty(x.shape[0], out.shape[0])
    for rows in tiles(*_size(x, gate_up)):
        first = F.linear(x[rows], gate_up)
        if kept is not None:
            kept.add(first)
        torch.mm(swiglu(first), out.mT, out=y[rows])
    return y


def tiles(tokens: int, width: int) -> Iterator[slice]:
    """As few as hold at most TILE numbers, if there are so many in each of the tokens, and of about one length."""
    parts = -(-tokens * width // TILE) or 1
    length = -(-tokens // parts) or 1
    return (slice(start, min(start + length, tokens)) for start in range(0, tokens, length))


class _Saved:
    """The node of `_Inputs` that belongs to a `_GatedMLP`."""

    node: Any


class _Inputs(Function):
    """x, gate_up, out as they are; saved here, before the MLP is computed, so that a recomputation ends before it."""

    @staticmethod
    def forward(ctx: Any, saved: _Saved, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        saved.node = ctx
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *grads


class _GatedMLP(Function):
    @staticmethod
    def forward(ctx: Any, saved: _Saved, kept: Results | None, x: Tensor, gate_up: Tensor, out: Tensor) -> Tensor:
        ctx.saved, ctx.kept = saved, kept
        return _forward(x, gate_up, out, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, out = ctx.saved.node.saved_tensors
        _, _, for_x, for_gate_up, for_out = ctx.needs_input_grad
        dx = torch.empty_like(x) if for_x else None
        d_gate_up, d_out = _Sum(for_gate_up), _Sum(for_out)
        for rows in tiles(*_size(x, gate_up)):
            first = F.linear(x[rows], gate_up) if ctx.kept is None else ctx.kept.take()
            act, d_first = swiglu_and_grad(first, dy[rows] @ out)
            d_out.add(dy[rows], act)
            d_gate_up.add(d_first, x[rows])
            if dx is not None:
                torch.mm(d_first, gate_up, out=dx[rows])
        return None, None, dx, d_gate_up.total(gate_up.dtype), d_out.total(out.dtype)


def _size(x: Tensor, gate_up: Tensor) -> tuple[int, int]:
    return x.shape[0], gate_up.shape[0]


class _Sum:
    """Σ over tiles of dyᵀ x, for a weight of which somebody wants the gradient."""

    def __init__(self, wanted: bool):
        self.wanted = wanted
        self._sum: Tensor | None = None

    def add(self, dy: Tensor, x: Tensor) -> None:
        if not self.wanted:
            return
        if self._sum is None:
            self._sum = dy.mT @ x
        else:
            self._sum = self._sum.to(accumulation_dtype(x))
            add_product(self._sum, dy.mT, x)

    def total(self, dtype: torch.dtype) -> Tensor | None:
        return None if self._sum is None else self._sum.to(dtype)
