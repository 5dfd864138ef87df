"""Sizes and layouts: those of chunks and of heads of 128, and as functions of how many columns a tensor has."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lasp.kernels.triton.device import HOPPER_HEAD
from lasp.kernels.triton.shared.tiles import CHUNK

assert HOPPER_HEAD == 2 * CHUNK, "half a state and what has a row for every token take each other's places"
SIZE, HALF = gl.constexpr(HOPPER_HEAD), gl.constexpr(HOPPER_HEAD // 2)
C = gl.constexpr(CHUNK)  # tokens of a chunk: gates are summed within as many

SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
GATES_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # products of 64 columns
WIDE_MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA, 2))  # a product's first operand, in registers
WIDE_LEFT = gl.constexpr(gl.DotOperandLayout(0, WIDE_MMA, 2))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # rows of 64, coalesced
WIDE_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.constexpr_function
def shared_layout(columns):
    """Of rows that products read from shared memory, and that come and go by TMA."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * columns), element_bitwidth=16, rank=2)


@gluon.constexpr_function
def mma_layout(columns, warps=4):
    """Of a product of 64 rows; each four warps have their share of the columns."""
    groups = warps // 4
    return gl.NVMMADistributedLayout([3, 0], [4, groups], [16, columns // groups, 16])


@gluon.constexpr_function
def rows_layout(columns, warps=4):
    """Of rows of 16 bits, coalesced."""
    threads = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // threads, threads], [warps, 1], [1, 0])
