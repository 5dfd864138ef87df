"""How sequences are cut: into tiles, one for each program of a kernel, and these into chunks."""

import torch

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.device import MAX_HEAD, cdiv, multiprocessors

CHUNK = 64  # tokens of a chunk of the delta rule, and of any op on Hopper
LONGEST_TILE, SHORTEST_TILE = 8192, 64


def tile_length(sequences: int, tokens: int, heads: int, device: torch.device) -> int:
    """Tokens per tile: as many tiles as the multiprocessors scan at once, a program each, or so many times as many that
    they are not too long.

    One tile more would be scanned alone when all others are done. Sequences of so many tokens share no tiles. Offsets
    within a tile fit into 32 bits.
    """
    addressable = 2**31 // (heads * MAX_HEAD * SHORTEST_TILE) * SHORTEST_TILE
    longest, at_once = min(LONGEST_TILE, addressable), multiprocessors(device)
    rounds = cdiv(sequences * tokens * heads, longest * at_once)
    most = max(1, rounds * at_once // heads // sequences)
    return min(longest, cdiv(tokens, most * SHORTEST_TILE) * SHORTEST_TILE)


def tiles_of(x: LinearInputs, at_once: int = 1, chunk: int = CHUNK) -> Tiles:
    """at_once: heads that a program scans. chunk: tokens of whose multiple tiles are."""
    batch, tokens, heads = x.v.shape[:3]
    length = tile_length(batch, tokens, heads // at_once, x.v.device)
    return x.segments.tiles(cdiv(length, chunk) * chunk, x.v.device)
