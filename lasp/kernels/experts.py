"""What mixtures of experts compute: rows put in the experts' order, and a matrix of its own for each expert's rows.

N rows, E experts, D and M channels. `counts` [E] int64 says how many rows each expert has; they sum to N.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.autocast import Function
from lasp.kernels.layouts import laid_out
from lasp.kernels.swiglu import swiglu
from lasp.kernels.traced import traced

# torch 2.13 documents the first name; older versions have only the second.
_grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
_ALIGNMENT = 8  # channels: its rows begin at multiples of 16 bytes


def swiglu_experts(x: Tensor, counts: Tensor, gate_up: Tensor, out: Tensor) -> Tensor:
    """The gated MLP of arXiv:2002.05202, one for each expert.

    x [N, D] in the experts' order, gate_up [E, D, 2 I], out [E, I, D] -> [N, D].
    """
    return grouped_matmul(swiglu(grouped_matmul(x, gate_up, counts)), out, counts)


def _like_products(x: Tensor, weights: Tensor, counts: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weights.shape[2])]


@traced(_like_products)
def grouped_matmul(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """x [N, D] in the experts' order, weights [E, D, M] -> [N, M]: each row times its expert's matrix.

    One kernel, which never waits for the host, in bfloat16 on GPUs where D and M are multiples of 8; else expert by
    expert, for which the counts are read on the host.
    """
    aligned = all(channels % _ALIGNMENT == 0 for channels in weights.shape[1:])
    if x.is_cuda and x.dtype == weights.dtype == torch.bfloat16 and aligned and len(x):
        return grouped_matmul_fused(x, weights, counts)
    parts = x.split(counts.tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


def grouped_matmul_fused(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """`grouped_matmul` as one kernel. N at least 1, D and M multiples of 8."""
    y = _grouped_mm(laid_out(x), laid_out(weights), offs=counts.cumsum(0).to(torch.int32))
    if y.requires_grad:
        y.register_hook(laid_out)
    return y


def tally(ids: Tensor, experts: int, times: Tensor | None = None) -> Tensor:
    """[experts] int64: how often each number occurs in ids [N] (row i counted times[i] times); no host involved."""
    times = torch.ones_like(ids) if times is None else times.to(ids.dtype)
    return ids.new_zeros(experts).scatter_add_(0, ids, times)


@dataclass(frozen=True)
class RowOrder:
    """A permutation of rows: row i of the result is row order[i]; `inverse` leads back. [N] int64 both."""

    order: Tensor
    inverse: Tensor

    @staticmethod
    def sorting(ids: Tensor) -> "RowOrder":
        """That which puts rows with ids [N] in the order of their ids, and equal ones in the order they had."""
        order = ids.argsort(stable=True)
        places = torch.arange(len(order), device=ids.device)
        return RowOrder(order, torch.empty_like(order).scatter_(0, order, places))

    def apply(self, x: Tensor, copies: int = 1) -> Tensor:
        """x [N / copies, D], each row standing for `copies` equal ones, in this order: [N, D]."""
        return _Permute.apply(x, self.order, self.inverse, copies)

    def undo(self, x: Tensor) -> Tensor:
        """x [N, D] in the order there was before."""
        return _Permute.apply(x, self.inverse, self.order, 1)


class _Permute(Function):
    """Both directions read rows: adding them up, as indexing's own backward does, has no fixed order on GPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[order // copies] if copies > 1 else x[order]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        d = d[inverse]
        return d.unflatten(0, (-1, ctx.copies)).sum(1) if ctx.copies > 1 else d, None, None, None
