"""Cross-entropy (`lasp.kernels.cross_entropy`): a program takes a row, twice; the second time it is in the L2 cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import next_power_of_2
from lasp.kernels.triton.launch import launch

BLOCK = 8192  # logits at a time, 32 for each thread of 8 warps


@triton.jit
def _cross_entropy(
    logits,  # [N, V], rows ROW apart; the gradient takes its place
    targets,  # [N]
    losses,  # [N] fp32
    ignored,
    V,
    ROW,
    BLOCK: tl.constexpr,
):
    n, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    row, target = logits + n * ROW, tl.load(targets + n)
    valid = target != ignored
    z_target = tl.load(row + target, mask=valid, other=0.0).to(tl.float32)
    largest, total = -3.4e38, 0.0  # of finite numbers the least: a whole block may be -inf
    for start in range(0, V, BLOCK):
        z = tl.load(row + start + cols, mask=start + cols < V, other=-float("inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest), axis=0)
    log_sum = largest + tl.log(total)
    tl.store(losses + n, tl.where(valid, log_sum - z_target, 0.0))
    for start in range(0, V, BLOCK):
        z = tl.load(row + start + cols, mask=start + cols < V, other=-float("inf")).to(tl.float32)
        dz = tl.exp(z - log_sum) - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(row + start + cols, tl.where(valid, dz, 0.0).to(logits.dtype.element_ty), mask=start + cols < V)


def cross_entropy(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """The losses [N] in float32; the gradient of their sum takes the place of the logits [N, V]."""
    rows, vocabulary = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    block = min(BLOCK, next_power_of_2(vocabulary))
    launch(
        _cross_entropy, (rows,), logits, targets.contiguous(), losses, ignored, vocabulary, logits.stride(0),
        BLOCK=block, num_warps=8,
    )  # fmt: skip
    return losses
