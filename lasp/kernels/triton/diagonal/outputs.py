"""Phase 3 forward with a diagonal decay: a tile's outputs, walking up with the state X in registers.

o = q̃ X̃ + tril(q̃ k̃ᵀ) v        X <- e^{h b_C} (e^{(1 - 2h) b_C} X̃ + k̃ᵀ v)        (diagonal_chunk)
"""

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.diagonal.rescale import DiagonalConfig, Rescaled, load_end, load_half
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.shared.rows import load_rows, store_rows
from lasp.kernels.triton.shared.state_passing import InitialStates, load_initial_state


@triton.jit
def _outputs(
    q,  # [tokens, H, K]: q̃
    k,  # [tokens, H, K]: k̃
    v,  # [tokens, H, V]
    ends,  # [slots, H, K] fp32
    ln_chunk_decay,  # [slots, H] fp32
    local,  # [M, H, K, V] fp32: see InitialStates
    incoming,
    passed,
    o,  # [tokens, H, V]; without the second term in secondary chunks
    owner,
    start,
    length,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    MAX_LN_DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, cols = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    begin, count = tl.load(start + tile), tl.load(length + tile)
    inside = (rows < K)[:, None] & (cols < V)[None, :]
    at = rows[:, None] * V + cols[None, :]
    state = load_initial_state(local, incoming, passed, owner, tile, h, H, at, inside, rows, K, V)
    operand: tl.constexpr = k.dtype.element_ty
    for i in tl.range(0, tl.cdiv(count, C), num_stages=STAGES):
        place = i * C + tl.arange(0, C)
        here, token = place < count, begin + i * C
        slot = (begin // C + tile + i) * H + h
        qc = load_rows(q, token, here, h, H, rows, K)
        kc = load_rows(k, token, here, h, H, rows, K)
        vc = load_rows(v, token, here, h, H, cols, V).to(operand)
        end, half = load_end(ends, slot, rows, K), load_half(ln_chunk_decay, slot, MAX_LN_DECAY)
        p = tl.dot(qc, tl.trans(kc), input_precision=PRECISION)
        p = tl.where((place[:, None] >= place[None, :]) & (half > 0.0), p, 0.0).to(operand)
        state *= tl.exp(half * end)
        oc = tl.dot(qc, state.to(operand), input_precision=PRECISION)
        oc = tl.dot(p, vc, oc, input_precision=PRECISION)
        store_rows(o, oc, token, here, h, H, cols, V)
        state *= tl.exp((1.0 - 2.0 * half) * end)
        state = tl.dot(tl.trans(kc), vc, state, input_precision=PRECISION) * tl.exp(half * end)


def outputs(tiles: Tiles, x: Rescaled, v: Tensor, initial: InitialStates, o: Tensor, config: DiagonalConfig) -> None:
    """Writes o [B, T, H, V], for secondary chunks without what their tokens read of each other."""
    heads, key_dim, value_dim = *x.k.shape[2:], v.shape[3]
    block_v = min(block_of(value_dim), config.outputs.columns)
    launch(
        _outputs, (tiles.count, heads, cdiv(value_dim, block_v)),
        x.q, x.k, v, x.ends, x.ln_chunk_decay, *initial, o, tiles.owner, tiles.start, tiles.length, heads,
        K=key_dim, V=value_dim, BK=block_of(key_dim), BV=block_v, C=config.chunk, MAX_LN_DECAY=config.max_ln_decay,
        PRECISION=config.precision, STAGES=config.outputs.stages, num_warps=config.outputs.warps,
    )  # fmt: skip
