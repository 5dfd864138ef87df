"""Products on tensor cores. They are on their way: what they give is there after warpgroup_mma_wait."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma


@gluon.jit
def product(a, b, LAYOUT: gl.constexpr):
    """a b, in fp32."""
    ROWS: gl.constexpr = a.shape[0]
    COLUMNS: gl.constexpr = b.shape[1]
    nothing = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    return warpgroup_mma(a, b, nothing, use_acc=False, is_async=True)


@gluon.jit
def add_product(y, a, b):
    """y + a b, in the place of y."""
    return warpgroup_mma(a, b, y, is_async=True)
