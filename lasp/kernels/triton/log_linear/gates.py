"""The gradient of the gates: for each the sum over all pairs of a query at or behind it and a source before it, of the
pair's part of the loss's gradient in a factor that it has in common (math §2). Nothing cancels:

    dg_t = Σ_{i>=t} through_i - Σ_{j>=t} within_j + Σ_{j<t} beyond_j + across      sums over the tokens of t's leaf

through_i: of pairs of query i with all sources before it. within_j, beyond_j: of pairs of source j with queries in and
beyond the leaf. across: of pairs on either side of the leaf.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import cdiv, next_power_of_2
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.log_linear.tree import Tree
from lasp.kernels.triton.shared.decay import unless_shut


@triton.jit(do_not_specialize=["TOKENS", "NODES", "SB"])
def _gate_grads(
    through,  # [QB, tokens, H]
    within,  # [VB, tokens, H]
    beyond,  # [VB, tokens, H]
    across,  # [SB, nodes, H]
    decay,  # [tokens, H]
    dg,  # [tokens, H]
    start, length, TOKENS, NODES, H,
    BH: tl.constexpr, LEAF: tl.constexpr, QB: tl.constexpr, VB: tl.constexpr,
    SB,
):  # fmt: skip
    leaf = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    begin, count = tl.load(start + leaf), tl.load(length + leaf)
    place = tl.arange(0, LEAF)
    at = (begin + place)[:, None] * H + heads[None, :]
    here = (place < count)[:, None] & (heads < H)[None, :]
    behind, before = tl.zeros([LEAF, BH], tl.float32), tl.zeros([LEAF, BH], tl.float32)
    for block in tl.static_range(QB):
        behind += tl.load(through + tl.full([], block, tl.int64) * TOKENS * H + at, mask=here, other=0.0)
    for block in tl.static_range(VB):
        behind -= tl.load(within + tl.full([], block, tl.int64) * TOKENS * H + at, mask=here, other=0.0)
        before += tl.load(beyond + tl.full([], block, tl.int64) * TOKENS * H + at, mask=here, other=0.0)
    total = tl.zeros([BH], tl.float32)
    for block in range(SB):
        total += tl.load(across + (block * NODES + leaf) * H + heads, mask=heads < H, other=0.0)
    total += tl.sum(behind, axis=0)
    grad = total[None, :] - tl.cumsum(behind, axis=0) + behind + tl.cumsum(before, axis=0) - before
    g = tl.load(decay + at, mask=here, other=0.0)
    tl.store(dg + at, unless_shut(grad, g).to(dg.dtype.element_ty), mask=here)


def gate_grads(tree: Tree, decay: Tensor, through: Tensor, within: Tensor, beyond: Tensor, across: Tensor) -> Tensor:
    """dg [B, T, H]; all in partial sums: through, within and beyond [blocks, B, T, H], across [blocks, nodes, H]."""
    heads = decay.shape[-1]
    block = min(8, next_power_of_2(heads))
    dg = torch.empty_like(decay)
    launch(
        _gate_grads, (tree.tiles.count, cdiv(heads, block)),
        through, within, beyond, across, decay, dg, tree.tiles.start, tree.tiles.length, decay.numel() // heads,
        across.shape[1], heads, BH=block, LEAF=tree.leaf, QB=len(through), VB=len(within), SB=len(across), num_warps=4,
    )  # fmt: skip
    return dg
