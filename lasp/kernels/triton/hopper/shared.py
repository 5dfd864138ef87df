"""How chunks come and go, and are seen."""

from functools import cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lasp.kernels.triton.hopper.layouts import C, rows_layout, shared_layout

REGISTERS = gl.constexpr(240)  # of a thread that computes
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name since Triton 3.7, and before


@gluon.jit
def publish():
    """What these warps have stored in shared memory is there for their products, and for copies by TMA."""
    fence_async_shared()
    barrier()


def rows_of(x: Tensor, columns: int) -> TensorDescriptor:
    """How chunks of x [B, T, heads, D] come and go, so many columns of a head at a time."""
    assert x.data_ptr() % 16 == 0, "see layouts.laid_out"
    _, _, heads, size = x.shape
    return blocks_of(x, heads * size, [C.value, columns])


def blocks_of(x: Tensor, width: int, block: list[int]) -> TensorDescriptor:
    """How blocks of so many rows and columns of x, contiguous and in 16 bits, come and go: as rows of `width`."""
    made = object.__new__(TensorDescriptor)  # what it would check is so, and takes 5 µs of the host
    made.__dict__ = {
        "base": x, "shape": [x.numel() // width, width], "strides": [width, 1], "block_shape": block,
        "layout": _layout(block[1]), "padding": "zero",
    }  # fmt: skip
    return made


@cache
def _layout(columns: int) -> gl.NVMMASharedLayout:
    return shared_layout(columns)


@gluon.jit
def whole_decay(gates_copy, LAYOUT: gl.constexpr):
    """That of a chunk, [1], from its copy in shared memory: its last place has it, be there a token or not."""
    return gates_copy.slice(C - 1, 1).load(LAYOUT)


@gluon.jit
def clear_tail(buffer, i, count):
    """Zeroes the rows of chunk i that are no tokens of this tile."""
    LAYOUT: gl.constexpr = rows_layout(buffer.shape[1], gl.num_warps())
    place = i * C + gl.arange(0, C, layout=gl.SliceLayout(1, LAYOUT))
    buffer.store(gl.where((place < count)[:, None], buffer.load(LAYOUT), 0.0))


@gluon.jit
def send_rows(y, rows, buffer, begin, i, count, col, stride):
    """Writes chunk i, of the buffer's width, once all threads see the buffer: whole ones to `rows` from column `col`
    on, while all go on (tma.store_wait tells when the buffer has been read), else those that are tokens to y."""
    if count - i * C < C:
        store_tokens(y, buffer, i, count, stride)
    else:
        tma.async_copy_shared_to_global(rows, [begin.to(gl.int32) + i * C, col], buffer)


@gluon.jit
def store_tokens(y, buffer, i, count, stride, ADD: gl.constexpr = False):
    """Writes chunk i's rows, of the buffer's width, those that are tokens, or adds them to what is there, which nobody
    else does meanwhile."""
    LAYOUT: gl.constexpr = rows_layout(buffer.shape[1], gl.num_warps())
    place = i * C + gl.arange(0, C, layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, buffer.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    here = (place < count)[:, None]
    at = y + (place * stride)[:, None] + cols[None, :]
    if ADD:
        gl.atomic_add(at, buffer.load(LAYOUT).to(y.dtype.element_ty), mask=here, sem="relaxed")
    else:
        gl.store(at, buffer.load(LAYOUT), mask=here)
