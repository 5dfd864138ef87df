"""Cross-entropy and its gradient together, in the place of the logits; on GPUs one Triton kernel.

loss_n = log Σ_v exp z_nv - z_nt      dz_nv = softmax(z_n)_v - [v = t]      t the target of row n
"""

import torch
from torch import Tensor

from lasp.kernels.dtypes import accumulation_dtype
from lasp.kernels.fused import by_kernel


def cross_entropy_and_grad(logits: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses, a scalar in float32 at least, and its gradient.

    logits: [N, vocabulary], which the gradient may overwrite.  targets: [N] int64, a word of the vocabulary each, or
    `ignored`: such a row has neither loss nor gradient.
    """
    if by_kernel(logits):
        from lasp.kernels.triton.cross_entropy import cross_entropy

        return cross_entropy(logits, targets, ignored).sum(), logits
    valid = (targets != ignored)[:, None]
    targets = targets[:, None].where(valid, 0)
    wide = logits.to(accumulation_dtype(logits))
    log_sum = wide.logsumexp(-1, keepdim=True)
    loss = (log_sum - wide.gather(-1, targets)).where(valid, 0).sum()
    softmax = (wide - log_sum).exp()
    return loss, softmax.scatter_add_(-1, targets, -torch.ones_like(log_sum)).where(valid, 0).to(logits.dtype)
