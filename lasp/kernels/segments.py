"""Which consecutive tokens share a state: the rows of a batch, or packed documents.

Every op sees its tokens as one flat list cut into N segments, each with its own incoming and outgoing state.
Sequence parallelism needs no more than that: a rank's segments are the pieces of documents that it holds.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels import checks
from lasp.kernels.lasting import kept, lasting
from lasp.kernels.parked import to_device


class Segments:
    """N runs of consecutive tokens in the flat order of a `[B, T, ...]` tensor.

    batch, tokens: B and T. cu_seqlens: [N + 1] integer offsets of packed segments (then B = 1); None makes every row
    of the batch one segment. Reading `offsets` copies a device tensor to the host once and raises ValueError unless its
    values fit; nothing else does.
    """

    def __init__(self, batch: int, tokens: int, cu_seqlens: Tensor | None = None):
        self.batch, self.tokens, self.cu_seqlens = batch, tokens, cu_seqlens
        self.count = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self._chunks: dict[tuple[int, torch.device], Chunks] = {}
        self._tiles: dict[tuple[int, torch.device], Tiles] = {}
        self._times: dict[int, Segments] = {}

    @lasting
    def times(self, n: int) -> "Segments":
        """The same with n tokens in the place of each."""
        if n not in self._times:
            offsets = None if self.cu_seqlens is None else self.cu_seqlens.long() * n
            self._times[n] = Segments(self.batch, self.tokens * n, offsets)
        return self._times[n]

    @cached_property
    @lasting
    def offsets(self) -> Tensor:
        """[N + 1] int64 on the host: segment n is the flat tokens offsets[n] … offsets[n + 1] - 1."""
        if self.cu_seqlens is None:
            return torch.arange(self.batch + 1, device="cpu") * self.tokens
        offsets = self.cu_seqlens.to("cpu", torch.int64)
        checks.offset_values(offsets, self.batch * self.tokens)
        return offsets

    @lasting
    def chunks(self, size: int, device: torch.device) -> "Chunks":
        """In chunks of `size` tokens, made once; reads `offsets`."""
        if (size, device) not in self._chunks:
            self._chunks[size, device] = Chunks(self.offsets, size, device)
        return self._chunks[size, device]

    @lasting
    def cut(self, size: int, chunk: int, device: torch.device) -> "Cut":
        """In tiles of `size` tokens, and those in smaller ones of `chunk`, which divides `size`."""
        if self.cu_seqlens is None:
            return _row_cut(self.batch, self.tokens, size, chunk, device)
        return Cut.of(self.tiles(size, device), self.tiles(chunk, device))

    @lasting
    def tiles(self, size: int, device: torch.device) -> "Tiles":
        """In tiles of `size` tokens, made once; offsets on a device are not copied to the host."""
        if self.cu_seqlens is None:
            return _row_tiles(self.batch, self.tokens, size, device)
        if (size, device) not in self._tiles:
            self._tiles[size, device] = Tiles.cut(self, size, device)
        return self._tiles[size, device]


class Chunks:
    """The segments cut into M chunks of C tokens each; a segment's last chunk may be partly empty.

    owner: [M] the segment of each chunk.  mask: [M, C] True where there is a token.
    steps: for i = 0, 1, …: the segments that have an i-th chunk, and those chunks, as indices (or slices).
    """

    def __init__(self, offsets: Tensor, size: int, device: torch.device):
        lengths = offsets.diff()
        counts = (lengths + size - 1) // size
        first = counts.cumsum(0) - counts
        self.size, self.count = size, int(counts.sum())
        self.dense = bool((lengths % size == 0).all())

        place = torch.arange(max(len(lengths), self.count, size), device=offsets.device)
        owner = torch.repeat_interleave(place[: len(lengths)], counts)
        start = offsets[owner] + (place[: self.count] - first[owner]) * size
        token = start[:, None] + place[:size]
        mask = token < offsets[owner + 1][:, None]
        self.owner, self.mask = to_device(owner, device), to_device(mask, device)
        self._token = to_device(token.where(mask, 0), device)
        self._slot = to_device(mask.flatten().nonzero().squeeze(1), device)

        most = max(counts.tolist(), default=0)
        self.steps: list[tuple[Tensor | slice, Tensor | slice]]
        if bool((counts == most).all()):
            self.steps = [(slice(None), slice(i, None, most)) for i in range(most)]
        else:
            longest_first = counts.argsort(descending=True, stable=True)
            active = [longest_first[: int((counts > i).sum())] for i in range(most)]
            self.steps = [(to_device(n, device), to_device(first[n] + i, device)) for i, n in enumerate(active)]

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [M, H, C, ...], zero where there is no token."""
        flat = x.flatten(0, 1)
        if self.dense:
            return flat.unflatten(0, (self.count, self.size)).transpose(1, 2)
        chunks = flat[self._token].where(self.mask.view(*self.mask.shape, *(1,) * (flat.ndim - 1)), 0)
        return chunks.transpose(1, 2)

    def join(self, chunks: Tensor, like: Tensor) -> Tensor:
        """The inverse of `split`: [M, H, C, ...] -> [B, T, H, ...], B and T those of `like`."""
        flat = chunks.transpose(1, 2).flatten(0, 1)
        return (flat if self.dense else flat[self._slot]).unflatten(0, like.shape[:2])


