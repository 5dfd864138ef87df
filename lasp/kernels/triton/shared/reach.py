"""How far back a tile's summary has to look: a decay leaves nothing of what came long before.

The summary of a tile is the sum of what each of its chunks writes, times the transitions of the chunks behind it (in
reverse, before it). Where these have ERASED a chunk it is left out, and all beyond it: the scan takes a part of the
tile. With mean log decays of -0.05 a token that is the last 600 tokens, of some thousands.

The outputs need no such thing: what enters their scan is what the summaries say.
"""

import triton
import triton.language as tl

ERASED = tl.constexpr(-40.0)  # a log2 decay, far below what fp32 shows of a sum


@triton.jit
def chunks_in_reach(n, log2_decays, passed):
    """n: [N] numbers of consecutive chunks, the nearest being 0. log2_decays: [N] bounds on what they do to a state.
    passed: the same of all chunks before them. Up to how many chunks, from the nearest on, something is left of a
    state; 0 if nothing is."""
    return farthest(n, passed + tl.cumsum(log2_decays, axis=0) - log2_decays)


@triton.jit
def farthest(n, passed):
    """The same, of chunks n from whose states this much separates the end."""
    return tl.max(tl.where(passed > ERASED, n + 1, 0), axis=0)


@triton.jit
def part_in_reach(begin, count, chunks, C: tl.constexpr, FROM_START: tl.constexpr):
    """The tile's last so many chunks, or its first ones: its begin and length."""
    reach = chunks * C
    if FROM_START:
        return begin, tl.minimum(count, reach)
    else:
        skipped = tl.maximum(tl.cdiv(count, C) * C - reach, 0)
        return begin + skipped, count - skipped


@triton.jit
def tile_in_reach(
    n, log2_bounds, begin, count, chunk, h, H, C: tl.constexpr, FROM_START: tl.constexpr
):  # fmt: skip
    """The part of a tile of a head's that its summary has to scan, if chunk c bounds what a state becomes by 2^
    log2_bounds[c, h]: its begin, length and first chunk. n: 0, 1, …, how many chunks are looked at at a time."""
    chunks = tl.cdiv(count, C)
    reach, passed = 0, 0.0
    for block in range(0, chunks, n.shape[0]):
        place = block + n
        at = chunk + (place if FROM_START else chunks - 1 - place)
        bounds = tl.load(log2_bounds + at * H + h, mask=place < chunks, other=0.0)
        reach = tl.maximum(reach, chunks_in_reach(place, bounds, passed))
        passed += tl.sum(bounds, axis=0)
    begin, count = part_in_reach(begin, count, reach, C, FROM_START)
    return begin, count, chunk if FROM_START else chunk + tl.maximum(chunks - reach, 0)


@triton.jit
def tiles_are_erased(log2_bounds, first_chunk, length, low, high, h, H, C: tl.constexpr):
    """Whether nothing is left of what enters tile low, …, high - 1 of a head, of any, when it ends: of so many tokens
    each, [M], whose chunks are those of log2_bounds from first_chunk [M] on."""
    most = float("-inf")
    for block in range(low, high, 16):
        tile = block + tl.arange(0, 16)
        first = tl.load(first_chunk + tile, mask=tile < high, other=0)[:, None]
        chunks = tl.cdiv(tl.load(length + tile, mask=tile < high, other=0), C)
        passed = tl.where(tile < high, 0.0, float("-inf"))
        for start in range(0, tl.max(chunks, axis=0), 64):
            place = start + tl.arange(0, 64)[None, :]
            bounds = tl.load(log2_bounds + (first + place) * H + h, mask=place < chunks[:, None], other=0.0)
            passed += tl.sum(bounds, axis=1)
        most = tl.maximum(most, tl.max(passed, axis=0))
    return most <= ERASED
