"""What the scans of the delta rule share: layouts, and how a chunk's gates come.

Eight warps hold a state, transposed, [V, K]: two groups of them half of V each. Of what has a row for every token of a
chunk, each group has half of the columns. All run the same code. (With code of its own for each group, as in `up`, a
scan that gives all gradients took 1.3 times as long: together the two did not fit where instructions are kept.)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from lasp.kernels.triton.hopper.shared import SIZE, C, store_tokens

STATE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16]))  # [V, K]
COLUMNS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16]))  # [V, C]
TOKENS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16]))  # [C, K]
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))  # [C, C]
STATE_LEFT = gl.constexpr(gl.DotOperandLayout(0, STATE, 2))  # first operands of products, in registers
COLUMNS_LEFT = gl.constexpr(gl.DotOperandLayout(0, COLUMNS, 2))
TOKENS_LEFT = gl.constexpr(gl.DotOperandLayout(0, TOKENS, 2))
SCORE_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))  # [C, C], coalesced
TOKEN_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0]))  # [C, K], likewise


@gluon.jit
def fetch_gates(gates, chunk, h, H, line, filled):
    """Has the one warp that calls it copy what ut_transform gave of a chunk, [4 C]. `filled` waits for that, too; it
    must not be full before it is told so."""
    place = gl.arange(0, 4 * C, layout=gl.BlockedLayout([4], [32], [1], [0]))
    async_copy.async_copy_global_to_shared(line, gates + (chunk * H + h) * 4 * C + place)
    async_copy.mbarrier_arrive(filled)


@gluon.jit
def split_gates(line):
    """beta, b, e^b and e^{b_C - b} of a chunk, [C] each."""
    return line.slice(0, C), line.slice(C, C), line.slice(2 * C, C), line.slice(3 * C, C)


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
def state_places(tile, h, H):
    """Those of a tile's state, [K, V] in memory and [V, K] here."""
    v, k = gl.arange(0, SIZE, layout=gl.SliceLayout(1, STATE)), gl.arange(0, SIZE, layout=gl.SliceLayout(0, STATE))
    return (tile.to(gl.int64) * H + h) * SIZE * SIZE + k[None, :] * SIZE + v[:, None]
