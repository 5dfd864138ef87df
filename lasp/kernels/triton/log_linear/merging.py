"""States of nodes, from the leaves up, and their gradients, from the roots down; one launch for each height.

    up      S_parent = e^{a_right} S_left + S_right        a_parent = a_left + a_right
    down    G_left = e^{a_right} G_parent + D_left         G_right = G_parent

a is a node's log decay, D_left the gradient of the left node's state from the queries of the right node and from the
final slot that it is (node_grads). The gate's gradient for all tokens of a node, from pairs of a query and a source on
either side of it (in bits: what their products' gradients are):

    across_right = across_parent + <G_parent, e^{a_right} S_left>
    across_left = across_parent + Σ over the right node's leaves, of what their queries read of sources before the left
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import block_of, cdiv, next_power_of_2
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.log_linear.tree import Tree
from lasp.kernels.triton.pdl import griddepcontrol_wait


@triton.jit
def _places(K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Where a program's block of a state lies in it, and whether it is inside."""
    block = tl.program_id(2)
    rows = (block // tl.cdiv(V, BV)) * BK + tl.arange(0, BK)
    cols = (block % tl.cdiv(V, BV)) * BV + tl.arange(0, BV)
    return rows[:, None] * V + cols[None, :], (rows < K)[:, None] & (cols < V)[None, :]


@triton.jit(do_not_specialize=["first", "M"])
def _merge(
    leaves,  # [M, H, K, V] fp32 states of the leaves
    parents,  # [P, H, K, V] fp32 those of the other nodes
    decays,  # [M + P, H] fp32 log decays of all nodes
    seen,  # [P, H, K, V] the left nodes' states as the queries read them
    spans,  # [P, H] fp32 the left nodes' log decays
    table,  # see tree.Pairs
    first, M, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i, count, h = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(1)
    place, inside = _places(K, V, BK, BV)
    griddepcontrol_wait()
    left, right = tl.load(table + i).to(tl.int64), tl.load(table + count + i).to(tl.int64)
    a_left, a_right = tl.load(decays + left * H + h), tl.load(decays + right * H + h)
    if left < M:
        x = tl.load(leaves + (left * H + h) * K * V + place, mask=inside, other=0.0)
    else:
        x = tl.load(parents + ((left - M) * H + h) * K * V + place, mask=inside, other=0.0)
    if right < M:
        y = tl.load(leaves + (right * H + h) * K * V + place, mask=inside, other=0.0)
    else:
        y = tl.load(parents + ((right - M) * H + h) * K * V + place, mask=inside, other=0.0)
    at = ((first + i) * H + h) * K * V + place
    tl.store(seen + at, x.to(seen.dtype.element_ty), mask=inside)
    tl.store(parents + at, x * tl.exp(a_right) + y, mask=inside)
    tl.store(spans + (first + i) * H + h, a_left, mask=tl.program_id(2) == 0)
    tl.store(decays + (M + first + i) * H + h, a_left + a_right, mask=tl.program_id(2) == 0)


@triton.jit
def add_pieces(x, parts, totals, piece, pieces, h, H, place, inside, K: tl.constexpr, V: tl.constexpr):
    """x + Σ e^{decay of the pieces before} part, and the decay of all pieces."""
    passed = 0.0
    for i in range(pieces):
        at = (piece + i) * H + h
        x += tl.exp(passed) * tl.load(parts + at * K * V + place, mask=inside, other=0.0)
        passed += tl.load(totals + at)
    return x, passed


@triton.jit(do_not_specialize=["first", "height", "HEIGHTS", "M", "NODES"])
def _hand_down(
    parts,  # [Q, H, K, V] fp32, with the decays of the pieces [Q, H]: see node_grads
    totals,
    final,  # [N, J, H, K, V] fp32 the gradients of the final slots, or None
    seen,  # [P, H, K, V]
    decays,  # [M + P, H]
    grads,  # [P, H, K, V] fp32 the gradients of the left nodes' states
    across,  # [blocks, M + P, H] fp32
    beyond,  # [M, heights, H]: what a leaf's queries read of more than a height
    table,  # see tree.Pairs
    first, height, HEIGHTS, M, NODES, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    i, count, h, block = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(1), tl.program_id(2)
    place, inside = _places(K, V, BK, BV)
    left, right = tl.load(table + i).to(tl.int64), tl.load(table + count + i).to(tl.int64)
    above = tl.load(table + 2 * count + i).to(tl.int64)
    leaf, leaves = tl.load(table + 3 * count + i), tl.load(table + 4 * count + i)
    piece, pieces = tl.load(table + 5 * count + i).to(tl.int64), tl.load(table + 6 * count + i)
    slot = tl.load(table + 7 * count + i).to(tl.int64)
    d, passed = add_pieces(tl.zeros([BK, BV], tl.float32), parts, totals, piece, pieces, h, H, place, inside, K, V)
    if final is not None:
        is_slot = inside & (slot >= 0)
        d += tl.exp(passed) * tl.load(final + (slot * H + h) * K * V + place, mask=is_slot, other=0.0)
    at = ((first + i) * H + h) * K * V + place
    passing = 0.0
    if above >= 0:
        g = tl.load(grads + (above * H + h) * K * V + place, mask=inside, other=0.0)
        g *= tl.exp(tl.load(decays + right * H + h))
        x = tl.load(seen + at, mask=inside, other=0.0).to(tl.float32)
        passing = tl.sum(tl.sum(g * x, axis=1), axis=0)
        d += g
    tl.store(grads + at, d, mask=inside)

    read = 0.0
    if block == 0:
        for step in range(tl.cdiv(leaves, LEAVES)):
            number = step * LEAVES + tl.arange(0, LEAVES)
            of_leaf = ((leaf + number).to(tl.int64) * HEIGHTS + height) * H + h
            read += tl.sum(tl.load(beyond + of_leaf, mask=number < leaves, other=0.0), axis=0)
    across += block * NODES * H + h
    parent = tl.load(across + (M + first + i) * H)
    tl.store(across + left * H, parent + read)
    tl.store(across + right * H, parent + passing)


@triton.jit
def _fold(
    parts, totals, table, out, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """out [I, H, K, V] = Σ e^{decay of the pieces before} part, of the runs in table [5, I]: tree.Tree.incoming."""
    i, count, h = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(1)
    place, inside = _places(K, V, BK, BV)
    piece, pieces = tl.load(table + 2 * count + i).to(tl.int64), tl.load(table + 3 * count + i)
    x, _ = add_pieces(tl.zeros([BK, BV], tl.float32), parts, totals, piece, pieces, h, H, place, inside, K, V)
    tl.store(out + (i * H + h) * K * V + place, x, mask=inside)


def _blocks(key_dim: int, value_dim: int) -> tuple[int, int, int]:
    """Rows and columns of a block of a state, and how many blocks it has."""
    rows, cols = min(32, next_power_of_2(key_dim)), min(128, block_of(value_dim))
    return rows, cols, cdiv(key_dim, rows) * cdiv(value_dim, cols)


class NodeStates:
    """What merging made of the leaves' states: those of all nodes, and their log decays [M + P, H]; those of the left
    nodes as queries read them, `seen` and `spans` [P, H]."""

    def __init__(self, tree: Tree, leaves: Tensor, decays: Tensor, dtype: torch.dtype):
        """leaves [M, H, K, V] and decays [M, H] in fp32; dtype: in which queries read states."""
        count, heads, key_dim, value_dim = leaves.shape
        self.leaves, self.parents = leaves, leaves.new_empty(tree.pairs, heads, key_dim, value_dim)
        self.seen = torch.empty_like(self.parents, dtype=dtype)
        self.spans = decays.new_empty(tree.pairs, heads)
        self.decays = torch.cat([decays, self.spans])
        rows, cols, blocks = _blocks(key_dim, value_dim)
        for pairs in tree.heights:
            launch(
                _merge, (pairs.table.shape[1], heads, blocks),
                leaves, self.parents, self.decays, self.seen, self.spans, pairs.table, pairs.first, count, heads,
                K=key_dim, V=value_dim, BK=rows, BV=cols, num_warps=4, pdl=True,
            )  # fmt: skip

    def of(self, nodes: Tensor) -> Tensor:
        """[F, H, K, V] fp32 of these nodes."""
        count = len(self.leaves)
        if not len(self.parents):
            return self.leaves[nodes]
        is_leaf = (nodes < count).view(-1, 1, 1, 1)
        return self.leaves[nodes.clamp(max=count - 1)].where(is_leaf, self.parents[(nodes - count).clamp(min=0)])


def hand_down(
    tree: Tree, states: NodeStates, parts: Tensor, totals: Tensor, final: Tensor | None, beyond: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the left nodes' states [P, H, K, V], and of all tokens' gates in a node, as far as they are the
    same for all of them: [blocks, M + P, H] in partial sums.

    parts, totals: of the pieces, see node_grads. final: [N, J, H, K, V]. beyond: [M, heights, H].
    """
    heads, key_dim, value_dim = parts.shape[1:]
    count, nodes = tree.tiles.count, len(states.decays)
    rows, cols, blocks = _blocks(key_dim, value_dim)
    grads, across = parts.new_empty(tree.pairs, heads, key_dim, value_dim), parts.new_zeros(blocks, nodes, heads)
    for pairs in reversed(tree.heights):
        launch(
            _hand_down, (pairs.table.shape[1], heads, blocks),
            parts, totals, final, states.seen, states.decays, grads, across, beyond, pairs.table,
            pairs.first, pairs.height, beyond.shape[1], count, nodes, heads,
            K=key_dim, V=value_dim, BK=rows, BV=cols, LEAVES=64, num_warps=4,
        )  # fmt: skip
    return grads, across


def fold(tree: Tree, parts: Tensor, totals: Tensor) -> Tensor:
    """[I, H, K, V]: the gradients of the initial slots, from the queries."""
    heads, key_dim, value_dim = parts.shape[1:]
    rows, cols, blocks = _blocks(key_dim, value_dim)
    out = parts.new_empty(tree.incoming.shape[1], heads, key_dim, value_dim)
    if len(out):
        launch(
            _fold, (len(out), heads, blocks),
            parts, totals, tree.incoming, out, heads, K=key_dim, V=value_dim, BK=rows, BV=cols, num_warps=4,
        )  # fmt: skip
    return out
