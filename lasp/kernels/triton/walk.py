"""Phase 3: a tile is walked chunk by chunk, up or down, with a state in registers: outputs and gradients alike.

For rows i and the rows j that they see (up: j <= i, down: j >= i), with w the decay between two places,

    y_i = scale · (w_i a_iᵀ X + Σ_j w_ij (a_i·b_j) c_j)          X <- w X + Σ_j w_j b_j c_jᵀ

    o    up     a, b, c = q, k, v      X the state
    dq   up     a, b, c = do, v, k     X the state, transposed
    dv   down   a, b, c = k, q, do     X the state's gradient / scale
    dk   down   a, b, c = v, do, q     the same, transposed

With gates, g_i the cumulative decay of a chunk from where the walk enters it and e that of the whole chunk, the weights
are w_i = e^{g_i}, w_ij = e^{g_i - g_j}, w_j = e^{e - g_j}. They are products, so that scaling rows is all they cost:

    c̃_j = e^{e/2 - g_j} c_j       y_i = scale · e^{g_i - e/2} (a_iᵀ X̃ + Σ_j (a_i·b_j) c̃_j)       X̃ = e^{e/2} X
    X <- e^{e/2} (X̃ + Σ_j b_j c̃_jᵀ)

which is exact as long as e^{e/2} is in range. A tile with a chunk too steep for that takes its weights one by one.
"""

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.config import Config, block_of, cdiv
from lasp.kernels.triton.gates import NONE, decay_class, load_gates
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.overlap import await_previous
from lasp.kernels.triton.scan import Entering, load_entering


