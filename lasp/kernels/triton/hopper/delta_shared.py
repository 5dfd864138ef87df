"""What the scans of the delta rule share: layouts, and how a chunk's gates come.

A program holds a state, transposed, [V, K]: all of K and 64 or 128 of a head's columns of V, a `part` of them; a head
of more is as many parts, which differ in v alone. Four warps hold 64 rows of it, and if K is 256, half of each row. Of
what has a row for every token of a chunk, each such group of warps has its share of the columns. All run the same code.
(With code of its own for each group, as in `up`, a scan that gives all gradients took 1.3 times as long: together the
two did not fit where instructions are kept.)
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lasp.kernels.triton.hopper.diagonal_shared import exp
from lasp.kernels.triton.hopper.shared import SHARED, C, store_tokens
from lasp.kernels.triton.shared.decay import DIAGONAL


@gluon.constexpr_function
def key_groups(K):
    """Groups of warps that share a row of the state."""
    return 2 if K > 128 else 1


@gluon.constexpr_function
def warp_groups(K, V):
    return V // 64 * key_groups(K)


@gluon.constexpr_function
def state_layout(K, V):
    """[V, K]"""
    keys = key_groups(K)
    return gl.NVMMADistributedLayout([3, 0], [V // 16, keys], [16, K // keys, 16])


@gluon.constexpr_function
def columns_layout(K, V):
    """[V, C]"""
    keys = key_groups(K)
    return gl.NVMMADistributedLayout([3, 0], [V // 16, keys], [16, 64 // keys, 16])


@gluon.constexpr_function
def tokens_layout(K, V, width):
    """[C, width]"""
    groups = warp_groups(K, V)
    return gl.NVMMADistributedLayout([3, 0], [4, groups], [16, width // groups, 16])


@gluon.constexpr_function
def left_of(layout):
    """A product's first operand, in registers."""
    return gl.DotOperandLayout(0, layout, 2)


@gluon.constexpr_function
def rows_layout(K, V, width):
    """[C, width], coalesced."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4 * warp_groups(K, V), 1], [1, 0])


def states_of(x: Tensor) -> TensorDescriptor:
    """How states, x [chunks, heads, V, K], come and go, one by one: as the rows of them all."""
    chunks, heads, value_dim, key_dim = x.shape
    return TensorDescriptor(x, [chunks * heads * value_dim, key_dim], [key_dim, 1], [value_dim, key_dim], SHARED.value)


@gluon.jit
def fetch_gates(gates, ends, chunk, h, H, line, filled, K: gl.constexpr, DECAY: gl.constexpr):
    """Has the one warp that calls it copy what ut_transform gave of a chunk, [4 C], or, if DIAGONAL, beta alone, and
    b_C. `filled` waits for that, too; it must not be full before it is told so."""
    gates += (chunk * H + h) * 4 * C
    if DECAY == DIAGONAL:
        place = gl.arange(0, C, layout=gl.BlockedLayout([2], [32], [1], [0]))
        async_copy.async_copy_global_to_shared(line.slice(0, C), gates + place)
        place = gl.arange(0, K, layout=gl.BlockedLayout([4], [32], [1], [0]))
        async_copy.async_copy_global_to_shared(line.slice(2 * C, K), ends + (chunk * H + h) * K + place)
    else:
        place = gl.arange(0, 4 * C, layout=gl.BlockedLayout([4], [32], [1], [0]))
        async_copy.async_copy_global_to_shared(line, gates + place)
    async_copy.mbarrier_arrive(filled)


@gluon.jit
def split_gates(line):
    """beta, b, e^b and e^{b_C - b} of a chunk, [C] each."""
    return line.slice(0, C), line.slice(C, C), line.slice(2 * C, C), line.slice(3 * C, C)


@gluon.jit
def channel_decays(line, K: gl.constexpr, STATE: gl.constexpr):
    """A chunk's whole decay, if DIAGONAL, of a state's columns, [1, K]."""
    return exp(line.slice(2 * C, K).load(gl.SliceLayout(0, STATE)))[None, :]


@gluon.jit
def give_tokens(y, buffer, i, count, stride, LAYOUT: gl.constexpr, ADD: gl.constexpr):
    """Writes chunk i's rows, those that are tokens, or adds them to what is there, which nobody else does meanwhile."""
    if ADD:
        place = i * C + gl.arange(0, C, layout=gl.SliceLayout(1, LAYOUT))
        cols = gl.arange(0, buffer.shape[1], layout=gl.SliceLayout(0, LAYOUT))
        at = y + (place * stride)[:, None] + cols[None, :]
        rows = buffer.load(LAYOUT).to(y.dtype.element_ty)
        gl.atomic_add(at, rows, mask=(place < count)[:, None], sem="relaxed")
    else:
        store_tokens(y, buffer, i, count, stride, LAYOUT)


@gluon.jit
def state_places(tile, h, H, part, K: gl.constexpr, V: gl.constexpr, WIDTH: gl.constexpr):
    """Those of a part of a tile's state, [K, WIDTH] in memory and [V, K] here, and which there are."""
    STATE: gl.constexpr = state_layout(K, V)
    v = part * V + gl.arange(0, V, layout=gl.SliceLayout(1, STATE))
    k = gl.arange(0, K, layout=gl.SliceLayout(0, STATE))
    return (tile.to(gl.int64) * H + h) * K * WIDTH + k[None, :] * WIDTH + v[:, None], (v < WIDTH)[:, None]
