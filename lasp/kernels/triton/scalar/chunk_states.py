"""The states before all chunks, rounded for products: with them a reverse scan finds every gradient at once.

    X <- w X + Σ_j w_j k_j v_jᵀ

In fp16 a state is scaled, so that its largest number fits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.scalar.gates import load_gates
from lasp.kernels.triton.shared.state_passing import InitialStates, load_initial_state
from lasp.kernels.triton.shared.tiles import CHUNK

LARGE = tl.constexpr(16384.0)  # the largest number of a state in fp16


class ChunkStates(NamedTuple):
    """states: [chunks, H, K, V]. ups: [chunks, H], their factors if they are fp16."""

    states: Tensor
    ups: Tensor | None


@triton.jit
def _chunk_states(
    k,  # [tokens, H // G, K]
    v,  # [tokens, H, V]
    gates,  # see gates.cumulate
    local,  # [M, H, K, V]: X before the scan, with the next two: see InitialStates
    incoming,  # [N, H, K, V]
    passed,  # [M, H]
    states,  # see ChunkStates
    ups,
    owner, start, length, first_chunk, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, cols = tl.program_id(2) * BK + tl.arange(0, BK), tl.arange(0, BV)
    griddepcontrol_wait()
    begin, count, chunk = tl.load(start + tile), tl.load(length + tile), tl.load(first_chunk + tile)
    place, inside = rows[:, None] * V + cols[None, :], (rows < K)[:, None] & (cols < V)[None, :]
    x = load_initial_state(local, incoming, passed, owner, tile, h, H, place, inside, None, K, V)
    dtype: tl.constexpr = states.dtype.element_ty
    k += (begin * (H // G) + h // G) * K  # within a tile 32 bits are enough
    v += (begin * H + h) * V
    for i in tl.range(0, tl.cdiv(count, C), num_stages=STAGES):
        token = i * C + tl.arange(0, C)
        here = token < count
        kt = tl.load(
            k + (token * (H // G * K))[None, :] + rows[:, None], mask=here[None, :] & (rows < K)[:, None], other=0.0
        )
        vc = tl.load(v + (token * (H * V))[:, None] + cols[None, :], mask=here[:, None] & (cols < V), other=0.0)
        b, end = load_gates(gates, begin, i, count, h, H, C, C, DECAY)
        b, end = b.to(tl.float32), end.to(tl.float32)
        at = (chunk + i) * H + h
        if dtype == tl.float16:
            most = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), 1e-30)
            tl.store(ups + at, most / LARGE)
            tl.store(states + at * (K * V) + place, (x * (LARGE / most)).to(dtype), mask=inside)
        else:
            tl.store(states + at * (K * V) + place, x.to(dtype), mask=inside)
        scaled = (vc * tl.exp2(end - b)[:, None]).to(dtype)
        x = tl.dot(kt, scaled, x * tl.exp2(end), input_precision=PRECISION)


def chunk_states(
    tiles: Tiles, chunks: int, first_chunk: Tensor, k: Tensor, v: Tensor, gates: Tensor, initial: InitialStates,
    precision: str = "tf32",
) -> ChunkStates:  # fmt: skip
    """Given the states that tiles start from, and the first of the sequence's chunks that each tile has [M]."""
    (heads, value_dim), (q_heads, key_dim) = v.shape[2:], k.shape[2:]
    states, ups, block_v = v.new_empty(chunks, heads, key_dim, value_dim), None, block_of(value_dim)
    block_k, warps = min(64, block_of(key_dim)), 4
    if v.dtype == torch.float16:  # a state has one factor
        ups = v.new_empty(chunks, heads, dtype=torch.float32)
        block_k, warps = block_of(key_dim), 8
    launch(
        _chunk_states, (tiles.count, heads, cdiv(key_dim, block_k)),
        k, v, gates, *initial, states, ups, tiles.owner, tiles.start, tiles.length, first_chunk, heads,
        heads // q_heads,
        K=key_dim, V=value_dim, BK=block_k, BV=block_v, C=CHUNK, DECAY=Decay.of(gates).value, PRECISION=precision,
        STAGES=3, num_warps=warps, pdl=True,
    )  # fmt: skip
    return ChunkStates(states, ups)
