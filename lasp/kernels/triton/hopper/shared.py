"""What these scans share: sizes, layouts, and how chunks come and go."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lasp.kernels.triton.device import HOPPER_HEAD
from lasp.kernels.triton.hopper.layouts import shared_layout
from lasp.kernels.triton.shared.decay import CONSTANT, LOG2_E, SHUT
from lasp.kernels.triton.shared.tiles import CHUNK

SIZE, HALF = gl.constexpr(HOPPER_HEAD), gl.constexpr(HOPPER_HEAD // 2)
C = gl.constexpr(CHUNK)  # tokens of a chunk: gates are summed within as many
REGISTERS = gl.constexpr(240)  # of a thread that computes

SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
GATES_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # products of 64 columns
WIDE_MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA, 2))  # a product's first operand, in registers
WIDE_LEFT = gl.constexpr(gl.DotOperandLayout(0, WIDE_MMA, 2))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # rows of 64, coalesced
WIDE_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
LINES = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))  # the same of fp32
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name since Triton 3.7, and before


class Behind(NamedTuple):
    """The gradients of the states behind all chunks, / scale, [chunks, H, K, V], as rounded for products; in fp16 with
    factors [chunks, H, V / 64]. first_chunk: [M], of every tile."""

    states: Tensor
    ups: Tensor | None
    first_chunk: Tensor

    def rows(self, rows: int, columns: int) -> TensorDescriptor:
        """How parts of so many rows and columns come and go."""
        states = self.states.flatten(0, 2)
        return TensorDescriptor.from_tensor(states, [rows, columns], shared_layout(columns))


def new_behind(chunks: int, k: Tensor, v: Tensor, first_chunk: Tensor) -> Behind:
    """With room for so many chunks."""
    (heads, size_v), size_k = v.shape[2:], k.shape[3]
    ups = None
    if v.dtype == torch.float16:
        ups = v.new_empty(chunks, heads, size_v // HALF.value, dtype=torch.float32)
    return Behind(v.new_empty(chunks, heads, size_k, size_v), ups, first_chunk)


def rows_of(x: Tensor, columns: int) -> TensorDescriptor:
    """How chunks of x [B, T, heads, D] come and go, so many columns of a head at a time."""
    assert x.data_ptr() % 16 == 0, "see layouts.laid_out"
    tokens, width = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    made = object.__new__(TensorDescriptor)  # what it would check is so, and takes 5 µs of the host
    made.__dict__.update(
        base=x, shape=[tokens, width], strides=[width, 1], block_shape=[C.value, columns], layout=_layout(columns),
        padding="zero",
    )  # fmt: skip
    return made


@cache
def _layout(columns: int) -> gl.NVMMASharedLayout:
    return shared_layout(columns)


@gluon.jit
def load_gates(gates, begin, i, count, h, H, DECAY: gl.constexpr):
    """Those of chunk i, [C], and its whole decay: see gates.load_gates. Nothing is done with what is loaded, so that it
    may come late."""
    place = gl.arange(0, C, layout=LINE)
    here = gl.minimum(C, count - i * C)
    if DECAY == CONSTANT:
        rate = gl.load(gates + h).to(gl.float32)
        rate = gl.where(rate < SHUT, SHUT, rate) * LOG2_E
        return rate * gl.minimum(place + 1, here).to(gl.float32), rate * here.to(gl.float32)
    else:
        last = gl.maximum(here - 1, 0)
        first = gates + (begin + i * C) * H + h
        end = gl.load(first + last * H, mask=here > 0, other=0.0)
        return gl.load(first + gl.minimum(place, last) * H, mask=here > 0, other=0.0), end


@gluon.jit
def whole_decay(gates_copy, LAYOUT: gl.constexpr):
    """That of a chunk, [1], from its copy in shared memory: its last place has it, be there a token or not."""
    return gates_copy.slice(C - 1, 1).load(LAYOUT)


@gluon.jit
def half_rows(PART: gl.constexpr):
    """Places in a state of half of its rows, [HALF, SIZE], coalesced: products have other layouts."""
    row = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, LINES))
    return row[:, None] * SIZE + gl.arange(0, SIZE, layout=gl.SliceLayout(0, LINES))[None, :]


@gluon.jit
def load_initial_state(initial, at, tile, h, H, AREA: gl.constexpr = SIZE * SIZE):
    """What enters a tile, at some places of the state, of so many numbers: see scan.load_initial_state."""
    local, incoming, passed, owner = initial
    x = gl.load(local + (tile * H + h) * AREA + at)
    if incoming is not None:
        came = gl.load(incoming + (gl.load(owner + tile).to(gl.int64) * H + h) * AREA + at)
        if passed is not None:
            came *= gl.exp(gl.load(passed + tile * H + h))
        x += came
    return x


@gluon.jit
def clear_tail(buffer, i, count, LAYOUT: gl.constexpr):
    """Zeroes the rows of chunk i that are no tokens of this tile."""
    place = i * C + gl.arange(0, C, layout=gl.SliceLayout(1, LAYOUT))
    buffer.store(gl.where((place < count)[:, None], buffer.load(LAYOUT), 0.0))


@gluon.jit
def send_rows(y, rows, buffer, begin, i, count, col, stride, LAYOUT: gl.constexpr):
    """Writes chunk i, of the buffer's width, once all threads see the buffer: whole ones to `rows` from column `col`
    on, while all go on (tma.store_wait tells when the buffer has been read), else those that are tokens to y."""
    if count - i * C < C:
        store_tokens(y, buffer, i, count, stride, LAYOUT)
    else:
        tma.async_copy_shared_to_global(rows, [begin.to(gl.int32) + i * C, col], buffer)


@gluon.jit
def store_tokens(y, buffer, i, count, stride, LAYOUT: gl.constexpr):
    """Writes chunk i's rows, of the buffer's width, those that are tokens."""
    place = i * C + gl.arange(0, C, layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, buffer.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    gl.store(y + (place * stride)[:, None] + cols[None, :], buffer.load(LAYOUT), mask=(place < count)[:, None])
