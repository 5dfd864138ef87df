"""The forward scan over a tile's chunks (see scalar.chunk_scan), for o and dq, by two groups of warps.

    y_i = scale · (w_i a_iᵀ X + Σ_j w_ij (a_i·b_j) c_j)          X <- w X + Σ_j w_j b_j c_jᵀ

A group holds some columns of a state in registers, and a copy for products in shared memory. Scores stay in registers
as the first operand of what is summed over them. What the groups share out among each other, `Work` says:

    SPLIT     the columns of one head
    APART     two heads, one each: for columns too few to be split
    SUMMED    the columns of two heads, whose y is summed, since they share what `c` is: gradients of q
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.hopper.chunk_step import APART, SPLIT, SUMMED, Work, give_product, open_chunk, write_copy
from lasp.kernels.triton.hopper.layouts import GATES_SHARED, HALF, C, mma_layout, shared_layout
from lasp.kernels.triton.hopper.products import add_product
from lasp.kernels.triton.hopper.ring import Ring, make_ring
from lasp.kernels.triton.hopper.scalar_shared import Behind, load_gates, load_initial_state
from lasp.kernels.triton.hopper.shared import REGISTERS, barrier, clear_tail, publish, rows_of, send_rows
from lasp.kernels.triton.hopper.tiles import Initial, Tile
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.decay import NONE
from lasp.kernels.triton.shared.state_passing import InitialStates


class _Rows(NamedTuple):
    """Of chunks of these tensors: how they come, or where in shared memory they lie, by stages of a ring and groups of
    warps. `behind` are states."""

    a: gl.shared_memory_descriptor
    b: gl.shared_memory_descriptor
    c: gl.shared_memory_descriptor
    partner: gl.shared_memory_descriptor
    behind: gl.shared_memory_descriptor


class _Groups(NamedTuple):
    """How many heads share one of these."""

    a: gl.tensor
    b: gl.tensor
    c: gl.tensor
    partner: gl.tensor


class _Staged(NamedTuple):
    """What groups of warps keep in shared memory, by states or outputs: copies of states and of gates, and y."""

    states: gl.shared_memory_descriptor
    gates: gl.shared_memory_descriptor
    y: gl.shared_memory_descriptor


class _Rings(NamedTuple):
    rows: Ring
    behind: Ring


class _Inputs(NamedTuple):
    """What a scan reads beside chunks' rows."""

    gates: gl.tensor
    initial: Initial
    behind_ups: gl.tensor


class _Outputs(NamedTuple):
    """What a scan writes, and of how many tokens and chunks."""

    y: gl.tensor
    y_rows: gl.tensor
    products: gl.tensor
    at_end: gl.tensor
    tokens: gl.tensor
    chunks: gl.tensor


