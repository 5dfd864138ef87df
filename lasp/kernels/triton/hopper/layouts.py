"""Layouts as functions of how many columns a tensor has."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
