"""Phase 3 with a diagonal decay, the scans with a state in registers: forward with X for a tile's outputs, in reverse
with its gradient G for those of the values.

    o = q̃ X̃ + tril(q̃ k̃ᵀ) v         X <- e^{h b_C} (e^{(1 - 2h) b_C} X̃ + k̃ᵀ v)        X̃ = e^{h b_C} X
    dv = k̃ G̃ + triu(k̃ q̃ᵀ) do       G <- e^{h b_C} (e^{(1 - 2h) b_C} G̃ + q̃ᵀ do)       G̃ = e^{h b_C} G

(see rescale).
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
def _scan_outputs(
    a,  # [tokens, H, K]: q̃, in reverse k̃
    b,  # [tokens, H, K]: k̃, in reverse q̃
    c,  # [tokens, H, V]: v, in reverse do
    ln_ends,  # [slots, H, K] fp32
    ln_chunk_decay,  # [slots, H] fp32
    local,  # [M, H, K, V] fp32: see InitialStates
    incoming,
    passed,
    y,  # [tokens, H, V]: o, in reverse dv; without the second term in secondary chunks
    chunk_states,  # [slots, H, K, V]: in reverse, G̃ of every chunk
    owner, start, length, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr,
    MAX_LN_DECAY: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, cols = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    begin, count = tl.load(start + tile), tl.load(length + tile)
    inside = (rows < K)[:, None] & (cols < V)[None, :]
    at = rows[:, None] * V + cols[None, :]
    state = load_initial_state(local, incoming, passed, owner, tile, h, H, at, inside, rows, K, V)
    operand: tl.constexpr = b.dtype.element_ty
    chunks = tl.cdiv(count, C)
    for n in tl.range(0, chunks, num_stages=STAGES):
        i = (chunks - 1 - n) if REVERSE else n
        place = i * C + tl.arange(0, C)
        here, token = place < count, begin + i * C
        slot = (begin // C + tile + i) * H + h
        ac = load_rows(a, token, here, h, H, rows, K)
        bc = load_rows(b, token, here, h, H, rows, K)
        cc = load_rows(c, token, here, h, H, cols, V).to(operand)
        end, half = load_end(ln_ends, slot, rows, K), load_half(ln_chunk_decay, slot, MAX_LN_DECAY)
        p = tl.dot(ac, tl.trans(bc), input_precision=PRECISION)
        seen = place[:, None] <= place[None, :] if REVERSE else place[:, None] >= place[None, :]
        p = tl.where(seen & (half > 0.0), p, 0.0).to(operand)
        state *= tl.exp(half * end)
        if REVERSE:
            tl.store((chunk_states + slot * K * V) + at, state, mask=inside)
        yc = tl.dot(ac, state.to(operand), input_precision=PRECISION)
        yc = tl.dot(p, cc, yc, input_precision=PRECISION)
        store_rows(y, yc, token, here, h, H, cols, V)
        state *= tl.exp((1.0 - 2.0 * half) * end)
        state = tl.dot(tl.trans(bc), cc, state, input_precision=PRECISION) * tl.exp(half * end)


def scan_outputs(
    tiles: Tiles, x: Rescaled, rows: tuple[Tensor, Tensor, Tensor], initial: InitialStates, y: Tensor,
    chunk_states: Tensor | None, config: DiagonalConfig,
) -> None:  # fmt: skip
    """Writes y, in reverse if there are `chunk_states` to be written, too; rows: a, b and c of the kernel."""
    heads, key_dim, value_dim = *x.k.shape[2:], y.shape[3]
    block_v = min(block_of(value_dim), config.outputs.columns)
    launch(
        _scan_outputs, (tiles.count, heads, cdiv(value_dim, block_v)),
        *rows, x.ln_ends, x.ln_chunk_decay, *initial, y, chunk_states, tiles.owner, tiles.start, tiles.length, heads,
        K=key_dim, V=value_dim, BK=block_of(key_dim), BV=block_v, C=config.chunk, REVERSE=chunk_states is not None,
        MAX_LN_DECAY=config.max_ln_decay, PRECISION=config.precision, STAGES=config.outputs.stages,
        num_warps=config.outputs.warps,
    )  # fmt: skip
