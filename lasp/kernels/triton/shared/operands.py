"""Tensors as the kernels take and give them."""

from dataclasses import replace

from torch import Tensor

from lasp.kernels.recurrence import Inputs


def contiguous(x: Inputs) -> Inputs:
    """The same inputs as `laid_out`."""
    decay, beta = (None if gate is None else gate.contiguous() for gate in (x.decay, x.beta))
    return replace(x, q=laid_out(x.q), k=laid_out(x.k), v=laid_out(x.v), decay=decay, beta=beta)


def laid_out(x: Tensor) -> Tensor:
    """x with the memory layout that the kernels assume: contiguous, and from an address on that 16 divides.

    A copy has to live until its half of the op has ended, since kernels that overlap may get its memory (see pdl).
    """
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def per_q_head(d: Tensor, q: Tensor) -> Tensor:
    """[B, T, H, K] -> [B, T, Hq, K]: the sum over the value heads that share a q/k head."""
    if d.shape[2] == q.shape[2]:
        return d
    return d.unflatten(2, (q.shape[2], -1)).float().sum(3).to(q.dtype)