@triton.jit
def _steps(
    a, b, c, gates, y, partner, products, x, begin, count, h, block, scale, TOKENS, H, GA, GB, GC, GP,
    DA: tl.constexpr, DC: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, DOWN: tl.constexpr, SUMS: tl.constexpr, STEEP: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The walk over a tile, C tokens at a time, gates being summed within CHUNK of them; returns X after it."""
    rows, cols = tl.arange(0, BA), block * BC + tl.arange(0, BC)
    dtype = c.dtype.element_ty
    state_dtype = tl.float32 if dtype == tl.float16 else dtype  # a state may exceed what fp16 holds
    i_row, i_col = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    seen = i_row <= i_col if DOWN else i_row >= i_col
    a += (begin * (H // GA) + h // GA) * DA  # within a tile 32 bits are enough
    b += (begin * (H // GB) + h // GB) * DA
    c += (begin * (H // GC) + h // GC) * DC
    y += (begin * H + h) * DC
    if SUMS:
        partner += (begin * (H // GP) + h // GP) * DC
        products += (block * TOKENS + begin) * H + h
    chunks = tl.cdiv(count, C)
    for step in tl.range(0, chunks, num_stages=STAGES):
        i = (chunks - 1 - step) if DOWN else step
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
            g = end - passed if DOWN else passed
            p = tl.dot(ac, bt, input_precision=PRECISION)
            if STEEP:
                gap = (g[:, None] - g[None, :]).to(tl.float32)
                left, g, end = (end - g).to(tl.float32), g.to(tl.float32), end.to(tl.float32)
                p = (p * tl.exp2(tl.where(seen, gap, float("-inf")))).to(dtype)
                yc = tl.dot(ac.to(state_dtype), x.to(state_dtype), input_precision=PRECISION)
                yc = tl.dot(p, cc, yc * tl.exp2(g)[:, None], input_precision=PRECISION)
                cc = (cc * tl.exp2(left)[:, None]).to(dtype)
                x = tl.dot(bt, cc, x * tl.exp2(end), input_precision=PRECISION)
            else:
                g, end = g.to(tl.float32), end.to(tl.float32)
                cc = (cc * tl.exp2(0.5 * end - g)[:, None]).to(dtype)
                x *= tl.exp2(0.5 * end)
                yc = tl.dot(ac.to(state_dtype), x.to(state_dtype), input_precision=PRECISION)
                yc = tl.dot(tl.where(seen, p, 0.0).to(dtype), cc, yc, input_precision=PRECISION)
                yc *= tl.exp2(g - 0.5 * end)[:, None]
                x = tl.dot(bt, cc, x, input_precision=PRECISION) * tl.exp2(0.5 * end)
        yc *= scale
        tl.store(y + (place * (H * DC))[:, None] + cols[None, :], yc.to(dtype), mask=here_c)
        if SUMS:
            tl.store(products + place * H, tl.sum(pc * yc, axis=1), mask=here)
    return x


@triton.jit
def _walk(
    a,  # [tokens, H // GA, DA]
    b,  # [tokens, H // GB, DA]
    c,  # [tokens, H // GC, DC]
    gates,  # see gates.cumulate
    steepest,  # [M, H]: the largest log2 decay of a tile's chunks, negated
    local,  # [M, H, DA, DC], or [M, H, DC, DA] if TRANSPOSED: X before the walk, with the next two: see scan.Entering
    incoming,  # [N, H, DA, DC], likewise
    passed,  # [M, H]
    y,  # [tokens, H, DC]
    partner,  # [tokens, H // GP, DC]: for sums of partner · y, if SUMS
    products,  # [blocks, tokens, H]: those sums
    ends,  # like local: the state at the tiles' ends, written up and read down, if SUMS
    at_end,  # [blocks, M, H]: its product with the state's gradient there, written down, if SUMS
    owner,
    start,
    length,
    scale,
    state_scale,
    TOKENS,
    H,
    GA,
    GB,
    GC,
    GP,
    DA: tl.constexpr,
    DC: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    DOWN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    REACH: tl.constexpr,
    STAGES: tl.constexpr,
):
    first: tl.constexpr = TRANSPOSED and not DOWN  # see overlap
    if not first:
        await_previous()
    blocks: tl.constexpr = (DC + BC - 1) // BC  # neighbours, so that all but one find a and b in the cache
    tile, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    h, tiles = tl.program_id(1), tl.num_programs(0) // blocks
    rows, cols = tl.arange(0, BA), block * BC + tl.arange(0, BC)
    begin, count = tl.load(start + tile), tl.load(length + tile)
    state_place = cols[None, :] * DA + rows[:, None] if TRANSPOSED else rows[:, None] * DC + cols[None, :]
    state_at = (tile * H + h) * DA * DC + state_place
    inside = (rows < DA)[:, None] & (cols < DC)[None, :]
    x = load_entering(local, incoming, passed, owner, tile, h, H, state_place, inside, None, DA, DC)
    if SUMS and DOWN:
        end = tl.load(ends + state_at, mask=inside, other=0.0)
        tl.store(at_end + (block * tiles + tile) * H + h, tl.sum(tl.sum(x * end, axis=1), axis=0))
    x *= state_scale
    steep = False
    if DECAY != NONE:
        steep = tl.load(steepest + tile * H + h) > REACH
    if steep:
        x = _steps(
            a, b, c, gates, y, partner, products, x, begin, count, h, block, scale, TOKENS, H, GA, GB, GC, GP,
            DA, DC, BA, BC, 32, C, DECAY, DOWN, SUMS, True, PRECISION, 1,
        )  # fmt: skip
    else:
        x = _steps(
            a, b, c, gates, y, partner, products, x, begin, count, h, block, scale, TOKENS, H, GA, GB, GC, GP,
            DA, DC, BA, BC, C, C, DECAY, DOWN, SUMS, False, PRECISION, STAGES,
        )  # fmt: skip
    if first:
        await_previous()
    if SUMS and not DOWN:
        tl.store(ends + state_at, x, mask=inside)


def walk(
    tiles: Tiles,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    gates: Tensor | None,
    steepest: Tensor | None,
    entering: Entering,
    scale: float,
    config: Config,
    *,
    down: bool = False,
    transposed: bool = False,
    partner: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [B, T, H, DC], for as many heads as the states have; with a partner also partner · y [blocks, B, T, H].

    entering: X before the walk, of every tile. A walk up with a partner fills `ends` [M, H, K, V] with the states at
    the tiles' ends, one down reads them and gives their products with the states' gradients there, [blocks, M, H].
    """
    (batch, tokens), (size_a, size_c), heads = c.shape[:2], (a.shape[3], c.shape[3]), entering.local.shape[1]
    width = min(block_of(size_c), config.widest)
    blocks = cdiv(size_c, width)
    y = c.new_empty(batch, tokens, heads, size_c)
    products = at_end = None
    if partner is not None:
        products = entering.local.new_empty(blocks, batch, tokens, heads)
        at_end = products.new_empty(blocks, tiles.count, heads) if down else None
    groups = (1 if t is None else heads // t.shape[2] for t in (a, b, c, partner))
    launch(
        _walk, (tiles.count * blocks, heads),
        a, b, c, gates, steepest, *entering, y, partner, products, ends, at_end,
        tiles.owner, tiles.start, tiles.length, scale, 1 / scale if down else 1.0, batch * tokens, heads, *groups,
        DA=size_a, DC=size_c, BA=block_of(size_a), BC=width, C=config.chunk,
        DECAY=decay_class(gates), DOWN=down, TRANSPOSED=transposed, SUMS=partner is not None,
        PRECISION=config.precision, REACH=config.reach, STAGES=config.stages, num_warps=config.warps,
        overlaps=True,
    )  # fmt: skip
    return y, products, at_end
