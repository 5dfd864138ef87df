"""Diagonal decay, phase 0: queries and keys of every chunk rescaled to one point, and the configurations.

Within a chunk of C tokens every exponent is a difference of the cumulative gate b (math §8). Two kinds of chunk:

    primary     no channel decays by more than e^-max_ln_decay: the middle of the chunk's decay is the reference point,
                q̃ = q e^{b - b_C/2} and k̃ = k e^{b_C/2 - b} are at most e^{max_ln_decay/2} larger, scores are q̃ k̃ᵀ
    secondary   the rest: q̃ = q e^b and k̃ = k e^{b_C - b}, so that no exponent is above zero; the scores come in
                sub-chunks of 16 (secondary chunking, as GLA has it), which add to what the other kernels leave

A state X before the chunk meets q̃ as X̃ = e^{h b_C} X, and a gradient G of the state after it meets k̃ as
G̃ = e^{h b_C} G, where h, which `load_half` returns, is 1/2 in primary and 0 in secondary chunks; e^{(1 - 2h) b_C} lies
between the two. So gates enter the scans as one number per channel and chunk.

The chunks of tile m have the slots start[m] // C + m, …: unique, and at most tokens // C + tiles of them however the
segments are cut.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.shared.rows import load_decays, load_rows, store_rows

PRIMARY = 100.0  # e^50 fits into what 16 bits hold of operands; no gate that is shut (SHUT) lies in such a chunk


@dataclass(frozen=True)
class Launch:
    """columns: the widest block of V that a program holds (outputs, states) or works on at a time (gradients)."""

    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DiagonalConfig:
    """How the kernels are launched: a table keyed on head size and dtype, never on the length of a sequence.

    chunk: tokens per step.
    max_ln_decay: the largest decay of a chunk without secondary chunking, bounded by rounding in fp32, by the size of
        e^{max_ln_decay/2} otherwise.
    operand: dtype of q̃, k̃ and the other operands of matrix products: e^64, or a state, may exceed what fp16 holds.
    sums_by_products: cumulative sums of gates and their gradients on the matrix units, with 16 bits of each number.
    """

    chunk: int
    max_ln_decay: float
    operand: torch.dtype
    precision: str
    sums_by_products: bool
    states: Launch
    outputs: Launch
    gradients: Launch


def diagonal_config(k: Tensor, v: Tensor) -> DiagonalConfig:
    """The configuration for these head sizes and dtype."""
    return _config(k.shape[-1], max(k.shape[-1], v.shape[-1]), v.dtype)


@cache
def _config(key_dim: int, widest: int, dtype: torch.dtype) -> DiagonalConfig:
    wide = key_dim > 128
    if dtype == torch.bfloat16:
        return DiagonalConfig(
            chunk=64,
            max_ln_decay=PRIMARY,
            operand=torch.bfloat16,
            precision="tf32",
            sums_by_products=True,
            states=Launch(columns=64 if wide else 128, warps=8 if widest > 64 else 4, stages=3),
            outputs=Launch(columns=64, warps=8, stages=2) if wide else Launch(columns=64, warps=4, stages=3),
            gradients=Launch(columns=64, warps=4, stages=1),
        )
    half = dtype == torch.float16
    shared = Launch(columns=64 if widest <= 128 else 32, warps=8, stages=1)
    return DiagonalConfig(
        chunk=32,
        max_ln_decay=PRIMARY if half else 32.0,
        operand=torch.float32,
        precision="tf32x3" if half else "ieee",
        sums_by_products=False,
        states=shared,
        outputs=shared,
        gradients=shared,
    )


def operand(config: DiagonalConfig) -> tl.dtype:
    """`config.operand` as kernels name it."""
    return tl.bfloat16 if config.operand == torch.bfloat16 else tl.float32


@dataclass(frozen=True)
class Rescaled:
    """q̃ (with the scale) and k̃ [B, T, H, K] in the operands' dtype; of every chunk b_C and the largest -b_C, fp32."""

    q: Tensor
    k: Tensor
    ln_ends: Tensor  # [slots, H, K]
    ln_chunk_decay: Tensor  # [slots, H]