@dataclass(frozen=True)
class Tiles:
    """The segments cut into tiles of at most `size` tokens: one program of a device kernel scans one tile.

    start: [M] int64, a tile's first token in flat order.  length: [M] int32.  owner: [M] int32, its segment.  first:
    [N + 1] int32, the tiles of segment n are first[n] … first[n + 1] - 1.  With cu_seqlens on the device M is an upper
    bound, so that nothing has to be copied to the host; the tiles beyond first[N] are empty. Nobody has looked at the
    offsets then: wrong ones are made to decrease nowhere and to stay within the tokens, so that kernels do.
    """

    size: int
    count: int
    start: Tensor
    length: Tensor
    owner: Tensor
    first: Tensor

    @classmethod
    def cut(cls, segments: Segments, size: int, device: torch.device) -> "Tiles":
        packed = segments.cu_seqlens
        on_device = packed is not None and packed.device == device and device.type != "cpu"
        total = segments.batch * segments.tokens
        if packed is not None and on_device:
            offsets = packed.long().clamp(0, total).cummax(0).values
        else:
            offsets = segments.offsets
        lengths = offsets.diff()
        counts = (lengths + size - 1) // size
        first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        count = -(-total // size) + segments.count if on_device else int(first[-1])
        tile = torch.arange(count, device=offsets.device)
        owner = torch.searchsorted(first[1:], tile, right=True).clamp(max=segments.count - 1)
        start = offsets[owner] + (tile - first[owner]) * size
        length = (offsets[owner + 1] - start).clamp(0, size)
        parts = start.where(length > 0, 0), length.int(), owner.int(), first.int()
        return cls(size, count, *(to_device(part, device) for part in parts))


class Cut(NamedTuple):
    """Tiles, and smaller ones in them, the `chunks`. first_chunk: [M], the index of each tile's first chunk."""

    tiles: Tiles
    chunks: Tiles
    first_chunk: Tensor

    @classmethod
    def of(cls, tiles: Tiles, chunks: Tiles) -> "Cut":
        starts = chunks.start.where(chunks.length > 0, 2**62)  # empty ones come last, at 0
        return cls(tiles, chunks, torch.searchsorted(starts, tiles.start))


# Of rows without documents, such things are made once: short sequences take less time than making them.


@kept(4096)
def _row_tiles(batch: int, tokens: int, size: int, device: torch.device) -> Tiles:
    return Tiles.cut(Segments(batch, tokens), size, device)


@kept(4096)
def _row_cut(batch: int, tokens: int, size: int, chunk: int, device: torch.device) -> Cut:
    return Cut.of(*(_row_tiles(batch, tokens, length, device) for length in (size, chunk)))
