"""What comes to a program of the delta rule's scans, chunk by chunk."""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lasp.kernels.triton.hopper.layouts import C
from lasp.kernels.triton.hopper.shared import blocks_of
from lasp.kernels.triton.shared.decay import DIAGONAL


class Program(NamedTuple):
    """What a program scans: a tile of tokens from `begin` on, `length` of them, whose chunks begin with number `chunk`,
    for a `part` of head h, of H; it is the `row`-th of `rows` such parts in this launch, V columns from `column` on."""

    begin: gl.tensor
    length: gl.tensor
    chunk: gl.tensor
    h: gl.tensor
    part: gl.tensor
    column: gl.tensor
    row: gl.tensor
    rows: gl.tensor
    H: gl.tensor
    G: gl.tensor  # heads that share q and k


class Rows(NamedTuple):
    """What comes chunk by chunk: how it comes, or where in shared memory it lies, by stages of a ring."""

    q: gl.shared_memory_descriptor  # [C, K]; q⁺, k⁺ and k⁻ if DIAGONAL
    k: gl.shared_memory_descriptor
    written: gl.shared_memory_descriptor  # the last of them
    v: gl.shared_memory_descriptor  # [C, V]
    ut: gl.shared_memory_descriptor  # [C, C]: T
    scores: gl.shared_memory_descriptor  # [C, C]: P
    do: gl.shared_memory_descriptor | None = None
    u: gl.shared_memory_descriptor | None = None
    states: gl.shared_memory_descriptor | None = None  # [V, K]


class Gates(NamedTuple):
    """A chunk's, in shared memory, [C] each; if DIAGONAL there is beta alone."""

    beta: gl.shared_memory_descriptor
    ln_passed: gl.shared_memory_descriptor  # b
    from_start: gl.shared_memory_descriptor  # e^b
    to_end: gl.shared_memory_descriptor  # e^{b_C - b}


def states_of(x: Tensor) -> TensorDescriptor:
    """How states, x [chunks, heads, V, K], come and go, one by one: as the rows of them all."""
    return blocks_of(x, x.shape[3], list(x.shape[2:]))


@gluon.jit
def fetch_gates(gates, ln_ends, place, i, line, filled, K: gl.constexpr, DECAY: gl.constexpr):
    """Has the one warp that calls it copy what ut_transform gave of chunk i, [4 C], or, if DIAGONAL, beta alone, and
    b_C. `filled` waits for that, too; it must not be full before it is told so."""
    at = (place.chunk + i) * place.H + place.h
    gates += at * 4 * C
    if DECAY == DIAGONAL:
        token = gl.arange(0, C, layout=gl.BlockedLayout([2], [32], [1], [0]))
        async_copy.async_copy_global_to_shared(line.slice(0, C), gates + token)
        channel = gl.arange(0, K, layout=gl.BlockedLayout([4], [32], [1], [0]))
        async_copy.async_copy_global_to_shared(line.slice(2 * C, K), ln_ends + at * K + channel)
    else:
        number = gl.arange(0, 4 * C, layout=gl.BlockedLayout([4], [32], [1], [0]))
        async_copy.async_copy_global_to_shared(line, gates + number)
    async_copy.mbarrier_arrive(filled)


@gluon.jit
def split_gates(line):
    return Gates(line.slice(0, C), line.slice(C, C), line.slice(2 * C, C), line.slice(3 * C, C))
