"""Blocks of attention: which run of queries sees which run of keys. Pure arithmetic, no tensors but for a mask.

A whole sequence, packed documents and one step of a ring are all lists of blocks; a kernel call serves one block. The
fewer and the larger they are the faster, so neighbours that one call can serve are joined.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Rows of q and of k (along T), cut into segments that see only their own keys.

    In a segment of S_q queries and S_k keys, query i sees key j if -left <= j - (i + S_k - S_q) <= right; None is no
    bound. (The convention of FlashAttention: the last query stands at the last key.)
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    left: int | None = None
    right: int | None = None

    @property
    def rows(self) -> slice:
        return slice(self.q[0], self.q[-1])

    @property
    def cols(self) -> slice:
        return slice(self.k[0], self.k[-1])

    @property
    def queries(self) -> int:
        """Of the longest segment."""
        return max(b - a for a, b in pairwise(self.q))

    @property
    def keys(self) -> int:
        """Of the longest segment."""
        return max(b - a for a, b in pairwise(self.k))

    @property
    def is_full(self) -> bool:
        """Every query sees every key of its segment."""
        return self._sees_all_before and (self.right is None or self.right >= self.queries - 1)

    @property
    def is_triangle(self) -> bool:
        """Plainly causal: query i of a segment sees keys 0 … i."""
        square = all(b - a == d - c for (a, b), (c, d) in zip(pairwise(self.q), pairwise(self.k), strict=True))
        return square and self.right == 0 and self._sees_all_before

    @property
    def _sees_all_before(self) -> bool:
        return self.left is None or self.left >= self.keys - 1

    @property
    def segments(self) -> Iterator["Block"]:
        for q, k in zip(pairwise(self.q), pairwise(self.k), strict=True):
            yield replace(self, q=q, k=k)

    def allowed(self, rows: range, device: torch.device) -> Tensor:
        """[rows, keys] booleans for these queries of the one segment."""
        queries = torch.arange(rows.start, rows.stop, device=device)[:, None] + self.keys - self.queries
        gap = torch.arange(self.keys, device=device) - queries
        seen = torch.ones_like(gap, dtype=torch.bool)
        if self.left is not None:
            seen &= gap >= -self.left
        if self.right is not None:
            seen &= gap <= self.right
        return seen


@dataclass(frozen=True)
class Mask:
    """Who sees whom within a document: position i sees j if j <= i (causal) and |i - j| < window."""

    scale: float
    causal: bool = True
    window: int | None = None
    fused: bool = True  # whether fused kernels may serve
    recurring: int = 1  # lengths that are multiples of it come again

    def comes_again(self, block: Block) -> bool:
        """Whether others will have its lengths, so that kernels may take time to plan for them."""
        return block.queries % self.recurring == 0 and block.keys % self.recurring == 0

    def block(self, q: slice, k: slice, offset: int) -> Block | None:
        """What rows q see of rows k, query i of them standing at key i + offset; None if they see nothing.

        Queries that see no key and keys that no query sees are left out.
        """
        queries, keys = q.stop - q.start, k.stop - k.start
        behind = None if self.window is None else self.window - 1
        ahead = 0 if self.causal else behind
        first = 0 if ahead is None else max(0, -offset - ahead)
        last = queries - 1 if behind is None else min(queries - 1, keys - 1 - offset + behind)
        nearest = 0 if behind is None else max(0, first + offset - behind)
        farthest = keys - 1 if ahead is None else min(keys - 1, last + offset + ahead)
        if first > last or nearest > farthest:
            return None
        slack = (farthest - nearest) - (last - first)  # S_k - S_q
        offset += first - nearest
        return Block(
            (q.start + first, q.start + last + 1),
            (k.start + nearest, k.start + farthest + 1),
            left=None if behind is None else behind + slack - offset,
            right=None if ahead is None else ahead - slack + offset,
        )


def join(blocks: list[Block]) -> list[Block]:
    """The same pairs of queries and keys in fewer blocks, given those of one document (one segment each)."""
    while True:
        for a in blocks:
            for b in blocks:
                if (joined := _join_full(a, b) or _join_triangles(a, b, blocks)) is not None:
                    whole, used = joined
                    blocks = [whole, *(x for x in blocks if x not in used)]
                    break
            else:
                continue
            break
        else:
            return blocks


def _join_full(a: Block, b: Block) -> tuple[Block, tuple[Block, ...]] | None:
    """Two full blocks side by side."""
    if a.is_full and b.is_full:
        if a.k == b.k and a.q[1] == b.q[0]:
            return Block((a.q[0], b.q[1]), a.k), (a, b)
        if a.q == b.q and a.k[1] == b.k[0]:
            return Block(a.q, (a.k[0], b.k[1])), (a, b)
    return None


def _join_triangles(a: Block, b: Block, blocks: list[Block]) -> tuple[Block, tuple[Block, ...]] | None:
    """Two triangles on the diagonal and the square below the first make a larger triangle."""
    if a.is_triangle and b.is_triangle and a.q[1] == b.q[0] and a.k[1] == b.k[0]:
        for square in blocks:
            if square.is_full and square.q == b.q and square.k == a.k:
                return Block((a.q[0], b.q[1]), (a.k[0], b.k[1]), right=0), (a, square, b)
    return None


def string(blocks: list[Block]) -> list[Block]:
    """Blocks that follow each other, in queries and in keys, and are masked alike, as segments of one."""
    runs: list[list[Block]] = []
    for block in blocks:
        if runs and _continues(block, runs[-1][-1]):
            runs[-1].append(block)
        else:
            runs.append([block])
    return [replace(run[0], q=_strung(block.q for block in run), k=_strung(block.k for block in run)) for run in runs]


def _continues(block: Block, last: Block) -> bool:
    follows = (last.q[-1], last.k[-1]) == (block.q[0], block.k[0])
    return follows and (last.left, last.right) == (block.left, block.right)


def _strung(cuts: Iterator[tuple[int, ...]]) -> tuple[int, ...]:
    """Those of segments that follow each other."""
    first = next(cuts)
    return *first, *(cut for rest in cuts for cut in rest[1:])
