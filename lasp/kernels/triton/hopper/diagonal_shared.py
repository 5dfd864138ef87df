"""What kernels for chunks with a vector gate share on Hopper: which chunk a program has, and sums over its tokens.

Sums are products with ones on the tensor cores, of numbers that are cut into two pieces of 16 bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lasp.kernels.triton.hopper.layouts import SIZE, C, mma_layout
from lasp.kernels.triton.hopper.products import add_product, product
from lasp.kernels.triton.shared.decay import LOG2_E


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
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // W, W // 4], [gl.num_warps(), 1], [1, 0])
    place, cols = gl.arange(0, C, layout=gl.SliceLayout(1, LAYOUT)), gl.arange(0, W, layout=gl.SliceLayout(0, LAYOUT))
    at = (place * (H * SIZE))[:, None] + cols[None, :]
    return gl.load(decay + at, mask=(place < count)[:, None], other=0.0)


@gluon.jit
def exp(x):
    """e^x, zero where it would be denormal: with such numbers it takes three times as many instructions."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def cut_in_two(x, pieces):
    """Stores x in bf16 and what rounding left, two numbers at a time: where what is rounded is used again the compiler
    takes one."""
    asm: gl.constexpr = """{ .reg .b32 a, b;
        cvt.rn.bf16x2.f32 $0, $3, $2;
        shl.b32 a, $0, 16;
        and.b32 b, $0, 0xffff0000;
        sub.f32 a, $2, a;
        sub.f32 b, $3, b;
        cvt.rn.bf16x2.f32 $1, b, a; }"""
    types: gl.constexpr = (gl.bfloat16, gl.bfloat16)
    high, low = gl.inline_asm_elementwise(asm, "=r,=r,r,r", [x], types, is_pure=True, pack=2)
    pieces.index(0).store(high)
    pieces.index(1).store(low)


@gluon.jit
def hidden_zero(x):
    """Zero, which the compiler does not know (x: any number): see `ones`."""
    return x * 0.0


@gluon.jit
def ones(REVERSE: gl.constexpr, STRICT: gl.constexpr, less, dtype: gl.constexpr, W: gl.constexpr):
    """[t, j], a product's first operand: 1 for tokens j up to t (in reverse from t on), if STRICT without t; minus
    `less` throughout, which must not be a constant: of operands in registers that are, ptxas of CUDA 12.8 sets some
    only after the first product that reads them."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, mma_layout(W, gl.num_warps()), 2)
    t, j = gl.arange(0, C, layout=gl.SliceLayout(1, LEFT))[:, None], gl.arange(0, C, layout=gl.SliceLayout(0, LEFT))
    late, early = (j[None, :], t) if REVERSE else (t, j[None, :])
    counts = late > early if STRICT else late >= early
    return gl.where(counts, (1.0 - less).to(dtype), (0.0 - less).to(dtype))


@gluon.jit
def sums(weights, pieces, W: gl.constexpr):
    """Sums over tokens of what two pieces hold, [C, W], on their way."""
    y = product(weights, pieces.index(0), mma_layout(W, gl.num_warps()))
    return add_product(y, weights, pieces.index(1))
