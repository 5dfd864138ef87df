"""What a program scans, and what comes to it, chunk by chunk."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from lasp.kernels.triton.hopper.layouts import C, shared_layout
from lasp.kernels.triton.hopper.shared import clear_tail, publish


class Tile(NamedTuple):
    """What a program scans: `length` tokens from `begin` on, whose chunks begin with number `chunk`, of head h of H (or
    of heads from there on)."""

    begin: gl.tensor
    length: gl.tensor
    chunk: gl.tensor
    h: gl.tensor
    H: gl.tensor


class Rows(NamedTuple):
    """Of chunks of these tensors: how they come, or where in shared memory they lie, by stages of a ring."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    do: gl.shared_memory_descriptor


@gluon.jit
def make_rows(
    dtype: gl.constexpr, KEYS: gl.constexpr, K: gl.constexpr, VALUES: gl.constexpr, V: gl.constexpr
):  # fmt: skip
    """Room for so many chunks of q and k, and of v and do."""
    q = gl.allocate_shared_memory(dtype, [KEYS, C, K], shared_layout(K))
    k = gl.allocate_shared_memory(dtype, [KEYS, C, K], shared_layout(K))
    v = gl.allocate_shared_memory(dtype, [VALUES, C, V], shared_layout(V))
    do = gl.allocate_shared_memory(dtype, [VALUES, C, V], shared_layout(V))
    return Rows(q, k, v, do)


@gluon.jit
def fetch_rows(sources, rows, ring, step, token, h, G):
    """Has a chunk of head h come, from this token on; G heads share q and k."""
    K: gl.constexpr = rows.k.shape[2]
    V: gl.constexpr = rows.v.shape[2]
    filled, stage = ring.acquire(step), step % ring.stages
    mbarrier.expect(filled, 2 * C * 2 * (K + V))
    tma.async_copy_global_to_shared(sources.k, [token, h // G * K], filled, rows.k.index(stage))
    tma.async_copy_global_to_shared(sources.q, [token, h // G * K], filled, rows.q.index(stage))
    tma.async_copy_global_to_shared(sources.v, [token, h * V], filled, rows.v.index(stage))
    tma.async_copy_global_to_shared(sources.do, [token, h * V], filled, rows.do.index(stage))


class Initial(NamedTuple):
    """InitialStates, and the segment that owns each tile."""

    local: gl.tensor
    incoming: gl.tensor
    passed: gl.tensor
    owner: gl.tensor


@gluon.jit
def clear_tails(rows, i, count):
    """Zeroes what are no tokens in the rows of chunk i. Groups of warps that share them write the same zeros."""
    if count - i * C < C:
        clear_tail(rows.q, i, count)
        clear_tail(rows.k, i, count)
        clear_tail(rows.v, i, count)
        clear_tail(rows.do, i, count)
        publish()
