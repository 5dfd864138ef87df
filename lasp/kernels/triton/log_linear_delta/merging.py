"""States and transitions of nodes, from the leaves up, and their gradients, from the roots down; one launch for each
height.

    up      S_parent = A_right S_left + S_right        A_parent = A_right A_left
    down    dS_left = A_rightᵀ dS_parent + D_left      dA_left = A_rightᵀ dA_parent + E_left
            dS_right = dS_parent                       dA_right = dS_parent S_leftᵀ + dA_parent A_leftᵀ

D and E are the gradients from the queries of the right node (node_grads).
"""

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.log_linear.tree import Tree

COLUMNS = 64  # of a state or transition that a program holds


@triton.jit
def _load(x, node, h, H, rows, cols, K: tl.constexpr, D: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Rows and columns of x[node, h], a [K, D] matrix; rows are its columns if TRANSPOSED."""
    at = x + (node * H + h) * K * D
    if TRANSPOSED:
        return tl.load(
            at + cols[None, :] * D + rows[:, None], mask=(rows < D)[:, None] & (cols < K)[None, :], other=0.0
        )
    return tl.load(at + rows[:, None] * D + cols[None, :], mask=(rows < K)[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def _store(x, value, node, h, H, rows, cols, K: tl.constexpr, D: tl.constexpr):
    at = x + (node * H + h) * K * D + rows[:, None] * D + cols[None, :]
    tl.store(at, value, mask=(rows < K)[:, None] & (cols < D)[None, :])


@triton.jit(do_not_specialize=["first"])
def _merge(
    states,  # [M + P, H, K, V] fp32
    transitions,  # [M + P, H, K, K] fp32
    table,  # see tree.Pairs
    first,  # the first parent's node
    H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, count, h, block = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(1), tl.program_id(2)
    left, right = tl.load(table + i).to(tl.int64), tl.load(table + count + i).to(tl.int64)
    kk, nn = tl.arange(0, BK), tl.arange(0, BN)
    a = _load(transitions, right, h, H, kk, kk, K, K, False)
    if block < tl.cdiv(V, BN):
        cols = block * BN + nn
        x = _load(states, left, h, H, kk, cols, K, V, False)
        y = _load(states, right, h, H, kk, cols, K, V, False)
        _store(states, tl.dot(a, x, y, input_precision=PRECISION), first + i, h, H, kk, cols, K, V)
    else:
        cols = (block - tl.cdiv(V, BN)) * BN + nn
        x = _load(transitions, left, h, H, kk, cols, K, K, False)
        _store(transitions, tl.dot(a, x, input_precision=PRECISION), first + i, h, H, kk, cols, K, K)


@triton.jit
def _pieces(parts, piece, pieces, h, H, rows, cols, K: tl.constexpr, D: tl.constexpr):
    """Σ parts."""
    x = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for n in range(pieces):
        x += _load(parts, piece + n, h, H, rows, cols, K, D, False)
    return x


@triton.jit(do_not_specialize=["first"])
def _hand_down(
    states,
    transitions,
    parts,  # [Q, H, K, V] fp32: D of the pieces
    transition_parts,  # [pieces of pairs, H, K, K] fp32: E
    d_states,  # [M + P, H, K, V] fp32
    d_transitions,  # [M + P, H, K, K] fp32
    table, first, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, count, h, block = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(1), tl.program_id(2)
    left, right = tl.load(table + i).to(tl.int64), tl.load(table + count + i).to(tl.int64)
    piece, pieces = tl.load(table + 5 * count + i).to(tl.int64), tl.load(table + 6 * count + i)
    parent = first + i
    kk, nn = tl.arange(0, BK), tl.arange(0, BN)
    back = _load(transitions, right, h, H, kk, kk, K, K, True)
    if block < tl.cdiv(V, BN):
        cols = block * BN + nn
        g = _load(d_states, parent, h, H, kk, cols, K, V, False)
        _store(d_states, g, right, h, H, kk, cols, K, V)
        x = _pieces(parts, piece, pieces, h, H, kk, cols, K, V)
        _store(d_states, tl.dot(back, g, x, input_precision=PRECISION), left, h, H, kk, cols, K, V)
    else:
        cols = (block - tl.cdiv(V, BN)) * BN + nn
        g = _load(d_transitions, parent, h, H, kk, cols, K, K, False)
        x = _pieces(transition_parts, piece, pieces, h, H, kk, cols, K, K)
        _store(d_transitions, tl.dot(back, g, x, input_precision=PRECISION), left, h, H, kk, cols, K, K)
        y = tl.zeros([BK, BN], tl.float32)
        for j in range(tl.cdiv(V, BN)):
            g = _load(d_states, parent, h, H, kk, j * BN + nn, K, V, False)
            y = tl.dot(g, _load(states, left, h, H, j * BN + nn, cols, K, V, True), y, input_precision=PRECISION)
        for j in range(tl.cdiv(K, BN)):
            g = _load(d_transitions, parent, h, H, kk, j * BN + nn, K, K, False)
            y = tl.dot(g, _load(transitions, left, h, H, j * BN + nn, cols, K, K, True), y, input_precision=PRECISION)
        _store(d_transitions, y, right, h, H, kk, cols, K, K)


def merge(tree: Tree, states: Tensor, transitions: Tensor, precision: str) -> None:
    """Fills those of the parents."""
    _at_each_height(tree, _merge, (states, transitions), tree.heights, precision)


def hand_down(
    tree: Tree, states: Tensor, transitions: Tensor, parts: Tensor, transition_parts: Tensor, d_states: Tensor,
    d_transitions: Tensor, precision: str,
) -> None:  # fmt: skip
    """Fills the gradients of all nodes but the roots, where they are given."""
    tensors = (states, transitions, parts, transition_parts, d_states, d_transitions)
    _at_each_height(tree, _hand_down, tensors, tree.heights[::-1], precision)


def _at_each_height(tree: Tree, kernel, tensors: tuple[Tensor, ...], heights, precision: str) -> None:
    heads, key_dim, value_dim = tensors[0].shape[1:]
    blocks = cdiv(value_dim, COLUMNS) + cdiv(key_dim, COLUMNS)
    for pairs in heights:
        launch(
            kernel, (pairs.table.shape[1], heads, blocks),
            *tensors, pairs.table, tree.tiles.count + pairs.first, heads,
            K=key_dim, V=value_dim, BK=block_of(key_dim), BN=COLUMNS, PRECISION=precision, num_warps=8, num_stages=1,
        )  # fmt: skip
