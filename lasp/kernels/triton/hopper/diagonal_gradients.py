"""The gradients of one chunk with a vector gate, from the states before and after it, for Hopper and heads of 128.

What delta.gradients and diagonal.gradients say: a program finds the gradients for half of the keys' channels, so that
two have room on a multiprocessor, and one loads while the other multiplies. With e = e^{b_i - b_C / 2}, unless the
chunk is secondary (diagonal.rescale),

    dq = e (e^{b_C/2} do Xᵀ + P k̃)        w = e (e^{b_C/2} dr Xᵀ + N k̃)        P_ij = do_i·u_j, j <= i
    dk = (e^{b_C/2} u Gᵀ + Pᵀ q̃ - Nᵀ k̂) / e - beta w                          N_ij = dr_i·u_j, j < i
    q̃ = e q        k̃ = k / e        k̂ = beta e k

Without the delta rule u is v, there is no N, and e^{b_C/2} is in X and G.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lasp.kernels.inputs import DeltaInputs, LinearInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.delta.backend import Grads, Recomputed, Terms
from lasp.kernels.triton.device import cdiv
from lasp.kernels.triton.diagonal.rescale import Rescaled
from lasp.kernels.triton.hopper.diagonal_shared import chunk_of, cut_in_two, exp, hidden_zero, load_gates, ones, sums
from lasp.kernels.triton.hopper.layouts import GATES_SHARED, HALF, MMA, ROWS, SHARED, SIZE, WIDE_ROWS, C
from lasp.kernels.triton.hopper.products import add_product, product
from lasp.kernels.triton.hopper.ring import make_barrier
from lasp.kernels.triton.hopper.shared import barrier, blocks_of, clear_tail, publish, rows_of, store_tokens
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import SHUT, bounded

ROW, COL = gl.constexpr(gl.SliceLayout(1, MMA.value)), gl.constexpr(gl.SliceLayout(0, MMA.value))
KEPT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
BY_COLUMN = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [1, 4], [1, 0]))  # [SIZE, HALF], columns within warps


class _Inputs(NamedTuple):
    q: gl.tensor
    k: gl.tensor
    u: gl.tensor
    do: gl.tensor
    states: gl.tensor
    grads: gl.tensor
    decay: gl.tensor
    ln_ends: gl.tensor
    ln_chunk_decay: gl.tensor


class _Outputs(NamedTuple):
    dq: gl.tensor
    dq_rows: gl.tensor
    dk: gl.tensor
    dk_rows: gl.tensor
    d_decay: gl.tensor


class _Delta(NamedTuple):
    """What the delta rule has besides."""

    gates: gl.tensor
    v: gl.tensor
    dr: gl.tensor
    dr_rows: gl.tensor
    dv: gl.tensor
    d_beta: gl.tensor


class _Place(NamedTuple):
    """Chunk number `slot`, `length` tokens from `begin` on, and a half of the channels of head h, of H; it is the
    `row`-th of `rows` heads in this launch, and one of STEP heads whose dq and dk are summed."""

    slot: gl.tensor
    begin: gl.tensor
    length: gl.tensor
    part: gl.tensor
    row: gl.tensor
    rows: gl.tensor
    h: gl.tensor
    H: gl.tensor
    G: gl.tensor  # heads that share q and k
    STEP: gl.tensor


@gluon.jit
def _diagonal_gradients(
    q, k,  # rows of 64 of [tokens, H // G, K]
    u,  # rows of [tokens, HEADS, V], or of v
    do,  # rows of [tokens, H, V]
    states,  # X one by one, 64 channels of K: of [chunks, HEADS, V, K]; or X̃, of [slots, H, K, V]
    grads,  # G, or G̃, likewise
    decay,  # [tokens, H, K]
    ln_ends,  # [chunks, H, K] fp32: b_C
    ln_chunk_decay,  # [chunks, H] fp32
    dq,  # [tokens, H // STEP, K]
    dq_rows,  # rows of 64 of it
    dk,
    dk_rows,
    d_decay,  # [tokens, H, K]
    # If DELTA:
    gates,  # [chunks, H, 4, C]: beta first
    v,  # [tokens, H, V]
    dr,  # [tokens, HEADS, V]
    dr_rows,  # rows of it
    dv,  # [tokens, H, V]
    d_beta,  # [tokens, H] fp32, added to
    start, length, scale, CHUNKS, HEADS, H, G, FIRST_HEAD, STEP,
    DELTA: gl.constexpr, ADD: gl.constexpr, MAX_LN_DECAY: gl.constexpr,
):  # fmt: skip
    griddepcontrol_wait()
    part, h = gl.program_id(0) % 2, FIRST_HEAD + gl.program_id(1) * STEP
    slot, begin, count = chunk_of(gl.program_id(0) // 2, start, length, CHUNKS, not DELTA)
    if count > 0:
        _chunk(
            _Inputs(q, k, u, do, states, grads, decay, ln_ends, ln_chunk_decay),
            _Outputs(dq, dq_rows, dk, dk_rows, d_decay),
            _Delta(gates, v, dr, dr_rows, dv, d_beta),
            _Place(slot, begin, count, part, gl.program_id(1), HEADS, h, H, G, STEP),
            scale, DELTA, ADD, MAX_LN_DECAY,
        )  # fmt: skip


@gluon.jit
def _chunk(
    inputs, outputs, delta, place, scale, DELTA: gl.constexpr, ADD: gl.constexpr, MAX_LN_DECAY: gl.constexpr
):  # fmt: skip
    slot, begin, count, part = place.slot, place.begin, place.length, place.part
    local, HEADS, h, H, G, STEP = place.row, place.rows, place.h, place.H, place.G, place.STEP
    decay, gates, states, grads = inputs.decay, delta.gates, inputs.states, inputs.grads
    dtype: gl.constexpr = inputs.k.dtype
    token, channel = begin.to(gl.int32), part * HALF
    mine, slot_h = (begin * H + h) * SIZE + channel, slot.to(gl.int64) * H + h
    row, col = gl.arange(0, C, layout=ROW), gl.arange(0, C, layout=COL)
    # What comes first makes room for operands later.
    uc = gl.allocate_shared_memory(dtype, [C, SIZE], SHARED)
    doc = gl.allocate_shared_memory(dtype, [C, SIZE], SHARED)
    drc = gl.allocate_shared_memory(dtype, [C, SIZE], SHARED) if DELTA else doc
    qc = gl.allocate_shared_memory(dtype, [C, HALF], SHARED)
    kc = gl.allocate_shared_memory(dtype, [C, HALF], SHARED)
    pieces = gl.allocate_shared_memory(dtype, [2, C, HALF], SHARED)
    line = gl.allocate_shared_memory(gl.float32, [C], GATES_SHARED)
    state_rows: gl.constexpr = SIZE if DELTA else HALF
    xs = gl.allocate_shared_memory(dtype, [state_rows, C * SIZE // state_rows], SHARED)
    gs = gl.allocate_shared_memory(dtype, [state_rows, C * SIZE // state_rows], SHARED)
    u_full, do_full, dr_full = make_barrier(), make_barrier(), make_barrier()
    x_full, g_full, q_full, k_full = make_barrier(), make_barrier(), make_barrier(), make_barrier()
    publish()
    mbarrier.expect(u_full, 2 * C * SIZE)
    mbarrier.expect(do_full, 2 * C * SIZE)
    mbarrier.expect(x_full, 2 * SIZE * HALF)
    mbarrier.expect(g_full, 2 * SIZE * HALF)
    mbarrier.expect(q_full, 2 * C * HALF)
    mbarrier.expect(k_full, 2 * C * HALF)
    if DELTA:
        mbarrier.expect(dr_full, 2 * C * SIZE)
    tma.async_copy_global_to_shared(inputs.u, [token, local * SIZE], u_full, uc)
    tma.async_copy_global_to_shared(inputs.do, [token, h * SIZE], do_full, doc)
    state = (slot * HEADS + local) * SIZE
    if DELTA:
        tma.async_copy_global_to_shared(delta.dr_rows, [token, local * SIZE], dr_full, drc)
        tma.async_copy_global_to_shared(states, [state, channel], x_full, xs)
        tma.async_copy_global_to_shared(grads, [state, channel], g_full, gs)
        x, g_state = xs, gs
    else:
        tma.async_copy_global_to_shared(states, [state + channel, 0], x_full, xs)
        tma.async_copy_global_to_shared(grads, [state + channel, 0], g_full, gs)
        x, g_state = xs.permute((1, 0)), gs.permute((1, 0))
    tma.async_copy_global_to_shared(inputs.q, [token, h // G * SIZE + channel], q_full, qc)
    tma.async_copy_global_to_shared(inputs.k, [token, h // G * SIZE + channel], k_full, kc)
    barrier()  # or what follows would come between them

    g = load_gates(decay + mine, count, H, HALF)
    end = gl.load(inputs.ln_ends + slot_h * SIZE + channel + col)
    secondary = gl.load(inputs.ln_chunk_decay + slot_h) > MAX_LN_DECAY
    if DELTA:
        first = gl.arange(0, C, layout=gl.SliceLayout(1, ROWS))
        cols = gl.arange(0, HALF, layout=gl.SliceLayout(0, ROWS))
        here = (first < count)[:, None]
        at_v = (first * (H * SIZE))[:, None] + cols[None, :]
        at_dr = (first * (HEADS * SIZE))[:, None] + cols[None, :]
        vc = gl.load((delta.v + mine) + at_v, mask=here, other=0.0)
        drv = gl.load((delta.dr + (begin * HEADS + local) * SIZE + channel) + at_dr, mask=here, other=0.0)
        betas = gl.load(gates + slot_h * 4 * C + first)
    cut_in_two(bounded(g), pieces)
    half, zero = gl.where(secondary, 0.0, 0.5), hidden_zero(scale)
    mbarrier.wait(u_full, 0)
    mbarrier.wait(do_full, 0)
    if DELTA:
        mbarrier.wait(dr_full, 0)
    if count < C:
        clear_tail(uc, 0, count)
        clear_tail(doc, 0, count)
        if DELTA:
            clear_tail(drc, 0, count)
    publish()

    nothing = gl.zeros([C, HALF], gl.float32, MMA)
    p = product(doc, uc.permute((1, 0)), MMA)  # do uᵀ
    n = nothing
    if DELTA:
        n = product(drc, uc.permute((1, 0)), MMA)  # dr uᵀ
    exponent = sums(ones(False, False, half, dtype, HALF), pieces, HALF)
    if DELTA:  # not before a fence, which would wait
        drv = drv.to(gl.float32)
        gl.store((delta.dv + mine) + at_v, (betas[:, None] * drv).to(dtype), mask=here)
        line.store(gl.sum(drv * vc.to(gl.float32), axis=1))
    p, n, exponent = warpgroup_mma_wait(0, deps=(p, n, exponent))
    p = gl.where((row[:, None] >= col[None, :]) & (half > 0.0), p * scale, 0.0).to(dtype)
    barrier()
    pieces.index(0).store(p)
    if DELTA:
        n = gl.where((row[:, None] > col[None, :]) & (half > 0.0), n, 0.0).to(dtype)
        pieces.index(1).store(n)
        for_beta = line.load(ROW)
        beta = gl.load(gates + slot_h * 4 * C + row).to(gl.float32)
    mbarrier.wait(x_full, 0)
    mbarrier.wait(g_full, 0)
    dq = product(doc, x, MMA)  # do Xᵀ
    dk = product(uc, g_state, MMA)  # u Gᵀ
    w = nothing
    if DELTA:
        w = product(drc, x, MMA)  # dr Xᵀ
        overlap = gl.sum(xs.load(BY_COLUMN).to(gl.float32) * gs.load(BY_COLUMN), axis=0)
    else:
        overlap = gl.sum(xs.load(WIDE_ROWS).to(gl.float32) * gs.load(WIDE_ROWS), axis=1)
    dq, dk, w = warpgroup_mma_wait(0, deps=(dq, dk, w))
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full, 0)
    if count < C:
        clear_tail(qc, 0, count)
        clear_tail(kc, 0, count)
    barrier()

    operands, others = uc._reinterpret(dtype, [2, C, HALF], SHARED), doc._reinterpret(dtype, [2, C, HALF], SHARED)
    pc, nc = pieces.index(0), pieces.index(1)
    read, written, before, erased = operands.index(0), operands.index(1), others.index(0), others.index(1)
    line.store(overlap)
    to_end = -exponent
    if secondary:  # a difference of large sums has too few digits
        cut_in_two(bounded(load_gates(decay + mine, count, H, HALF)), operands)
        publish()
        to_end = warpgroup_mma_wait(0, deps=(sums(ones(True, True, zero, dtype, HALF), operands, HALF),))
        barrier()
    read.store((qc.load(MMA).to(gl.float32) * exp(exponent)).to(dtype))
    # What does not fit into registers.
    kept_writing, kept_past = xs._reinterpret(gl.float32, [C, HALF], KEPT), gs._reinterpret(gl.float32, [C, HALF], KEPT)
    writing = exp(to_end)
    kept_writing.store(writing if DELTA else gl.where(secondary, 1.0, writing))  # see diagonal.secondary
    k_written = (kc.load(MMA).to(gl.float32) * writing).to(dtype)
    written.store(k_written)
    between = exp(half * end)[None, :] if DELTA else gl.full([1, HALF], 1.0, gl.float32, MMA)
    dq *= between * scale
    dk *= between
    past = k_written.to(gl.float32) * dk
    kept_past.store(past)
    before.store(past.to(dtype))
    if DELTA:
        w *= between
        erased.store((-beta[:, None] * (kc.load(MMA).to(gl.float32) * exp(exponent))).to(dtype))
    publish()
    dq = add_product(dq, pc, written)  # … + P k̃
    dk = add_product(dk, pc.permute((1, 0)), read)  # … + Pᵀ q̃
    if DELTA:
        w = add_product(w, nc, written)  # … + N k̃
        dk = add_product(dk, nc.permute((1, 0)), erased)  # … - Nᵀ k̂
    dq, dk, w = warpgroup_mma_wait(0, deps=(dq, dk, w))
    change = kept_past.load(MMA) - written.load(MMA).to(gl.float32) * dk
    dk *= kept_writing.load(MMA)
    change += read.load(MMA).to(gl.float32) * dq
    qc.store((dq * exp(exponent)).to(dtype))
    if DELTA:
        change += erased.load(MMA).to(gl.float32) * w
        w *= exp(exponent)
        for_beta -= gl.sum(kc.load(MMA).to(gl.float32) * w, axis=1)
        dk -= beta[:, None] * w
    kc.store(dk.to(dtype))
    barrier()
    cut_in_two(change, pieces)
    publish()
    dg = sums(ones(True, False, zero, dtype, HALF), pieces, HALF)
    dg = add_product(dg, ones(False, True, zero, dtype, HALF), before)
    dg = warpgroup_mma_wait(0, deps=(dg,))  # before a branch, which might move its registers
    summed = (begin * (H // STEP) + h // STEP) * SIZE + channel
    if ADD or count < C:
        store_tokens(outputs.dq + summed, qc, 0, count, H // STEP * SIZE, ADD)
        store_tokens(outputs.dk + summed, kc, 0, count, H // STEP * SIZE, ADD)
    else:
        tma.async_copy_shared_to_global(outputs.dq_rows, [token, h // STEP * SIZE + channel], qc)
        tma.async_copy_shared_to_global(outputs.dk_rows, [token, h // STEP * SIZE + channel], kc)
    if DELTA:
        gl.atomic_add(delta.d_beta + (begin + row) * H + h, for_beta, mask=row < count, sem="relaxed")
    overlap = line.load(COL) * exp(end if DELTA else (1.0 - 2.0 * half) * end)
    dg += overlap[None, :]
    at, there = (row * (H * SIZE))[:, None] + col[None, :], (row < count)[:, None]
    if secondary:
        again = gl.load((decay + mine) + at, mask=there, other=0.0).to(gl.float32)
        dg = gl.where(again <= SHUT, 0.0, dg)
    gl.store((outputs.d_decay + mine) + at, dg.to(outputs.d_decay.dtype.element_ty), mask=there)
    tma.store_wait(0)


def _states_of(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """How pieces of states, x [..., K or V, V or K], come."""
    return blocks_of(x, x.shape[-1], [rows, columns])


def delta_gradients(
    chunks: Tiles, x: DeltaInputs, do: Tensor, terms: Terms, recomputed: Recomputed, dr: Tensor, d_states: Tensor,
    grads: Grads, max_ln_decay: float, heads: range,
) -> None:  # fmt: skip
    """Fills `grads` for the heads of `heads`, of beta's, in fp32, which it adds to: see delta.gradients."""
    all_heads, q_heads, half = x.v.shape[2], x.q.shape[2], HALF.value
    add, factors = grads.are_added(heads), terms.factors
    dq_rows, dk_rows = (None, None) if add else (rows_of(grads.dq, half), rows_of(grads.dk, half))
    launch(
        _diagonal_gradients, (2 * chunks.count, len(heads)),
        rows_of(x.q, half), rows_of(x.k, half), rows_of(recomputed.u, SIZE.value), rows_of(do, SIZE.value),
        _states_of(recomputed.states, SIZE.value, half), _states_of(d_states, SIZE.value, half),
        x.decay, factors.ln_ends, factors.ln_chunk_decay, grads.dq, dq_rows, grads.dk, dk_rows, grads.d_decay,
        terms.gates, x.v, dr, rows_of(dr, SIZE.value), grads.dv, grads.d_beta, chunks.start, chunks.length,
        x.scale, 1, len(heads), all_heads, all_heads // q_heads, heads.start, heads.step,
        DELTA=True, ADD=add, MAX_LN_DECAY=2 * max_ln_decay, num_warps=4, pdl=True,
    )  # fmt: skip


