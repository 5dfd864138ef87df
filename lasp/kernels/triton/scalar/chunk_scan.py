"""Phase 3: the scan over a tile's chunks, forward or reverse, with a state in registers: outputs and gradients alike.

For rows i and the rows j that they see (forward: j <= i, reverse: j >= i), with w the decay between two places,

    y_i = scale · (w_i a_iᵀ X + Σ_j w_ij (a_i·b_j) c_j)          X <- w X + Σ_j w_j b_j c_jᵀ

    o    forward   a, b, c = q, k, v      X the state
    dq   forward   a, b, c = do, v, k     X the state, transposed
    dv   reverse   a, b, c = k, q, do     X the state's gradient / scale
    dk   reverse   a, b, c = v, do, q     the same, transposed

With gates, g_i the cumulative decay of a chunk from where the scan enters it and e that of the whole chunk, the weights
are w_i = e^{g_i}, w_ij = e^{g_i - g_j}, w_j = e^{e - g_j}. They are products, so that scaling rows is all they cost:

    c̃_j = e^{e/2 - g_j} c_j       y_i = scale · e^{g_i - e/2} (a_iᵀ X̃ + Σ_j (a_i·b_j) c̃_j)       X̃ = e^{e/2} X
    X <- e^{e/2} (X̃ + Σ_j b_j c̃_jᵀ)

which is exact as long as e^{e/2} is in range. A tile with a chunk that decays too much for that takes its weights pair
by pair.

For the gradient of gates (SUMS), dq and dv also sum, over y's columns, what gates.gate_grads reads: with r and u what
came in with the state, r = q·w Xᵀdo and u = v·w Gᵀk, and E_ij = w_ij (q_i·k_j) (do_i·v_j), pairs within a chunk,

    dq    r_i + Σ_{j<i} E_ij - Σ_{j>i} E_ji        dv    u_i

Both scans round the same factors of r and u as they round them where they are written into states, and read states
without rounding them, so that what cancels over a tile does.
"""

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import block_of, cdiv
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.scalar.config import ScalarConfig
from lasp.kernels.triton.scalar.gates import load_gates
from lasp.kernels.triton.shared.decay import NONE
from lasp.kernels.triton.shared.state_passing import InitialStates, load_initial_state


@triton.jit
def _read(a, x, dtype, PRECISION: tl.constexpr):
    """aᵀ X; in 16 bits with what rounding leaves of X."""
    high = x.to(dtype)
    y = tl.dot(a.to(dtype), high, input_precision=PRECISION)
    if dtype != tl.float32:
        y = tl.dot(a, (x - high.to(tl.float32)).to(dtype), y, input_precision=PRECISION)
    return y


@triton.jit
def _pairs(p, others, earlier):
    """Sums over the pairs of each token with earlier ones, less those with later ones.

    Where a chunk decays much, the places of `others` that are not of such a pair are out of range.
    """
    pairs = tl.where(earlier, p * others, 0.0)
    return tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)


