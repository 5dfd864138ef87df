"""q and k of every chunk times their decays, for Hopper and heads of 128: see delta.rescale and diagonal.rescale.

A program does one chunk. What it loads comes at once; what it has found takes its place and goes while all go on.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.delta.rescale import Factors
from lasp.kernels.triton.device import cdiv
from lasp.kernels.triton.diagonal.rescale import Rescaled
from lasp.kernels.triton.hopper.diagonal_shared import chunk_of, cut_in_two, exp, hidden_zero, load_gates, ones, sums
from lasp.kernels.triton.hopper.layouts import SHARED, SIZE, C, mma_layout
from lasp.kernels.triton.hopper.products import product
from lasp.kernels.triton.hopper.ring import make_barrier
from lasp.kernels.triton.hopper.shared import barrier, publish, rows_of, send_rows
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import bounded


@gluon.jit
def _give(rows, exponent, rest, given, operand, BOTH: gl.constexpr):
    """rows e^exponent rest, and if BOTH as an operand without the rest."""
    WIDE_MMA: gl.constexpr = mma_layout(SIZE, gl.num_warps())
    y = rows.load(WIDE_MMA).to(gl.float32) * exp(exponent)
    if BOTH:
        operand.store(y.to(rows.dtype))
    given.store((y * rest).to(rows.dtype))


@gluon.jit
def _factors(
    q, k,  # rows of [tokens, H // G, K]
    decay,  # [tokens, H, K]
    read_q,  # [tokens, H, K]: q⁺, or q̃
    read_q_rows,  # rows of it
    read_k, read_k_rows,  # k⁺, if DELTA
    written, written_rows,  # k⁻, or k̃
    ln_ends,  # [chunks, H, K] fp32
    ln_chunk_decay,  # [chunks, H] fp32
    scores, scores_rows,  # [tokens, H, C]: P, if SCORES
    products,  # [tokens, H, C] fp32: k_i·(e^{b_i - b_j} k_j) for j < i, all that is read, if SCORES
    start, length, scale, CHUNKS, H, G,
    DELTA: gl.constexpr, SCORES: gl.constexpr, MAX_LN_DECAY: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = mma_layout(C, gl.num_warps())
    WIDE_MMA: gl.constexpr = mma_layout(SIZE, gl.num_warps())
    COL: gl.constexpr = gl.SliceLayout(0, WIDE_MMA)
    griddepcontrol_wait()
    h = gl.program_id(1)
    slot, begin, count = chunk_of(gl.program_id(0), start, length, CHUNKS, not DELTA)
    dtype: gl.constexpr = k.dtype
    qc = gl.allocate_shared_memory(dtype, [C, SIZE], SHARED)
    kc = gl.allocate_shared_memory(dtype, [C, SIZE], SHARED)
    pieces = gl.allocate_shared_memory(dtype, [2, C, SIZE], SHARED)
    q_full, k_full = make_barrier(), make_barrier()
    if count > 0:
        publish()
        token, column, slot_h = begin.to(gl.int32), h * SIZE, slot.to(gl.int64) * H + h
        mbarrier.expect(q_full, 2 * C * SIZE)
        mbarrier.expect(k_full, 2 * C * SIZE)
        tma.async_copy_global_to_shared(k, [token, h // G * SIZE], k_full, kc)
        tma.async_copy_global_to_shared(q, [token, h // G * SIZE], q_full, qc)
        g = bounded(load_gates(decay + begin * (H * SIZE) + h * SIZE, count, H, SIZE))
        cut_in_two(g, pieces)
        end = gl.sum(g, axis=0)
        largest = gl.max(-end, axis=0)
        end = gl.convert_layout(end, COL)
        secondary = largest > MAX_LN_DECAY
        half = gl.where(secondary, 0.0, 0.5)
        publish()
        exponent = sums(ones(False, False, half, dtype, SIZE), pieces, SIZE)
        gl.store(ln_ends + slot_h * SIZE + gl.arange(0, SIZE, layout=COL), end)  # not before a fence, which would wait
        gl.store(ln_chunk_decay + slot_h, largest)
        exponent = warpgroup_mma_wait(0, deps=(exponent,))
        rest = exp(half * end)[None, :] if DELTA else gl.full([1, SIZE], 1.0, gl.float32, WIDE_MMA)
        operands = gl.allocate_shared_memory(dtype, [3, C, SIZE], SHARED) if SCORES else pieces
        mbarrier.wait(k_full, 0)
        if secondary:  # a difference of large sums has too few digits
            reverse = ones(True, True, hidden_zero(scale), dtype, SIZE)
            to_end = warpgroup_mma_wait(0, deps=(sums(reverse, pieces, SIZE),))
            barrier()  # what is given may take the place of what all have waited for
            _give(kc, to_end, rest, pieces.index(0), operands.index(2 if SCORES else 0), SCORES)
        else:
            barrier()
            _give(kc, -exponent, rest, pieces.index(0), operands.index(2 if SCORES else 0), SCORES)
        if DELTA:
            _give(kc, exponent, rest, kc, operands.index(1), SCORES)
        mbarrier.wait(q_full, 0)
        _give(qc, exponent, rest if DELTA else scale, qc, operands.index(0), SCORES)
        publish()
        at = begin * (H * SIZE) + column
        if SCORES:
            keys = operands.index(2).permute((1, 0))
            p = product(operands.index(0), keys, MMA)  # q_i·(e^{b_i - b_j} k_j)
            m = product(operands.index(1), keys, MMA)  # k_i·(e^{b_i - b_j} k_j)
            p, m = warpgroup_mma_wait(0, deps=(p, m))  # before a branch, which might move their registers
        send_rows(written + at, written_rows, pieces.index(0), begin, 0, count, column, H * SIZE)
        send_rows(read_q + at, read_q_rows, qc, begin, 0, count, column, H * SIZE)
        if DELTA:
            send_rows(read_k + at, read_k_rows, kc, begin, 0, count, column, H * SIZE)
        if SCORES:
            row, col = gl.arange(0, C, layout=gl.SliceLayout(1, MMA)), gl.arange(0, C, layout=gl.SliceLayout(0, MMA))
            out = pieces.index(1)._reinterpret(dtype, [2, C, C], SHARED).index(0)
            out.store(gl.where(row[:, None] >= col[None, :], p * scale, 0.0).to(dtype))
            publish()
            send_rows(scores + begin * (H * C) + h * C, scores_rows, out, begin, 0, count, h * C, H * C)
            at_m = (row * (H * C))[:, None] + col[None, :]
            read = (row < count)[:, None] & (row[:, None] // 8 >= col[None, :] // 8)  # whole sectors of memory
            gl.store((products + begin * (H * C) + h * C) + at_m, m, mask=read)
        tma.store_wait(0)
    elif DELTA:  # delta.secondary looks at every chunk
        gl.store(ln_chunk_decay + slot.to(gl.int64) * H + h, 0.0)


def delta_factors(
    chunks: Tiles, q: Tensor, k: Tensor, decay: Tensor, scale: float | None, max_ln_decay: float
) -> tuple[Factors, Tensor | None, Tensor | None]:
    """See delta.rescale.diagonal_factors."""
    known = _known(chunks.count, decay)
    read_q, read_k, written = (torch.empty_like(decay, dtype=k.dtype) for _ in range(3))
    scores = products = None
    if scale is not None:
        scores = decay.new_empty(*decay.shape[:3], C.value, dtype=k.dtype)
        products = torch.empty_like(scores, dtype=torch.float32)
    given = read_q, read_k, written
    _launch(chunks, 1, q, k, decay, scale or 1.0, given, known, scores, products, 2 * max_ln_decay)
    return Factors(*given, *known), scores, products


def rescale(tiles: Tiles, q: Tensor, k: Tensor, decay: Tensor, scale: float, max_ln_decay: float) -> Rescaled:
    """See diagonal.rescale.rescale."""
    known = _known(q.shape[0] * q.shape[1] // C.value + tiles.count + 1, decay)
    q_out, k_out = (torch.empty_like(decay, dtype=k.dtype) for _ in range(2))
    each = cdiv(tiles.size, C.value)
    _launch(tiles, each, q, k, decay, scale, (q_out, None, k_out), known, None, None, max_ln_decay)
    return Rescaled(q_out, k_out, *known)


def _known(chunks: int, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Places for every chunk's b_C and largest -b_C."""
    shape = chunks, decay.shape[2]
    return decay.new_empty(*shape, SIZE.value, dtype=torch.float32), decay.new_empty(shape, dtype=torch.float32)


def _launch(
    tiles: Tiles, chunks: int, q: Tensor, k: Tensor, decay: Tensor, scale: float, given: tuple[Tensor | None, ...],
    known: tuple[Tensor, Tensor], scores: Tensor | None, products: Tensor | None, secondary: float,
) -> None:  # fmt: skip
    heads = decay.shape[2]
    how = {"num_warps": 4} if scores is None else {"num_warps": 8, "maxnreg": 128}
    if given[1] is None:
        how["maxnreg"] = 168  # three programs a multiprocessor, else two
    places = (y for x in given for y in (x, None if x is None else rows_of(x, SIZE.value)))
    launch(
        _factors, (chunks * tiles.count, heads),
        rows_of(q, SIZE.value), rows_of(k, SIZE.value), decay, *places, *known,
        scores, None if scores is None else rows_of(scores, C.value), products, tiles.start, tiles.length,
        scale, chunks, heads, heads // q.shape[2],
        DELTA=given[1] is not None, SCORES=scores is not None, MAX_LN_DECAY=secondary, pdl=True, **how,
    )  # fmt: skip