@gluon.jit
def _fetch(sources, rows, rings, tile, col, groups, WORK: gl.constexpr, SUMS: gl.constexpr, DC: gl.constexpr):
    DA: gl.constexpr = rows.a.shape[2]
    W: gl.constexpr = rows.c.shape[2]
    OWN: gl.constexpr = rows.a.shape[0] // rings.rows.stages  # heads whose a and b are not the same
    ring, h = rings.rows, tile.h
    chunks = gl.cdiv(tile.length, C)
    if SUMS:  # `behind` comes from the kernel before; what else is fetched is older
        griddepcontrol_wait()
    for step in range(chunks):
        token = tile.begin.to(gl.int32) + step * C
        filled, stage = ring.acquire(step), step % ring.stages
        mbarrier.expect(filled, 2 * C * (2 * OWN * DA + (4 if SUMS else 2) * W))
        for n in gl.static_range(OWN):
            own, of_a, of_b = OWN * stage + n, (h + n) // groups.a * DA, (h + n) // groups.b * DA
            tma.async_copy_global_to_shared(sources.a, [token, of_a], filled, rows.a.index(own))
            tma.async_copy_global_to_shared(sources.b, [token, of_b], filled, rows.b.index(own))
        for part in gl.static_range(2):
            head, at = (h + part, 0) if WORK == APART else (h, col + part * W)
            own, of_c = 2 * stage + part, head // groups.c * DC + at
            tma.async_copy_global_to_shared(sources.c, [token, of_c], filled, rows.c.index(own))
            if SUMS:
                of_partner = head // groups.partner * DC + at
                tma.async_copy_global_to_shared(sources.partner, [token, of_partner], filled, rows.partner.index(own))
        if SUMS:
            states: gl.constexpr = rows.behind.shape[0]
            filled = rings.behind.acquire(step)
            mbarrier.expect(filled, 2 * states * W * DA)
            for n in gl.static_range(states):
                head, part = (h + n, 0) if WORK == APART else (h + n % 2, n // 2)
                at = ((tile.chunk + step) * tile.H + head) * DC + col + part * W
                tma.async_copy_global_to_shared(sources.behind, [at.to(gl.int32), 0], filled, rows.behind.index(n))


@gluon.jit
def _state_places(col, DA: gl.constexpr, DC: gl.constexpr, W: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Where W columns of a state lie, from `col` on. Either way eight neighbours are fetched at once."""
    row = gl.arange(0, DA, layout=gl.SliceLayout(1, mma_layout(W)))
    col += gl.arange(0, W, layout=gl.SliceLayout(0, mma_layout(W)))
    if TRANSPOSED:
        return col[None, :] * DA + row[:, None]
    else:
        return row[:, None] * DC + col[None, :]


@gluon.jit
def _compute(
    rows, staged, inputs, outputs, rings, tile, col, scale,
    PART: gl.constexpr,  # the group of warps
    WORK: gl.constexpr, DECAY: gl.constexpr, TRANSPOSED: gl.constexpr, DC: gl.constexpr,
):  # fmt: skip
    ring, behind_ring = rings.rows, rings.behind
    begin, count, chunk, h, H = tile.begin, tile.length, tile.chunk, tile.h, tile.H
    gates, initial, behind_ups = inputs.gates, inputs.initial, inputs.behind_ups
    y, products, at_end, tokens = outputs.y, outputs.products, outputs.at_end, outputs.tokens
    SUMS: gl.constexpr = products is not None
    DA: gl.constexpr = rows.a.shape[2]
    W: gl.constexpr = rows.c.shape[2]
    OWN: gl.constexpr = rows.a.shape[0] // rings.rows.stages
    HEADS: gl.constexpr = 2 if WORK == SUMMED else 1  # of this group
    OUTPUTS: gl.constexpr = staged.y.shape[0] // 2  # that may be on their way
    MMA: gl.constexpr = mma_layout(W)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    TOKEN: gl.constexpr = gl.SliceLayout(1, mma_layout(C))
    AREA: gl.constexpr = DA * DC
    dtype: gl.constexpr = rows.c.dtype
    first: gl.constexpr = TRANSPOSED and not SUMS  # see pdl
    if WORK == APART:
        h += PART
        block, y_col, stride = 0, h * DC, H * DC
    elif WORK == SUMMED:
        col += PART * W
        block, y_col, stride = col // W, h // 2 * DC + col, H // 2 * DC
    else:
        col += PART * W
        block, y_col, stride = col // W, h * DC + col, H * DC
    number = gl.program_id(0).to(gl.int64) // (DC // (2 * W) if WORK == SPLIT else 1)
    y += begin * stride + y_col
    state_at = _state_places(col, DA, DC, W, TRANSPOSED)
    copy, other_copy = staged.states.index(PART * HEADS), staged.states.index(PART * HEADS + HEADS - 1)
    gs, other_gs = staged.gates.index(PART * HEADS), staged.gates.index(PART * HEADS + HEADS - 1)
    chunks = gl.cdiv(count, C)
    last = gl.maximum(chunks - 1, 0)
    if not first:
        griddepcontrol_wait()
    x = load_initial_state(initial, state_at, number, h, H, AREA)
    up = write_copy(x, copy)
    other, other_up = x, up
    if WORK == SUMMED:
        other = load_initial_state(initial, state_at, number, h + 1, H, AREA)
        other_up = write_copy(other, other_copy)
    if DECAY != NONE:
        g, _ = load_gates(gates, begin, 0, count, h, H, DECAY)
        gs.store(g)
        if WORK == SUMMED:
            g, _ = load_gates(gates, begin, 0, count, h + 1, H, DECAY)
            other_gs.store(g)
    ups, other_ups = up, up
    if SUMS and dtype == gl.float16:
        at = gl.minimum(chunk, outputs.chunks - 1) * H + h
        ups, other_ups = _ups(behind_ups, at, DA, W), _ups(behind_ups, at + HEADS - 1, DA, W)
    if SUMS and count > 0:
        behind_ring.wait(0)
        at = (block * outputs.chunks + chunk) * H + h
        give_product(at_end, at, x, rows.behind.index(PART * HEADS), ups, scale)
        if WORK == SUMMED:
            give_product(at_end, at + 1, other, rows.behind.index(PART * HEADS + 1), other_ups, scale)
    publish()
    if SUMS:
        behind_ring.release(0, pred=count > 0)
    for i in range(chunks):
        stage = i % ring.stages
        own = OWN * stage + (PART if WORK == APART and OWN == 2 else 0)
        ac, bc = rows.a.index(own), rows.b.index(own)
        cc, pc = rows.c.index(2 * stage + PART), rows.partner.index(2 * stage + PART)
        if DECAY != NONE:
            ahead = gl.minimum(i + 1, last)
            g, _ = load_gates(gates, begin, ahead, count, h, H, DECAY)
            other_g = g
            if WORK == SUMMED:
                other_g, _ = load_gates(gates, begin, ahead, count, h + 1, H, DECAY)
        if SUMS and dtype == gl.float16:
            at = (chunk + gl.minimum(i + 1, last)) * H + h
            ups, other_ups = _ups(behind_ups, at, DA, W), _ups(behind_ups, at + HEADS - 1, DA, W)
        ring.wait(i)
        if count - i * C < C:  # both groups write the same zeros
            clear_tail(ac, i, count)
            clear_tail(bc, i, count)
            if WORK == SUMMED:
                clear_tail(rows.a.index(own + 1), i, count)
                clear_tail(rows.b.index(own + 1), i, count)
            clear_tail(cc, i, count)
            if SUMS:
                clear_tail(pc, i, count)
            publish()
        yc = gl.zeros([C, W], gl.float32, MMA)
        scores, yc, x, sums = open_chunk(ac, bc, cc, pc, copy, gs, x, yc, up, WORK, DECAY, SUMS)
        place = i * C + gl.arange(0, C, layout=TOKEN)
        if SUMS:
            gl.store(products + (block * tokens + begin + place) * H + h, sums * scale, mask=place < count)
        if WORK == SUMMED:
            yc = add_product(yc, gl.convert_layout(scores.to(dtype), LEFT), cc)  # … + Σ_j w_ij (a_i·b_j) c_j
            x, yc = warpgroup_mma_wait(0, deps=(x, yc))  # to have its registers back
            ac, bc = rows.a.index(own + 1), rows.b.index(own + 1)
            scores, yc, other, sums = open_chunk(
                ac, bc, cc, pc, other_copy, other_gs, other, yc, other_up, WORK, DECAY, SUMS
            )
            if SUMS:
                gl.store(products + (block * tokens + begin + place) * H + h + 1, sums * scale, mask=place < count)
        yc = add_product(yc, gl.convert_layout(scores.to(dtype), LEFT), cc)  # … + Σ_j w_ij (a_i·b_j) c_j
        if WORK == SUMMED:
            other = warpgroup_mma_wait(1, deps=(other,))
            other_up = write_copy(other, other_copy)
        else:
            x = warpgroup_mma_wait(1, deps=(x,))
        up = write_copy(x, copy)
        if SUMS and i + 1 < chunks:
            behind_ring.wait(i + 1)
            at = (block * outputs.chunks + chunk + i + 1) * H + h
            give_product(at_end, at, x, rows.behind.index(PART * HEADS), ups, scale)
            if WORK == SUMMED:
                give_product(at_end, at + 1, other, rows.behind.index(PART * HEADS + 1), other_ups, scale)
            barrier()
            behind_ring.release(i + 1)
        if DECAY != NONE:
            gs.store(g)
            if WORK == SUMMED:
                other_gs.store(other_g)
        yc = warpgroup_mma_wait(0, deps=(yc,)) * scale
        out = staged.y.index(2 * (i % OUTPUTS) + PART)
        if OUTPUTS == 1:
            tma.store_wait(0)
            barrier()
        out.store(yc.to(dtype))
        fence_async_shared()
        if OUTPUTS == 2:
            tma.store_wait(0)  # of the chunk before, whose buffer is the next one's
        barrier()
        ring.release(i)
        send_rows(y, outputs.y_rows, out, begin, i, count, y_col, stride)
    tma.store_wait(0)
    if first:
        griddepcontrol_wait()


@gluon.jit
def _ups(ups, at, DA: gl.constexpr, W: gl.constexpr):
    """The factors of the rows of a state's gradient, [DA], which came in blocks of so many."""
    row = gl.arange(0, DA, layout=gl.SliceLayout(1, mma_layout(W)))
    return gl.load(ups + at * (DA // HALF) + row // HALF)


@gluon.jit
def _chunk_scan(
    a,  # rows of [tokens, H // GA, DA]
    b,  # rows of [tokens, H // GB, DA]
    c,  # rows of W columns of [tokens, H // GC, DC]
    partner,  # rows of W columns of [tokens, H // GP, DC]: for sums of partner · y, if SUMS
    gates,  # see gates.cumulate
    local, incoming, passed,  # [M, H, DA, DC]: X before the scan, its transpose if TRANSPOSED: see InitialStates
    y,  # [tokens, H, DC], or of pairs of heads if they are summed
    y_rows,  # rows of W columns of it
    products,  # [DC // W, tokens, H]: those sums
    behind,  # [chunks, H, DC, DA] by rows: the gradient of the state behind every chunk / scale, rounded, if SUMS
    behind_ups,  # [chunks, H, DA // 64]: the factors of its columns, if it is fp16
    at_end,  # [DC // W, chunks, H, DA]: its products with X before the chunk, by columns
    owner, start, length,
    first_chunk,  # [M]
    scale, TOKENS, CHUNKS, H, GA, GB, GC, GP, DA: gl.constexpr, DC: gl.constexpr,
    W: gl.constexpr,  # columns of a group of warps
    OWN: gl.constexpr,  # heads of a program whose a and b are not the same
    WORK: gl.constexpr, DECAY: gl.constexpr, TRANSPOSED: gl.constexpr, SUMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    blocks: gl.constexpr = DC // (2 * W) if WORK == SPLIT else 1  # neighbours, so that all but one find a and b cached
    tile, col = gl.program_id(0) // blocks, gl.program_id(0) % blocks * (2 * W)
    h = gl.program_id(1) * (1 if WORK == SPLIT else 2)
    begin, count = gl.load(start + tile), gl.load(length + tile).to(gl.int32)
    chunk = gl.load(first_chunk + tile) if SUMS else begin
    dtype: gl.constexpr = a.dtype
    states: gl.constexpr = 4 if WORK == SUMMED else 2
    a_rows = gl.allocate_shared_memory(dtype, [OWN * STAGES, C, DA], shared_layout(DA))
    b_rows = gl.allocate_shared_memory(dtype, [OWN * STAGES, C, DA], shared_layout(DA))
    c_rows = gl.allocate_shared_memory(dtype, [2 * STAGES, C, W], shared_layout(W))
    partner_rows = gl.allocate_shared_memory(dtype, [2 * STAGES, C, W], shared_layout(W)) if SUMS else c_rows
    x_copies = gl.allocate_shared_memory(dtype, [states, DA, W], shared_layout(W))
    behind_rows = gl.allocate_shared_memory(dtype, [states, W, DA], shared_layout(DA)) if SUMS else x_copies
    on_way: gl.constexpr = 1 if WORK == SUMMED and SUMS else 2  # as many as there is room for
    outputs = gl.allocate_shared_memory(dtype, [2 * on_way, C, W], shared_layout(W))
    gates_copies = gl.allocate_shared_memory(gl.float32, [states, C], GATES_SHARED)
    ring = make_ring(STAGES)
    behind_ring = make_ring(1) if SUMS else ring
    sources = _Rows(a, b, c, partner if SUMS else c, behind if SUMS else c)
    rows = _Rows(a_rows, b_rows, c_rows, partner_rows, behind_rows)
    staged = _Staged(x_copies, gates_copies, outputs)
    inputs = _Inputs(gates, Initial(local, incoming, passed, owner), behind_ups)
    written = _Outputs(y, y_rows, products, at_end, TOKENS, CHUNKS)
    here = Tile(begin, count, chunk, h, H)
    rings = _Rings(ring, behind_ring)
    gl.warp_specialize(
        [
            (_compute, (rows, staged, inputs, written, rings, here, col, scale, 0, WORK, DECAY, TRANSPOSED, DC)),
            (_compute, (rows, staged, inputs, written, rings, here, col, scale, 1, WORK, DECAY, TRANSPOSED, DC)),
            (_fetch, (sources, rows, rings, here, col, _Groups(GA, GB, GC, GP), WORK, SUMS, DC)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def chunk_scan(
    tiles: Tiles, a: Tensor, b: Tensor, c: Tensor, gates: Tensor | None, initial: InitialStates, scale: float, *,
    transposed: bool = False, partner: Tensor | None = None, behind: Behind | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """y [B, T, H, DC], for as many heads as the states have, or for half as many, each the sum of two neighbours that
    share c; with a partner also the sums of chunk_step, for which it reads `behind`: [blocks, B, T, H] and, of its
    products with the states before the chunks, by their columns of V, [blocks, chunks, H, V]."""
    (batch, tokens), (size_a, size_c), heads = c.shape[:2], (a.shape[3], c.shape[3]), initial.local.shape[1]
    own, width, work = 1, HALF.value, Work.SPLIT
    if size_c == width:
        work, own = Work.APART, 1 if heads // a.shape[2] % 2 == 0 else 2
    elif size_a == width:
        work, own = Work.SUMMED, 2
    y = c.new_empty(batch, tokens, heads // 2 if work == Work.SUMMED else heads, size_c)
    products = at_end = states = ups = first_chunk = None
    chunks = 0
    if behind is not None:
        chunks, ups, first_chunk = behind.states.shape[0], behind.ups, behind.first_chunk
        states = behind.rows(width, size_a)
        products = initial.local.new_empty(size_c // width, batch, tokens, heads)
        at_end = products.new_empty(size_c // width, chunks, heads, size_a)
    groups = (1 if t is None else heads // t.shape[2] for t in (a, b, c, partner))
    grid = (tiles.count * size_c // (2 * width), heads) if work == Work.SPLIT else (tiles.count, heads // 2)
    launch(
        _chunk_scan, grid,
        rows_of(a, size_a), rows_of(b, size_a), rows_of(c, width), None if partner is None else rows_of(partner, width),
        gates, *initial, y, rows_of(y, width), products, states, ups, at_end,
        tiles.owner, tiles.start, tiles.length, first_chunk, scale, batch * tokens, chunks, heads, *groups,
        DA=size_a, DC=size_c, W=width, OWN=own, WORK=work.value, DECAY=Decay.of(gates).value,
        TRANSPOSED=transposed, SUMS=partner is not None, STAGES=2, num_warps=4, pdl=True,
    )  # fmt: skip
    return y, products, at_end
