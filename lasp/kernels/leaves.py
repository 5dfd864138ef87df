"""Segments of documents as leaves of binary trees over positions (math §4): arithmetic on the host.

A leaf is a run of tokens that begins where `size`, a power of two, divides the position. So all pairs of tokens in it
have levels up to log2(size), and what its tokens see of earlier leaves at one level is a node: the left sibling of the
node of that height that the leaf lies in. The last leaf of a segment is that in which the next token would stand, so it
may be empty; what it sees of others are final slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NONE = -1


class Leaves(NamedTuple):
    """Of N segments in M leaves: where a leaf begins in the flat tokens (maybe before its segment), how many of its
    places lie before the first token, behind which there are none, where it stands in its document, its segment, [M];
    and first [N + 1], those of segment n being first[n] … first[n + 1] - 1."""

    start: Tensor
    skipped: Tensor
    stop: Tensor
    number: Tensor
    owner: Tensor
    first: Tensor

    @property
    def last(self) -> Tensor:
        """[N] the last leaf of each segment."""
        return self.first[1:] - 1


def cut(offsets: Tensor, before: Tensor, size: int) -> Leaves:
    """offsets: [N + 1] of segments in the flat tokens. before: [N] how many tokens their documents have had."""
    after = before + offsets.diff()
    counts = after // size - before // size + 1
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    owner = torch.repeat_interleave(counts)
    index = torch.arange(len(owner), device="cpu") + (before // size - first[:-1])[owner]
    skipped, stop = ((edge[owner] - index * size).clamp(0, size) for edge in (before, after))
    return Leaves((offsets[:-1] - before)[owner] + index * size, skipped, stop, index, owner, first)


class Height(NamedTuple):
    """The siblings of one height. Nodes 0 … M - 1 are the leaves, node M + i is the parent of pair i; a node without a
    sibling in its segment counts as its parent, too.

    left, right: [pairs] nodes. leaf, leaves: [pairs] the right node's first leaf and how many it has. origin: [pairs]
    where in the document the left node begins, in leaves. seen: [M] the pair whose left node a leaf's tokens see, or
    NONE.
    """

    left: Tensor
    right: Tensor
    leaf: Tensor
    leaves: Tensor
    origin: Tensor
    seen: Tensor


def heights(leaves: Leaves) -> tuple[list[Height], Tensor]:
    """From the leaves up, until there is one node in each segment; and those nodes, [N]."""
    owner, index, segments = leaves.owner, leaves.number, len(leaves.first) - 1
    found: list[Height] = []
    count, pairs = len(owner), 0
    node = leaf = row_of_leaf = torch.arange(count, device="cpu")
    length = torch.ones_like(node)
    while len(owner) > segments:
        joins = (owner[1:] == owner[:-1]) & (index[1:] >> 1 == index[:-1] >> 1)
        left = joins.nonzero()[:, 0]
        right = left + 1
        pair = pairs + torch.arange(len(left), device="cpu")
        seen = torch.full_like(node, NONE).index_put((right,), pair)[row_of_leaf]
        origin = index[left] << len(found)
        found.append(Height(node[left], node[right], leaf[right], length[right], origin, seen))
        pairs += len(left)
        kept = torch.ones_like(node, dtype=torch.bool).index_put((right,), torch.tensor(False, device="cpu"))
        node = node.index_put((left,), count + pair)[kept]
        length = length.index_put((left,), length[right], accumulate=True)[kept]
        row_of_leaf = (kept.cumsum(0) - 1)[row_of_leaf]
        owner, index, leaf = owner[kept], index[kept] >> 1, leaf[kept]
    return found, node
