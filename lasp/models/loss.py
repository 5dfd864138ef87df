"""Losses of a linear head, a chunk of tokens at a time: the [T, vocabulary] logits never exist whole."""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.config import require
from lasp.kernels.autocast import Function, cast
from lasp.kernels.cross_entropy import cross_entropy_and_grad
from lasp.kernels.dtypes import accumulation_dtype
from lasp.kernels.fused import fused
from lasp.kernels.once_differentiable import once_differentiable
from lasp.models.products import add_product

IGNORE = -100
CHUNK_TOKENS = 4096  # 4096 x 128256 logits are a gigabyte in bfloat16


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of -log softmax(hidden · weightᵀ)[label] over the labels that are not -100, and their number.

    hidden: [..., D].  weight: [vocabulary, D].  labels: [...] int64.
    Returns the sum, a float32 scalar (float64 for float64), and the count, an int64 scalar. Differentiable once, in
    hidden and weight. On CUDA it is liger-kernel's fused implementation where that is installed, PyTorch otherwise.
    Raises ValueError if labels do not have the shape of hidden without D, or are neither -100 nor in the vocabulary
    (see `require_ids`).
    """
    require(
        labels.shape == hidden.shape[:-1], "labels", list(labels.shape), f"the tokens' shape {list(hidden.shape[:-1])}"
    )
    require_ids("labels", labels, weight.shape[0], ignored=True)
    hidden, weight = cast(hidden, weight)
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    count = (labels != IGNORE).sum()
    fits = hidden.is_cuda and hidden.dtype == weight.dtype != torch.float64 and len(hidden) > 0
    if fits and (liger := _liger()) is not None:
        return liger(weight, hidden, labels), count
    return _Chunked.apply(hidden, weight, partial(_label_loss, labels)), count


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: tuple[Tensor, Tensor],
    *,
    divergence: float,
    cross_entropy: float,
    temperature: float,
) -> Tensor:
    """Over the labels that are not -100, the sum of

        divergence · τ² KL(softmax(z'/τ) ‖ softmax(z/τ)) - cross_entropy · log softmax(z)[label],  z = hidden · weightᵀ

    with z' of the teacher's hidden states and weight, likewise, and the temperature τ (arXiv:1503.02531). Float32, or
    float64 for float64; differentiable once, in hidden and weight.
    """
    hidden, weight = cast(hidden, weight)
    its_hidden, its_weight = teacher[0].flatten(0, -2), teacher[1]
    label_loss = partial(_label_loss, labels.flatten())

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        wanted = F.linear(its_hidden[rows], its_weight)
        told, told_grad = _divergence(logits, wanted, (labels.flatten()[rows] != IGNORE)[:, None], temperature)
        known, known_grad = label_loss(logits, rows)
        return cross_entropy * known + divergence * told, cross_entropy * known_grad + divergence * told_grad

    return _Chunked.apply(hidden.flatten(0, -2), weight, loss)


def require_ids(field: str, ids: Tensor, vocab_size: int, *, ignored: bool = False) -> None:
    """Raises ValueError unless ids are int64 (or int32), and all in the vocabulary (or -100, if those are ignored).

    On CUDA, where the host would have to wait for the latter, and in graphs, an assertion on the device fails instead,
    as in PyTorch's own embeddings and losses: check what you read while it is on the host, as `lasp.data` does.
    """
    require(ids.dtype in (torch.int64, torch.int32), field, ids.dtype, "torch.int64")
    fits = (ids >= 0) & (ids < vocab_size)
    if ignored:
        fits |= ids == IGNORE
    if ids.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(fits.all(), f"{field} are outside the vocabulary of {vocab_size}")
    elif not ids.is_meta and not fits.all():
        expected = f"0 to {vocab_size - 1} (the vocabulary)" + (f", or {IGNORE}" if ignored else "")
        require(False, field, ids[~fits][0].item(), expected)


@cache
def _liger() -> Any:
    if find_spec("liger_kernel") is None:
        return None
    loss = import_module("liger_kernel.transformers.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyLoss
    return loss(ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32)


def _label_loss(labels: Tensor, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    return cross_entropy_and_grad(logits, labels[rows], IGNORE)


@fused
def _divergence(logits: Tensor, wanted: Tensor, valid: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """τ² KL of the rows that are valid, summed, and its gradient τ (softmax(z/τ) - softmax(z'/τ))."""
    wide = accumulation_dtype(logits)
    own, its = (z.to(wide).div(temperature).log_softmax(-1) for z in (logits, wanted))
    loss = temperature**2 * (its.exp() * (its - own)).sum(-1, keepdim=True).where(valid, 0).sum()
    return loss, (temperature * (own.exp() - its.exp())).where(valid, 0).to(logits.dtype)


class _Chunked(Function):
    """Forms the gradients in the forward pass, while a chunk's logits are there; backward only scales them.

    loss: from logits [N, vocabulary] of some rows, which it may overwrite, their summed loss and its gradient.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, loss: Callable[[Tensor, slice], tuple[Tensor, Tensor]]) -> Tensor:
        wide = accumulation_dtype(hidden)
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        total = hidden.new_zeros((), dtype=wide)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            part, grad = loss(F.linear(hidden[rows], weight), rows)
            total += part
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                add_product(grad_weight, grad.mT, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None
