"""Tensors as the kernels take and give them."""

from dataclasses import replace

from torch import Tensor

from lasp.kernels.layouts import laid_out
from lasp.kernels.recurrence import Inputs


def contiguous(x: Inputs) -> Inputs:
    """The same inputs, laid out as the kernels assume.

    Copies have to live until their half of the op has ended, since kernels that overlap may get their memory (see pdl).
    """
    decay, beta = (None if gate is None else gate.contiguous() for gate in (x.decay, x.beta))
    return replace(x, q=laid_out(x.q), k=laid_out(x.k), v=laid_out(x.v), decay=decay, beta=beta)


def per_q_head(d: Tensor, q: Tensor) -> Tensor:
    """[B, T, H, K] -> [B, T, Hq, K]: the sum over the value heads that share a q/k head."""
    if d.shape[2] == q.shape[2]:
        return d
    return d.unflatten(2, (q.shape[2], -1)).float().sum(3).to(q.dtype)
