"""Phase 1: the summary of every tile of tokens (math §1), forward S and A from k, v, backward D from q, do.

    S = Σ_t (k_t e^{b_end - b_t}) v_tᵀ        D = scale · Σ_t (q_t e^{b_t}) do_tᵀ        log A = b_end

b is the cumulative decay from the tile's start. Each is scanned from the end towards which it decays, so that a decay
is known when its token comes: no exponent is above zero, and the sum needs no rescaling. It stops where nothing is left
of what comes (shared.reach). The scan that follows (phase 3) begins where this one stops, with what the cache still
holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import block_of, cdiv, next_power_of_2
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.scalar.config import ScalarConfig
from lasp.kernels.triton.scalar.gates import load_chunk_decays, load_gates
from lasp.kernels.triton.shared.decay import LOG2_E, NONE
from lasp.kernels.triton.shared.reach import chunks_in_reach, part_in_reach


@triton.jit
def _states(
    k,  # [tokens, Hq, K]: k, or q backward
    v,  # [tokens, H, V]: v, or do backward
    gates,  # see gates.cumulate
    states,  # [M, H, K, V] fp32
    transitions,  # [M, H] fp32: the tiles' log decays, written forward
    largest_decay,  # [M, H] fp32: the largest log2 decay of their chunks, negated, written forward
    start, length, scale, H, G,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,  # the most that a tile has
):  # fmt: skip
    blocks: tl.constexpr = ((K + BK - 1) // BK) * ((V + BV - 1) // BV)  # neighbours: they read the same
    tile, h, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(1), tl.program_id(0) % blocks
    rows = (block % tl.cdiv(K, BK)) * BK + tl.arange(0, BK)
    cols = (block // tl.cdiv(K, BK)) * BV + tl.arange(0, BV)
    griddepcontrol_wait()
    begin, count = tl.load(start + tile), tl.load(length + tile)
    state = tl.zeros([BK, BV], tl.float32)
    half: tl.constexpr = v.dtype.element_ty == tl.float16
    dtype: tl.constexpr = tl.float32 if half and DECAY != NONE else v.dtype.element_ty  # fp16 holds no small decay
    if DECAY != NONE:
        decays = load_chunk_decays(gates, begin, count, h, H, C, CHUNKS, DECAY, not BACKWARD)
        reach = chunks_in_reach(tl.arange(0, CHUNKS), decays, 0.0)
        begin, count = part_in_reach(begin, count, reach, C, BACKWARD)
    passed = 0.0  # log2 decay of the chunks passed so far
    chunks = tl.cdiv(count, C)
    for step in range(chunks):
        i = step if BACKWARD else chunks - 1 - step
        place = i * C + tl.arange(0, C)
        here = place < count
        tokens = begin + place
        kt = tl.load(
            k + ((tokens * (H // G) + h // G) * K)[None, :] + rows[:, None],
            mask=here[None, :] & (rows < K)[:, None],
            other=0.0,
        )
        at_v = ((tokens * H + h) * V)[:, None] + cols[None, :]
        vc = tl.load(v + at_v, mask=here[:, None] & (cols < V)[None, :], other=0.0)
        if DECAY != NONE:
            b, end = load_gates(gates, begin, i, count, h, H, C, C, DECAY)
            vc = (vc * tl.exp2(passed + (b if BACKWARD else end - b).to(tl.float32))[:, None]).to(dtype)
            passed += end.to(tl.float32)
        state = tl.dot(kt.to(dtype), vc.to(dtype), state, input_precision=PRECISION)
    inside = (rows < K)[:, None] & (cols < V)[None, :]
    tl.store(states + (tile * H + h) * K * V + rows[:, None] * V + cols[None, :], state * scale, mask=inside)
    if DECAY != NONE and not BACKWARD:
        tl.store(transitions + tile * H + h, tl.sum(decays, axis=0).to(tl.float32) / LOG2_E, mask=block == 0)
        tl.store(largest_decay + tile * H + h, tl.max(-decays, axis=0).to(tl.float32), mask=block == 0)


def tile_states(
    tiles: Tiles,
    k: Tensor,
    v: Tensor,
    gates: Tensor | None,
    config: ScalarConfig,
    *,
    backward: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """S [M, H, K, V] of every tile from k, v, log A [M, H], and the largest log2 decay of a chunk, negated [M, H].

    Backward D from q and do, and nothing else.
    """
    (heads, value_dim), (q_heads, key_dim) = v.shape[2:], k.shape[2:]
    states = v.new_empty(tiles.count, heads, key_dim, value_dim, dtype=torch.float32)
    none = gates is None or backward
    transitions, largest_decay = (None if none else states.new_empty(tiles.count, heads) for _ in range(2))
    block_k, block_v = min(128, block_of(key_dim)), min(128, block_of(value_dim))
    grid = (tiles.count * cdiv(key_dim, block_k) * cdiv(value_dim, block_v), heads)
    launch(
        _states, grid,
        k, v, gates, states, transitions, largest_decay, tiles.start, tiles.length, scale, heads, heads // q_heads,
        K=key_dim, V=value_dim, BK=block_k, BV=block_v, C=config.chunk, DECAY=Decay.of(gates).value, BACKWARD=backward,
        PRECISION=config.precision, CHUNKS=next_power_of_2(cdiv(tiles.size, config.chunk)),
        num_warps=8 if block_k * block_v > 64 * 64 else 4, num_stages=config.state_stages,
        pdl=True,
    )  # fmt: skip
    return states, transitions, largest_decay