@triton.jit
def _steps(
    a, b, c, gates, y, partner, products, x, begin, count, h, block, scale, TOKENS, H, GA, GB, GC, GP,
    DA: tl.constexpr, DC: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, SUMS: tl.constexpr, PAIRWISE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The scan over a tile, C tokens at a time, gates being summed within CHUNK of them; returns X after it."""
    rows, cols = tl.arange(0, BA), block * BC + tl.arange(0, BC)
    dtype = c.dtype.element_ty
    HALF: tl.constexpr = dtype == tl.float16
    state_dtype = tl.float32 if HALF else dtype  # a state may exceed what fp16 holds
    decayed_dtype: tl.constexpr = tl.float32 if HALF else dtype  # nor has it small numbers
    EXACT: tl.constexpr = "tf32x3" if HALF and SUMS else PRECISION  # of what must not add up over a tile
    PAIRS: tl.constexpr = SUMS and not REVERSE  # of a query and a key, with both of their scores
    i_row, i_col = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    seen = i_row <= i_col if REVERSE else i_row >= i_col
    a += (begin * (H // GA) + h // GA) * DA  # within a tile 32 bits are enough
    b += (begin * (H // GB) + h // GB) * DA
    c += (begin * (H // GC) + h // GC) * DC
    y += (begin * H + h) * DC
    if SUMS:
        partner += (begin * (H // GP) + h // GP) * DC
        products += (block * TOKENS + begin) * H + h
    chunks = tl.cdiv(count, C)
    for step in tl.range(0, chunks, num_stages=STAGES):
        i = (chunks - 1 - step) if REVERSE else step
        place = i * C + tl.arange(0, C)
        here = place < count
        here_c = here[:, None] & (cols < DC)[None, :]
        ac = tl.load(
            a + (place * (H // GA * DA))[:, None] + rows[None, :], mask=here[:, None] & (rows < DA)[None, :], other=0.0
        )
        bt = tl.load(
            b + (place * (H // GB * DA))[None, :] + rows[:, None], mask=here[None, :] & (rows < DA)[:, None], other=0.0
        )
        cc = tl.load(c + (place * (H // GC * DC))[:, None] + cols[None, :], mask=here_c, other=0.0)
        if SUMS:
            pc = tl.load(partner + (place * (H // GP * DC))[:, None] + cols[None, :], mask=here_c, other=0.0)
        if DECAY == NONE:
            p = tl.where(seen, tl.dot(ac, bt, input_precision=PRECISION), 0.0).to(dtype)
            yc = tl.dot(ac.to(state_dtype), x.to(state_dtype), input_precision=PRECISION)
            yc = tl.dot(p, cc, yc, input_precision=PRECISION)
            x = tl.dot(bt, cc, x, input_precision=PRECISION)
        else:
            passed, end = load_gates(gates, begin, i, count, h, H, C, CHUNK, DECAY)
            g = end - passed if REVERSE else passed
            p = tl.dot(ac, bt, input_precision=PRECISION)
            if PAIRWISE:
                gap = (g[:, None] - g[None, :]).to(tl.float32)
                left, g, end = (end - g).to(tl.float32), g.to(tl.float32), end.to(tl.float32)
                p *= tl.exp2(tl.where(seen, gap, float("-inf")))
                if SUMS:
                    scaled = (ac * tl.exp2(g)[:, None]).to(decayed_dtype)
                    yc = _read(scaled, x, state_dtype, EXACT)
                    inner = tl.sum(pc * yc, axis=1)
                    if PAIRS:
                        inner += _pairs(p, tl.dot(pc, tl.trans(cc), input_precision=PRECISION), i_row > i_col)
                else:
                    yc = tl.dot(ac.to(state_dtype), x.to(state_dtype), input_precision=PRECISION) * tl.exp2(g)[:, None]
                yc = tl.dot(p.to(dtype), cc, yc, input_precision=PRECISION)
                cc = (cc * tl.exp2(left)[:, None]).to(decayed_dtype)
                x = tl.dot(bt.to(decayed_dtype), cc, x * tl.exp2(end), input_precision=EXACT)
            else:
                g, end = g.to(tl.float32), end.to(tl.float32)
                read = tl.exp2(g - 0.5 * end)[:, None]
                cc = (cc * tl.exp2(0.5 * end - g)[:, None]).to(dtype)
                x *= tl.exp2(0.5 * end)
                p = tl.where(seen, p, 0.0)
                if SUMS:
                    yc = _read((ac * read).to(dtype), x, state_dtype, EXACT)
                    inner = tl.sum(pc * yc, axis=1)
                    if PAIRS:
                        others = tl.dot(pc, tl.trans(cc), input_precision=PRECISION) * read
                        inner += _pairs(p, others, i_row > i_col)
                    yc += tl.dot(p.to(dtype), cc, input_precision=PRECISION) * read
                else:
                    yc = tl.dot(ac.to(state_dtype), x.to(state_dtype), input_precision=PRECISION)
                    yc = tl.dot(p.to(dtype), cc, yc, input_precision=PRECISION)
                    yc *= read
                x = tl.dot(bt, cc, x, input_precision=PRECISION) * tl.exp2(0.5 * end)
        yc *= scale
        tl.store(y + (place * (H * DC))[:, None] + cols[None, :], yc.to(dtype), mask=here_c)
        if SUMS:
            tl.store(products + place * H, inner * scale, mask=here)
    return x


@triton.jit
def _chunk_scan(
    a,  # [tokens, H // GA, DA]
    b,  # [tokens, H // GB, DA]
    c,  # [tokens, H // GC, DC]
    gates,  # see gates.cumulate
    largest_decay,  # [M, H]: the largest log2 decay of a tile's chunks, negated
    local,  # [M, H, DA, DC], or [M, H, DC, DA] if TRANSPOSED: X before the scan, with the next two: see InitialStates
    incoming,  # [N, H, DA, DC], likewise
    passed,  # [M, H]
    y,  # [tokens, H, DC]
    partner,  # [tokens, H // GP, DC]: for sums, if SUMS
    products,  # [blocks, tokens, H]: those sums
    d_local,  # like local and the next two: the gradient of the state at the tiles' ends, if SUMS and not REVERSE
    d_incoming,
    d_passed,
    at_end,  # [blocks, M, H]: its product with the state there, likewise
    owner, start, length, scale, state_scale, TOKENS, H, GA, GB, GC, GP,
    DA: tl.constexpr, DC: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    MAX_LOG2_DECAY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first: tl.constexpr = TRANSPOSED and not REVERSE and not SUMS  # see pdl
    if not first:
        griddepcontrol_wait()
    blocks: tl.constexpr = (DC + BC - 1) // BC  # neighbours, so that all but one find a and b in the cache
    tile, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    h, tiles = tl.program_id(1), tl.num_programs(0) // blocks
    rows, cols = tl.arange(0, BA), block * BC + tl.arange(0, BC)
    begin, count = tl.load(start + tile), tl.load(length + tile)
    state_place = cols[None, :] * DA + rows[:, None] if TRANSPOSED else rows[:, None] * DC + cols[None, :]
    inside = (rows < DA)[:, None] & (cols < DC)[None, :]
    x = load_initial_state(local, incoming, passed, owner, tile, h, H, state_place, inside, None, DA, DC)
    x *= state_scale
    pairwise = False
    if DECAY != NONE:
        pairwise = tl.load(largest_decay + tile * H + h) > MAX_LOG2_DECAY
    if pairwise:
        x = _steps(
            a, b, c, gates, y, partner, products, x, begin, count, h, block, scale, TOKENS, H, GA, GB, GC, GP,
            DA, DC, BA, BC, 32, C, DECAY, REVERSE, SUMS, True, PRECISION, 1,
        )  # fmt: skip
    else:
        x = _steps(
            a, b, c, gates, y, partner, products, x, begin, count, h, block, scale, TOKENS, H, GA, GB, GC, GP,
            DA, DC, BA, BC, C, C, DECAY, REVERSE, SUMS, False, PRECISION, STAGES,
        )  # fmt: skip
    if first:
        griddepcontrol_wait()
    if SUMS and not REVERSE:
        d_end = load_initial_state(d_local, d_incoming, d_passed, owner, tile, h, H, state_place, inside, None, DA, DC)
        tl.store(at_end + (block * tiles + tile) * H + h, tl.sum(tl.sum(x * d_end, axis=1), axis=0))


def chunk_scan(
    tiles: Tiles,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    gates: Tensor | None,
    largest_decay: Tensor | None,
    initial: InitialStates,
    scale: float,
    config: ScalarConfig,
    *,
    reverse: bool = False,
    transposed: bool = False,
    partner: Tensor | None = None,
    d_final: InitialStates | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [B, T, H, DC], for as many heads as the states have; with a partner (of dq it is q, of dv v) also the sums that
    gates need, [blocks, B, T, H].

    initial: X before the scan, of every tile. With d_final, the gradients of the states that the tiles end with, a
    forward scan also gives the products of both, [blocks, M, H].
    """
    (batch, tokens), (size_a, size_c), heads = c.shape[:2], (a.shape[3], c.shape[3]), initial.local.shape[1]
    width = min(block_of(size_c), config.widest)
    blocks = cdiv(size_c, width)
    y = c.new_empty(batch, tokens, heads, size_c)
    products = at_end = None
    if partner is not None:
        products = initial.local.new_empty(blocks, batch, tokens, heads)
        at_end = None if reverse else products.new_empty(blocks, tiles.count, heads)
    groups = (1 if t is None else heads // t.shape[2] for t in (a, b, c, partner))
    launch(
        _chunk_scan, (tiles.count * blocks, heads),
        a, b, c, gates, largest_decay, *initial, y, partner, products, *(d_final or (None,) * 3), at_end,
        tiles.owner, tiles.start, tiles.length, scale, 1 / scale if reverse else 1.0, batch * tokens, heads, *groups,
        DA=size_a, DC=size_c, BA=block_of(size_a), BC=width, C=config.chunk,
        DECAY=Decay.of(gates).value, REVERSE=reverse, TRANSPOSED=transposed, SUMS=partner is not None,
        PRECISION=config.precision, MAX_LOG2_DECAY=config.max_log2_decay, STAGES=config.stages, num_warps=config.warps,
        pdl=True,
    )  # fmt: skip
    return y, products, at_end
