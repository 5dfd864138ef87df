"""What kernels for chunks with a vector gate share on Hopper: which chunk a program has, and sums over its tokens.

Sums are products with ones on the tensor cores, of numbers that are cut into two pieces of 16 bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from lasp.kernels.triton.hopper.layouts import mma_layout
from lasp.kernels.triton.hopper.shared import SIZE, C
from lasp.kernels.triton.shared.decay import SHUT


@gluon.jit
def chunk_of(program, start, length, CHUNKS, OF_TILES: gl.constexpr):
    """Its number, first token, and how many it has: start and length are chunks', or tiles', which have slots for
    CHUNKS each (see diagonal.rescale)."""
    if OF_TILES:
        tile, i = program // CHUNKS, program % CHUNKS
        begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
        return (begin // C).to(gl.int32) + tile + i, begin + i * C, gl.minimum(count - i * C, C)
    else:
        return program, gl.load(start + program), gl.load(length + program).to(gl.int32)


@gluon.jit
def load_gates(decay, count, H, W: gl.constexpr):
    """[C, W] as they are, coalesced; zero where there is no token. Nothing is done with them, so that they may come
    late."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // W, W // 4], [4, 1], [1, 0])
    place, cols = gl.arange(0, C, layout=gl.SliceLayout(1, LAYOUT)), gl.arange(0, W, layout=gl.SliceLayout(0, LAYOUT))
    at = (place * (H * SIZE))[:, None] + cols[None, :]
    return gl.load(decay + at, mask=(place < count)[:, None], other=0.0)


@gluon.jit
def bounded(g):
    """See shared.decay."""
    g = g.to(gl.float32)
    return gl.where(g < SHUT, SHUT, g)


@gluon.jit
def cut_in_two(x, pieces):
    high = x.to(pieces.dtype)
    pieces.index(0).store(high)
    pieces.index(1).store((x - high.to(gl.float32)).to(pieces.dtype))


@gluon.jit
def hidden_zero(x):
    """Zero, which the compiler does not know (x: any number): see `ones`."""
    return x * 0.0


@gluon.jit
def ones(REVERSE: gl.constexpr, STRICT: gl.constexpr, less, dtype: gl.constexpr, W: gl.constexpr):
    """[t, j], a product's first operand: 1 for tokens j up to t (in reverse from t on), if STRICT without t; minus
    `less` throughout, which must not be a constant: of operands in registers that are, ptxas of CUDA 12.8 sets some
    only after the first product that reads them."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, mma_layout(W), 2)
    t, j = gl.arange(0, C, layout=gl.SliceLayout(1, LEFT))[:, None], gl.arange(0, C, layout=gl.SliceLayout(0, LEFT))
    gap = (j[None, :] - t) if REVERSE else (t - j[None, :])
    return gl.where(gap >= (1 if STRICT else 0), (1.0 - less).to(dtype), (0.0 - less).to(dtype))


@gluon.jit
def sums(weights, pieces, W: gl.constexpr):
    """Sums over tokens of what two pieces hold, [C, W], on their way."""
    y = gl.zeros([C, W], gl.float32, mma_layout(W))
    y = warpgroup_mma(weights, pieces.index(0), y, use_acc=False, is_async=True)
    return warpgroup_mma(weights, pieces.index(1), y, is_async=True)