@triton.jit
def load_half(ln_chunk_decay, slot, MAX_LN_DECAY: tl.constexpr):
    return tl.where(tl.load(ln_chunk_decay + slot + tl.zeros([1, 1], tl.int64)) > MAX_LN_DECAY, 0.0, 0.5)


@triton.jit
def load_end(ln_ends, slot, rows, K: tl.constexpr):
    """b_C as a column, [BK, 1]."""
    return tl.load(ln_ends + slot * K + rows[:, None], mask=(rows < K)[:, None], other=0.0)


@triton.jit
def chunk_of_program(CHUNKS, H):
    """Which chunk of its tile, head and tile a program is for, with CHUNKS programs per tile and head."""
    program = tl.program_id(0)
    return program % CHUNKS, program // CHUNKS % H, (program // CHUNKS // H).to(tl.int64)


@triton.jit
def _rescale(
    q,  # [tokens, Hq, K]
    k,
    decay,  # [tokens, H, K]
    q_out,  # [tokens, H, K]
    k_out,
    ln_ends,  # [slots, H, K] fp32
    ln_chunk_decay,  # [slots, H] fp32
    start, length, scale, CHUNKS, H, G,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, MAX_LN_DECAY: tl.constexpr,
):  # fmt: skip
    i, h, tile = chunk_of_program(CHUNKS, H)
    begin, count = tl.load(start + tile), tl.load(length + tile)
    if i * C < count:
        cols = tl.arange(0, BK)
        here = i * C + tl.arange(0, C) < count
        token = begin + i * C
        slot = (begin // C + tile + i) * H + h
        g = load_decays(decay, token, here, h, H, cols, K)
        qc = load_rows(q, token, here, h // G, H // G, cols, K)
        b = tl.cumsum(g, axis=0)
        end = tl.sum(g, axis=0)
        largest = tl.max(-end, axis=0)
        half = tl.where(largest + tl.zeros([1, 1], tl.float32) > MAX_LN_DECAY, 0.0, 0.5)
        tl.store(ln_ends + slot * K + cols, end, mask=cols < K)
        tl.store(ln_chunk_decay + slot, largest)
        store_rows(q_out, qc * (scale * tl.exp(b - half * end[None, :])), token, here, h, H, cols, K)
        if largest > MAX_LN_DECAY:  # a difference of large sums has too few digits
            g = load_decays(decay, token, here, h, H, cols, K)  # again: all others would wait for its registers
            kc = load_rows(k, token, here, h // G, H // G, cols, K)
            store_rows(k_out, kc * tl.exp(tl.cumsum(g, axis=0, reverse=True) - g), token, here, h, H, cols, K)
        else:
            kc = load_rows(k, token, here, h // G, H // G, cols, K)
            store_rows(k_out, kc * tl.exp((end[None, :] - b) - half * end[None, :]), token, here, h, H, cols, K)


def rescale(tiles: Tiles, q: Tensor, k: Tensor, decay: Tensor, scale: float, config: DiagonalConfig) -> Rescaled:
    (heads, key_dim), q_heads = decay.shape[2:], q.shape[2]
    slots = q.shape[0] * q.shape[1] // config.chunk + tiles.count + 1
    q_out, k_out = (torch.empty_like(decay, dtype=config.operand) for _ in range(2))
    ln_ends = decay.new_empty(slots, heads, key_dim, dtype=torch.float32)
    ln_chunk_decay = decay.new_empty(slots, heads, dtype=torch.float32)
    chunks = cdiv(tiles.size, config.chunk)
    launch(
        _rescale, (chunks * heads * tiles.count,),
        q, k, decay, q_out, k_out, ln_ends, ln_chunk_decay, tiles.start, tiles.length,
        scale, chunks, heads, heads // q_heads,
        K=key_dim, BK=block_of(key_dim), C=config.chunk, MAX_LN_DECAY=config.max_ln_decay,
        num_warps=4 if key_dim <= 128 else 8,
    )  # fmt: skip
    return Rescaled(q_out, k_out, ln_ends, ln_chunk_decay)
