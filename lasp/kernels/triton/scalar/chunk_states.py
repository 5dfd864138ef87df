"""The states before all chunks, and in reverse their gradients behind them, rounded for products: with the first a
reverse scan finds every gradient at once, with both each chunk does.

    X <- w X + Σ_j w_j k_j v_jᵀ          G <- w G + scale · Σ_i w_i q_i do_iᵀ

In fp16 a state is scaled, so that its largest number fits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.inputs import LinearInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.scalar.gates import load_gates
from lasp.kernels.triton.shared.decay import NONE
from lasp.kernels.triton.shared.state_passing import InitialStates, load_initial_state
from lasp.kernels.triton.shared.tiles import CHUNK

LARGE = tl.constexpr(16384.0)  # the largest number of a state in fp16


class ChunkStates(NamedTuple):
    """states: [chunks, H, K, V]. ups: [chunks, H, blocks], the factors of as many blocks of rows if they are fp16.

    They may be those of some tiles alone, and begin with the first chunk of the first of these."""

    states: Tensor
    ups: Tensor | None


@triton.jit
def _scan(
    k, v, gates, local, incoming, passed, states, ups, others, other_ups, products, owner, start, length, first_chunk,
    first, program, scale, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some rows of the states of a tile and a head. Neighbours have the same, and so find it in the cache."""
    blocks: tl.constexpr = (K + BK - 1) // BK
    tile, h, block = first + program // blocks, tl.program_id(1), program % blocks
    rows, cols = block * BK + tl.arange(0, BK), tl.arange(0, BV)
    begin, count = tl.load(start + tile), tl.load(length + tile)
    chunk = tl.load(first_chunk + tile) - tl.load(first_chunk + first)
    place, inside = rows[:, None] * V + cols[None, :], (rows < K)[:, None] & (cols < V)[None, :]
    x = load_initial_state(local, incoming, passed, owner, tile, h, H, place, inside, None, K, V)
    inside = None if K % BK == 0 and V == BV else inside  # or masks take registers that the state needs
    dtype: tl.constexpr = states.dtype.element_ty
    k += (begin * (H // G) + h // G) * K  # within a tile 32 bits are enough
    v += (begin * H + h) * V
    chunks = tl.cdiv(count, C)
    for step in tl.range(0, chunks, num_stages=STAGES):
        i = (chunks - 1 - step) if REVERSE else step
        token = i * C + tl.arange(0, C)
        here = token < count
        kt = tl.load(
            k + (token * (H // G * K))[None, :] + rows[:, None], mask=here[None, :] & (rows < K)[:, None], other=0.0
        )
        vc = tl.load(v + (token * (H * V))[:, None] + cols[None, :], mask=here[:, None] & (cols < V), other=0.0)
        at = (chunk + i) * H + h
        up = at * blocks + block
        if others is not None:
            passed_on = x * tl.load(others + at * (K * V) + place, mask=inside)
            if dtype == tl.float16:
                passed_on *= tl.load(other_ups + up)
            if inside is not None:
                passed_on = tl.where(inside, passed_on, 0.0)
            tl.store(products + at * K + rows, tl.sum(passed_on, axis=1), mask=rows < K)
        if dtype == tl.float16:
            most = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), 1e-30)
            tl.store(ups + up, most / LARGE)
            tl.store(states + at * (K * V) + place, (x * (LARGE / most)).to(dtype), mask=inside)
        else:
            tl.store(states + at * (K * V) + place, x.to(dtype), mask=inside)
        if DECAY != NONE:
            b, end = load_gates(gates, begin, i, count, h, H, C, C, DECAY)
            b, end = b.to(tl.float32), end.to(tl.float32)
            x *= tl.exp2(end)
        factor = scale
        if REVERSE and dtype == tl.float16:  # which has no small numbers: see hopper.reverse_step
            if DECAY != NONE:
                room = tl.floor(tl.max(b, axis=0))
                kt, factor = kt * tl.exp2(b - room)[None, :], tl.exp2(room) * scale
            x += tl.dot(kt.to(dtype), vc, input_precision=PRECISION) * factor
        else:
            kt = kt * scale if DECAY == NONE else kt * (tl.exp2(b if REVERSE else end - b) * scale)[None, :]
            x = tl.dot(kt.to(dtype), vc, x, input_precision=PRECISION)


@triton.jit
def _chunk_states(
    k,  # [tokens, H // G, K], q in reverse
    v,  # [tokens, H, V], do in reverse
    gates,  # see gates.cumulate
    local,  # [M, H, K, V]: X before the scan, with the next two: see InitialStates
    incoming,  # [N, H, K, V]
    passed,  # [M, H]
    states,  # see ChunkStates
    ups,
    others,  # states of the other direction, if products with them are wanted
    other_ups,
    products,  # [chunks, H, K]: those, by rows
    owner, start, length, first_chunk, first, scale, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    griddepcontrol_wait()
    _scan(
        k, v, gates, local, incoming, passed, states, ups, others, other_ups, products, owner, start, length,
        first_chunk, first, tl.program_id(0).to(tl.int64), scale, H, G,
        K, V, BK, BV, C, DECAY, REVERSE, PRECISION, STAGES,
    )  # fmt: skip


@triton.jit
def _states_and_gradients(
    q, k, v, do, gates,
    local, incoming, passed,  # X before the scan
    d_local, d_incoming, d_passed,  # G, likewise
    before, before_ups, behind, behind_ups,
    owner, start, length, first_chunk, first, scale, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both side by side: either alone leaves multiprocessors without work."""
    griddepcontrol_wait()
    program = tl.program_id(0).to(tl.int64) // 2
    if tl.program_id(0) % 2 == 0:
        _scan(
            k, v, gates, local, incoming, passed, before, before_ups, None, None, None, owner, start, length,
            first_chunk, first, program, 1.0, H, G, K, V, BK, BV, C, DECAY, False, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _scan(
            q, do, gates, d_local, d_incoming, d_passed, behind, behind_ups, None, None, None, owner, start, length,
            first_chunk, first, program, scale, H, G, K, V, BK, BV, C, DECAY, True, PRECISION, STAGES,
        )  # fmt: skip


def chunk_states(
    tiles: Tiles,
    chunks: int,
    first_chunk: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor | None,
    initial: InitialStates,
    *,
    chunk: int = CHUNK,
    block_k: int | None = None,
    part: range | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    others: ChunkStates | None = None,
    products: Tensor | None = None,
    precision: str = "tf32",
) -> ChunkStates:
    """Given the states that tiles start from, or in reverse the gradients of those that they end with, and the first of
    the sequence's chunks of so many tokens that each tile has [M].

    block_k: rows of a state that have a factor if it is fp16; None is all. part: of these tiles alone, which have at
    most so many chunks. Given the states of the other direction, fills `products`.
    """
    (heads, value_dim), (q_heads, key_dim) = v.shape[2:], k.shape[2:]
    found, block = _empty(chunks, k, v, block_k)
    part = range(tiles.count) if part is None else part
    launch(
        _chunk_states, (len(part) * cdiv(key_dim, block), heads),
        k, v, gates, *initial, *found, *(others or (None, None)), products, tiles.owner, tiles.start, tiles.length,
        first_chunk, part.start, scale, heads, heads // q_heads,
        K=key_dim, V=value_dim, BK=block, BV=block_of(value_dim), C=chunk, DECAY=Decay.of(gates).value, REVERSE=reverse,
        PRECISION=precision, STAGES=3, num_warps=_warps(block, value_dim), pdl=True,
    )  # fmt: skip
    return found


def states_and_gradients(
    tiles: Tiles,
    chunks: int,
    first_chunk: Tensor,
    x: LinearInputs,
    do: Tensor,
    gates: Tensor,
    initial: InitialStates,
    d_final: InitialStates,
    part: range,
) -> tuple[ChunkStates, ChunkStates]:
    """Those before chunks and their gradients behind them, of some tiles, which have at most so many chunks."""
    (heads, value_dim), (q_heads, key_dim) = x.v.shape[2:], x.k.shape[2:]
    (before, block), (behind, _) = (_empty(chunks, x.k, x.v, None) for _ in range(2))
    launch(
        _states_and_gradients, (2 * len(part) * cdiv(key_dim, block), heads),
        x.q, x.k, x.v, do, gates, *initial, *d_final, *before, *behind, tiles.owner, tiles.start, tiles.length,
        first_chunk, part.start, x.scale, heads, heads // q_heads,
        K=key_dim, V=value_dim, BK=block, BV=block_of(value_dim), C=CHUNK, DECAY=Decay.of(gates).value,
        PRECISION="tf32", STAGES=3, num_warps=_warps(block, value_dim), pdl=True,
    )  # fmt: skip
    return before, behind


def _empty(chunks: int, k: Tensor, v: Tensor, block_k: int | None) -> tuple[ChunkStates, int]:
    """And how many rows of one a program scans."""
    heads, (key_dim, value_dim) = v.shape[2], (k.shape[3], v.shape[3])
    ups, block = None, min(64, block_of(key_dim))
    if v.dtype == torch.float16:
        block = block_of(min(key_dim, block_k or key_dim))
        ups = v.new_empty(chunks, heads, cdiv(key_dim, block), dtype=torch.float32)
    return ChunkStates(v.new_empty(chunks, heads, key_dim, value_dim), ups), block


def _warps(block: int, value_dim: int) -> int:
    return 8 if block > 64 or value_dim > 128 else 4