def linear_gradients(
    tiles: Tiles, x: LinearInputs, do: Tensor, rescaled: Rescaled, states: Tensor, grads: Tensor, max_ln_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq and dk [B, T, H, K], in the places of q̃ and k̃, and dg: see diagonal.gradients."""
    assert x.decay is not None
    heads, q_heads, half = x.v.shape[2], x.q.shape[2], HALF.value
    chunks, dq, dk, dg = cdiv(tiles.size, C.value), rescaled.q, rescaled.k, torch.empty_like(x.decay)
    launch(
        _diagonal_gradients, (2 * chunks * tiles.count, heads),
        rows_of(x.q, half), rows_of(x.k, half), rows_of(x.v, SIZE.value), rows_of(do, SIZE.value),
        _states_of(states, half, SIZE.value), _states_of(grads, half, SIZE.value),
        x.decay, rescaled.ln_ends, rescaled.ln_chunk_decay, dq, rows_of(dq, half), dk, rows_of(dk, half), dg,
        None, None, None, None, None, None, tiles.start, tiles.length,
        x.scale, chunks, heads, heads, heads // q_heads, 0, 1,
        DELTA=False, ADD=False, MAX_LN_DECAY=max_ln_decay, num_warps=4, pdl=True,
    )  # fmt: skip
    return dq, dk, dg
