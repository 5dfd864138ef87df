"""What scans without a decay or with a scalar one share: gates, states that come in, their gradients that go out."""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lasp.kernels.triton.hopper.layouts import HALF, SIZE, C
from lasp.kernels.triton.hopper.shared import blocks_of
from lasp.kernels.triton.shared.decay import CONSTANT, LOG2_E, SHUT

LINES = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))  # rows of 128 of fp32, coalesced
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


class Behind(NamedTuple):
    """The gradients of the states behind all chunks, / scale, [chunks, H, K, V], as rounded for products; in fp16 with
    factors [chunks, H, V / 64]. first_chunk: [M], of every tile."""

    states: Tensor
    ups: Tensor | None
    first_chunk: Tensor

    def rows(self, rows: int, columns: int) -> TensorDescriptor:
        """How parts of so many rows and columns come and go."""
        return blocks_of(self.states, self.states.shape[3], [rows, columns])


def new_behind(chunks: int, k: Tensor, v: Tensor, first_chunk: Tensor) -> Behind:
    """With room for so many chunks."""
    (heads, size_v), size_k = v.shape[2:], k.shape[3]
    ups = None
    if v.dtype == torch.float16:
        ups = v.new_empty(chunks, heads, size_v // HALF.value, dtype=torch.float32)
    return Behind(v.new_empty(chunks, heads, size_k, size_v), ups, first_chunk)


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
def load_chunk_decays(gates, begin, count, n, h, H, DECAY: gl.constexpr, REVERSE: gl.constexpr):
    """The log2 decays of the chunks n of a tile, as many as n has: see gates.load_chunk_decays."""
    chunks = gl.cdiv(count, C)
    i = chunks - 1 - n if REVERSE else n
    here = gl.minimum(C, count - i * C)
    if DECAY == CONSTANT:
        rate = gl.load(gates + h).to(gl.float32)
        rate = gl.where(rate < SHUT, SHUT, rate) * LOG2_E
        return gl.where(n < chunks, rate * here.to(gl.float32), 0.0)
    else:
        return gl.load(gates + (begin + i * C + here - 1) * H + h, mask=n < chunks, other=0.0)


@gluon.jit
def half_rows(PART: gl.constexpr):
    """Places in a state of half of its rows, [HALF, SIZE], coalesced: products have other layouts."""
    row = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, LINES))
    return row[:, None] * SIZE + gl.arange(0, SIZE, layout=gl.SliceLayout(0, LINES))[None, :]


@gluon.jit
def load_initial_state(initial, at, tile, h, H, AREA: gl.constexpr = SIZE * SIZE):
    """What enters a tile, at some places of the state, of so many numbers: see scan.load_initial_state."""
    x = gl.load(initial.local + (tile * H + h) * AREA + at)
    if initial.incoming is not None:
        came = gl.load(initial.incoming + (gl.load(initial.owner + tile).to(gl.int64) * H + h) * AREA + at)
        if initial.passed is not None:
            came *= gl.exp(gl.load(initial.passed + tile * H + h))
        x += came
    return x
