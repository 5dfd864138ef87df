"""Cross-entropy of a linear head, a chunk of tokens at a time: the [T, vocabulary] logits never exist whole."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.config import require

IGNORE = -100
CHUNK_TOKENS = 1024  # 1024 x 128256 float32 logits are half a gigabyte


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of -log softmax(hidden · weightᵀ)[label] over the labels that are not -100, and their number.

    hidden: [..., D].  weight: [vocabulary, D].  labels: [...] int64.
    Returns the sum, a float32 scalar (float64 for float64), and the count, an int64 scalar. Differentiable once, in
    hidden and weight. On CUDA it is liger-kernel's fused implementation where that is installed, PyTorch otherwise.
    Raises ValueError if labels do not have the shape of hidden without D.
    """
    require(
        labels.shape == hidden.shape[:-1], "labels", list(labels.shape), f"the tokens' shape {list(hidden.shape[:-1])}"
    )
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    count = (labels != IGNORE).sum()
    if hidden.is_cuda and hidden.dtype == weight.dtype != torch.float64 and (liger := _liger()) is not None:
        return liger(weight, hidden, labels), count
    return _ChunkedCrossEntropy.apply(hidden, weight, labels), count


@cache
def _liger() -> Any:
    if find_spec("liger_kernel") is None:
        return None
    loss = import_module("liger_kernel.transformers.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyLoss
    return loss(ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward pass, while a chunk's logits are there; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        total = hidden.new_zeros((), dtype=wide)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            valid = (labels[rows] != IGNORE)[:, None]
            targets = labels[rows, None].where(valid, 0)
            logits = F.linear(hidden[rows], weight).to(wide)
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(-1, targets)).where(valid, 0).sum()
            # d loss / d logits = softmax - one hot, in the place of the logits
            grad = logits.sub_(log_sum).exp_().scatter_add_(-1, targets, -torch.ones_like(log_sum))
            grad = grad.masked_fill_(~valid, 0).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.mT @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None
