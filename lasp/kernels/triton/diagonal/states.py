"""Diagonal decay, the scans that find states: a tile's summary (phase 1), and the states of every chunk (for backward).

    S = Σ_t (k_t e^{b_end - b_t}) v_tᵀ        D = Σ_t (q_t e^{b_t}) do_tᵀ        log A = b_end

chunk by chunk with k̃ and q̃ (see rescale), in reverse for gradients.
"""

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.diagonal.rescale import DiagonalConfig, Rescaled, load_end, load_half
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import LOG2_E
from lasp.kernels.triton.shared.reach import farthest, part_in_reach
from lasp.kernels.triton.shared.rows import load_rows
from lasp.kernels.triton.shared.state_passing import InitialStates, load_initial_state


@triton.jit
def _reach(ln_ends, slot, chunks, h, H, rows, K: tl.constexpr, FROM_START: tl.constexpr):
    """How many of a tile's chunks its summary has to scan (shared.reach), and the log decay of them all, [BK]."""
    n, reach = tl.arange(0, 16), 0
    total = tl.zeros([rows.shape[0]], tl.float32)
    for block in range(0, chunks, 16):
        place = block + n
        at = (slot + (place if FROM_START else chunks - 1 - place)) * H + h
        here = (place < chunks)[:, None] & (rows < K)[None, :]
        ends = tl.load(ln_ends + (at * K)[:, None] + rows[None, :], mask=here, other=0.0)
        before = tl.where(here, (total[None, :] + tl.cumsum(ends, axis=0) - ends) * LOG2_E, float("-inf"))
        reach = tl.maximum(reach, farthest(place, tl.max(before, axis=1)))
        total += tl.sum(ends, axis=0)
    return reach, total


@triton.jit
def _scan_states(
    k,  # [tokens, H, K]: k̃, or q̃ backward
    v,  # [tokens, H, V]: v, or do backward
    ln_ends,  # [slots, H, K] fp32
    ln_chunk_decay,  # [slots, H] fp32
    states,  # [M, H, K, V] fp32: the tiles' summaries, written; or, EACH_CHUNK, with the next two, see InitialStates
    incoming,
    passed,
    transitions,  # [M, H, K] fp32: the tiles' log decays, written forward
    chunk_states,  # [slots, H, K, V]: X̃ of every chunk, written if EACH_CHUNK
    owner, start, length, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, BACKWARD: tl.constexpr,
    EACH_CHUNK: tl.constexpr, MAX_LN_DECAY: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if not EACH_CHUNK:  # see pdl
        griddepcontrol_wait()
    tile, h, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows, cols = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    begin, count = tl.load(start + tile), tl.load(length + tile)
    inside = (rows < K)[:, None] & (cols < V)[None, :]
    place = rows[:, None] * V + cols[None, :]
    if EACH_CHUNK:
        state = load_initial_state(states, incoming, passed, owner, tile, h, H, place, inside, rows, K, V)
    else:
        state = tl.zeros([BK, BV], tl.float32)
        reach, total = _reach(ln_ends, begin // C + tile, tl.cdiv(count, C), h, H, rows, K, BACKWARD)
        begin, count = part_in_reach(begin, count, reach, C, BACKWARD)
    chunks = tl.cdiv(count, C)
    for n in tl.range(0, chunks, num_stages=STAGES):
        i = (chunks - 1 - n) if BACKWARD else n
        here = i * C + tl.arange(0, C) < count
        slot = (begin // C + tile + i) * H + h
        kc = load_rows(k, begin + i * C, here, h, H, rows, K)
        vc = load_rows(v, begin + i * C, here, h, H, cols, V).to(k.dtype.element_ty)
        end, half = load_end(ln_ends, slot, rows, K), load_half(ln_chunk_decay, slot, MAX_LN_DECAY)
        if EACH_CHUNK:
            tl.store((chunk_states + slot * K * V) + place, state * tl.exp(half * end), mask=inside)
        state = tl.dot(tl.trans(kc), vc, state * tl.exp((1.0 - half) * end), input_precision=PRECISION) * tl.exp(
            half * end
        )
    if EACH_CHUNK:
        griddepcontrol_wait()
    else:
        tl.store((states + (tile * H + h) * K * V) + place, state, mask=inside)
    if not (EACH_CHUNK or BACKWARD):
        tl.store(transitions + (tile * H + h) * K + rows, total, mask=(rows < K) & (part == 0))


def tile_states(tiles: Tiles, x: Rescaled, v: Tensor, config: DiagonalConfig) -> tuple[Tensor, Tensor]:
    """S [M, H, K, V] and log A [M, H, K] of every tile."""
    transitions = x.ln_ends.new_empty(tiles.count, *x.k.shape[2:])
    states = x.ln_ends.new_empty(*transitions.shape, v.shape[3])
    _launch(tiles, x.k, v, x, InitialStates(states), transitions, None, config, backward=False)
    return states, transitions


def tile_states_grad(tiles: Tiles, x: Rescaled, do: Tensor, config: DiagonalConfig) -> Tensor:
    """D [M, H, K, V] of every tile."""
    states = x.ln_ends.new_empty(tiles.count, *x.q.shape[2:], do.shape[3])
    _launch(tiles, x.q, do, x, InitialStates(states), None, None, config, backward=True)
    return states


def chunk_states(tiles: Tiles, x: Rescaled, v: Tensor, initial: InitialStates, config: DiagonalConfig) -> Tensor:
    """X̃ of every chunk, [slots, H, K, V] in the operands' dtype, from the states that enter the tiles."""
    states = x.k.new_empty(*x.ln_ends.shape, v.shape[3])
    _launch(tiles, x.k, v, x, initial, None, states, config, backward=False)
    return states


def _launch(
    tiles: Tiles, k: Tensor, v: Tensor, x: Rescaled, states: InitialStates, transitions: Tensor | None,
    chunk_states: Tensor | None, config: DiagonalConfig, *, backward: bool,
) -> None:  # fmt: skip
    heads, key_dim, value_dim = *k.shape[2:], v.shape[3]
    block_v = min(block_of(value_dim), config.states.columns)
    launch(
        _scan_states, (tiles.count, heads, cdiv(value_dim, block_v)),
        k, v, x.ln_ends, x.ln_chunk_decay, *states, transitions, chunk_states,
        tiles.owner, tiles.start, tiles.length, heads,
        K=key_dim, V=value_dim, BK=block_of(key_dim), BV=block_v, C=config.chunk, BACKWARD=backward,
        EACH_CHUNK=chunk_states is not None, MAX_LN_DECAY=config.max_ln_decay, PRECISION=config.precision,
        STAGES=config.states.stages, num_warps=config.states.warps, pdl=True,
    )  # fmt: skip
