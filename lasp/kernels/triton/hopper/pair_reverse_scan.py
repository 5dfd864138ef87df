"""The reverse scan of reverse_scan for two heads of 64 columns of V: each of two groups of warps has one, dv and dk.

dk of two heads that share q and k is their sum: one group adds what the other one hands it in shared memory.
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.hopper.chunk_step import write_copy
from lasp.kernels.triton.hopper.layouts import GATES_SHARED, HALF, MMA, C, shared_layout
from lasp.kernels.triton.hopper.products import add_product, product
from lasp.kernels.triton.hopper.reverse_step import head_room, pairs_of, sum_of_pairs, written
from lasp.kernels.triton.hopper.ring import Ring, make_ring
from lasp.kernels.triton.hopper.scalar_shared import Behind, load_gates, load_initial_state
from lasp.kernels.triton.hopper.shared import REGISTERS, barrier, publish, rows_of, send_rows, whole_decay
from lasp.kernels.triton.hopper.tiles import Initial, Rows, Tile, clear_tails, make_rows
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import NONE
from lasp.kernels.triton.shared.state_passing import InitialStates


class _Staged(NamedTuple):
    """What the groups of warps keep in shared memory, each its own; but one dk of heads that share q and k."""

    states: gl.shared_memory_descriptor  # [2, K, 64]
    gates: gl.shared_memory_descriptor  # [2, C]
    dv: gl.shared_memory_descriptor  # [2, C, 64]
    dk: gl.shared_memory_descriptor  # [1 or 2, C, K]


class _Rings(NamedTuple):
    rows: Ring
    dk: Ring  # the sum of two heads, which one begins


class _Outputs(NamedTuple):
    dk: gl.tensor
    dk_rows: gl.tensor
    dv: gl.tensor
    dv_rows: gl.tensor
    products: gl.tensor
    behind: gl.tensor
    behind_ups: gl.tensor


@gluon.jit
def _fetch(sources, rows, ring, tile, G):
    K: gl.constexpr = rows.q.shape[2]
    OWN: gl.constexpr = rows.q.shape[0] // ring.stages  # heads whose q and k are not the same
    h = tile.h
    chunks = gl.cdiv(tile.length, C)
    for step in range(chunks):
        token = tile.begin.to(gl.int32) + (chunks - 1 - step) * C
        filled, stage = ring.acquire(step), step % ring.stages
        mbarrier.expect(filled, 4 * C * (OWN * K + 2 * HALF))
        for n in gl.static_range(OWN):
            own, column = OWN * stage + n, (h + n) // G * K
            tma.async_copy_global_to_shared(sources.k, [token, column], filled, rows.k.index(own))
            tma.async_copy_global_to_shared(sources.q, [token, column], filled, rows.q.index(own))
        for n in gl.static_range(2):
            own, column = 2 * stage + n, (h + n) * HALF
            tma.async_copy_global_to_shared(sources.v, [token, column], filled, rows.v.index(own))
            tma.async_copy_global_to_shared(sources.do, [token, column], filled, rows.do.index(own))


@gluon.jit
def _compute(rows, staged, rings, gates, initial, outputs, tile, scale, PART: gl.constexpr, DECAY: gl.constexpr):
    ring, joint = rings.rows, rings.dk
    begin, count, chunk, h, H = tile.begin, tile.length, tile.chunk, tile.h, tile.H
    dk, dv, products = outputs.dk, outputs.dv, outputs.products
    SUMS: gl.constexpr = products is not None
    K: gl.constexpr = rows.q.shape[2]
    OWN: gl.constexpr = rows.q.shape[0] // ring.stages
    SHARED_KEYS: gl.constexpr = OWN == 1
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    dtype: gl.constexpr = rows.q.dtype
    h += PART
    copy, gs = staged.states.index(PART), staged.gates.index(PART)
    dv_out, dk_out = staged.dv.index(PART), staged.dk.index(PART if OWN == 2 else 0)
    summed: gl.constexpr = 2 if SHARED_KEYS else 1  # heads, in dk
    dk_col, dk_stride = h // summed * K, H // summed * K
    dk += begin * dk_stride + dk_col
    dv += (begin * H + h) * HALF
    row, col = gl.arange(0, C, layout=ROW), gl.arange(0, C, layout=gl.SliceLayout(0, MMA))
    seen = row[:, None] <= col[None, :]
    at = gl.arange(0, K, layout=ROW)[:, None] * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, MMA))[None, :]
    chunks = gl.cdiv(count, C)
    griddepcontrol_wait()
    x = load_initial_state(initial, at, gl.program_id(0).to(gl.int64), h, H, K * HALF) / scale
    up = write_copy(x, copy)
    before = gl.zeros([1], gl.float32, ROW)
    if DECAY != NONE:
        g, _ = load_gates(gates, begin, gl.maximum(chunks - 1, 0), count, h, H, DECAY)
        gs.store(g)
    publish()
    for step in range(chunks):
        i = chunks - 1 - step
        stage = step % ring.stages
        own = OWN * stage + (PART if OWN == 2 else 0)
        qc, kc, vc, doc = (
            rows.q.index(own),
            rows.k.index(own),
            rows.v.index(2 * stage + PART),
            rows.do.index(2 * stage + PART),
        )
        if DECAY != NONE:
            g, _ = load_gates(gates, begin, gl.maximum(i - 1, 0), count, h, H, DECAY)
        if SUMS:
            place = (chunk + i) * H + h
            tma.async_copy_shared_to_global(outputs.behind, [(place * K).to(gl.int32), 0], copy)
            if dtype == gl.float16:
                gl.store(outputs.behind_ups + place, up * gl.max(gl.exp2(before), axis=0))
        ring.wait(step)
        clear_tails(Rows(qc, kc, vc, doc), i, count)
        if DECAY != NONE:
            end = whole_decay(gs, ROW)
            if dtype == gl.float16:
                end = end - head_room(gs, ROW, dtype) + before
            x *= gl.exp2(end)[:, None]
        scores = product(kc, qc.permute((1, 0)), MMA)  # k_i·q_j
        others = product(vc, doc.permute((1, 0)), MMA)  # v_i·do_j
        dvc = product(kc, copy, MMA)  # k_iᵀ X
        weights = gl.where(seen, 1.0, 0.0)
        read = gl.full([C], 1.0, gl.float32, ROW)
        if DECAY != NONE:
            g_row = gs.load(ROW)
            gap = gs.load(gl.SliceLayout(0, MMA))[None, :] - g_row[:, None]
            weights = gl.exp2(gl.where(seen, gap, float("-inf")))
            read = gl.exp2(whole_decay(gs, ROW) - g_row + before)
        read *= up
        scores, others, dvc = warpgroup_mma_wait(0, deps=(scores, others, dvc))
        scores *= weights
        left = gl.convert_layout(scores.to(dtype), LEFT)
        other_left = gl.convert_layout((others * weights).to(dtype), LEFT)
        sums = sum_of_pairs(pairs_of(scores, others)) if SUMS else read
        x = add_product(x, qc.permute((1, 0)) if DECAY == NONE else written(qc, gs, LEFT), doc)  # w X + …
        dvc *= read[:, None]
        if SUMS:
            sums += gl.sum(vc.load(MMA).to(gl.float32) * dvc, axis=1)
            gl.store(products + (begin + i * C + row) * H + h, sums * scale, mask=i * C + row < count)
        dvc = add_product(dvc, left, doc)  # … + Σ_j w_ij (k_i·q_j) do_j
        if DECAY != NONE:
            before = head_room(gs, ROW, dtype)
            gs.store(g)
        x, dvc = warpgroup_mma_wait(0, deps=(x, dvc))
        tma.store_wait(1 if SUMS else 0)  # all that has been given of the step before is out
        barrier()
        dv_out.store((dvc * scale).to(dtype))
        if SHARED_KEYS:
            if PART == 0:
                joint.release(step, pred=step > 0)
            else:
                joint.acquire(step)
        for piece in gl.static_range(K // HALF):
            keys = copy.slice(piece * HALF, HALF, dim=0)
            dkc = product(vc, keys.permute((1, 0)), MMA)  # X v_i
            dkc = warpgroup_mma_wait(0, deps=(dkc,)) * read[:, None]
            dkc = add_product(dkc, other_left, qc.slice(piece * HALF, HALF, dim=1))
            dkc = warpgroup_mma_wait(0, deps=(dkc,)) * scale
            out = dk_out.slice(piece * HALF, HALF, dim=1)
            if SHARED_KEYS and PART == 0:
                if piece == 0:
                    joint.wait(step)
                dkc += out.load(MMA).to(gl.float32)
            out.store(dkc.to(dtype))
        if SUMS:
            tma.store_wait(0)  # of this step's copy
            barrier()
        up = write_copy(x, copy)
        if SHARED_KEYS and PART == 1:
            barrier()
            joint.fill(step)
        publish()
        ring.release(step)
        send_rows(dv, outputs.dv_rows, dv_out, begin, i, count, h * HALF, H * HALF)
        if not SHARED_KEYS or PART == 0:
            send_rows(dk, outputs.dk_rows, dk_out, begin, i, count, dk_col, dk_stride)
    tma.store_wait(0)


@gluon.jit
def _pair_reverse_scan(
    q, k,  # rows of [tokens, H // G, K]
    v, do,  # rows of [tokens, H, 64]
    gates,  # see gates.cumulate
    local, incoming, passed,  # [M, H, K, 64]: X · scale before the scan: see InitialStates
    dk,  # [tokens, H, K], or of pairs of heads
    dv,  # [tokens, H, 64]
    dk_rows, dv_rows,  # rows of them
    products,  # [tokens, H]: see chunk_step, if SUMS
    behind,  # [chunks, H, K, 64] by rows: X behind every chunk, rounded, if SUMS
    behind_ups,  # [chunks, H]: its factors, if it is fp16
    owner, start, length,
    first_chunk,  # [M]
    scale, H, G, K: gl.constexpr,
    OWN: gl.constexpr,  # heads of a program whose q and k are not the same
    DECAY: gl.constexpr, SUMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    tile, h = gl.program_id(0), 2 * gl.program_id(1)
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    chunk = gl.load(first_chunk + tile) if SUMS else begin
    dtype: gl.constexpr = q.dtype
    rows, sources = make_rows(dtype, OWN * STAGES, K, 2 * STAGES, HALF), Rows(q, k, v, do)
    x_copies = gl.allocate_shared_memory(dtype, [2, K, HALF], shared_layout(HALF))
    dv_outputs = gl.allocate_shared_memory(dtype, [2, C, HALF], shared_layout(HALF))
    dk_outputs = gl.allocate_shared_memory(dtype, [OWN, C, K], shared_layout(K))
    gates_copies = gl.allocate_shared_memory(gl.float32, [2, C], GATES_SHARED)
    rings = _Rings(make_ring(STAGES), make_ring(1, 1))
    staged = _Staged(x_copies, gates_copies, dv_outputs, dk_outputs)
    initial = Initial(local, incoming, passed, owner)
    outputs = _Outputs(dk, dk_rows, dv, dv_rows, products, behind, behind_ups)
    here = Tile(begin, count, chunk, h, H)
    gl.warp_specialize(
        [
            (_compute, (rows, staged, rings, gates, initial, outputs, here, scale, 0, DECAY)),
            (_compute, (rows, staged, rings, gates, initial, outputs, here, scale, 1, DECAY)),
            (_fetch, (sources, rows, rings.rows, here, G)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def pair_reverse_scan(
    tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, do: Tensor, gates: Tensor | None, initial: InitialStates,
    scale: float, behind: Behind | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dk [B, T, H, K], or [B, T, H / 2, K] of two heads that share q and k, and dv [B, T, H, 64]. With `behind`, which
    it fills, also what gates need, [1, B, T, H]."""
    (batch, tokens, heads, size_v), (q_heads, size_k) = v.shape, q.shape[2:]
    own = 1 if heads // q_heads % 2 == 0 else 2
    dk, dv = v.new_empty(batch, tokens, heads * own // 2, size_k), v.new_empty(v.shape)
    products = states = ups = first_chunk = None
    if behind is not None:
        products = initial.local.new_empty(1, batch, tokens, heads)
        states, ups, first_chunk = behind.rows(size_k, size_v), behind.ups, behind.first_chunk
    launch(
        _pair_reverse_scan, (tiles.count, heads // 2),
        rows_of(q, size_k), rows_of(k, size_k), rows_of(v, size_v), rows_of(do, size_v), gates, *initial,
        dk, dv, rows_of(dk, size_k), rows_of(dv, size_v), products, states, ups,
        tiles.owner, tiles.start, tiles.length, first_chunk, scale, heads, heads // q_heads,
        K=size_k, OWN=own, DECAY=Decay.of(gates).value, SUMS=behind is not None, STAGES=2, num_warps=4,
        pdl=True,
    )  # fmt: skip
    return dk, dv, products
