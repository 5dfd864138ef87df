"""The tree over the leaves of every segment (lasp.kernels.leaves) as tables on the device."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.fenwick import level, occupied, starts
from lasp.kernels.lasting import kept
from lasp.kernels.leaves import NONE, Height, cut, heights
from lasp.kernels.log_linear_inputs import LogLinearInputs
from lasp.kernels.parked import to_device
from lasp.kernels.segments import Tiles


class Pairs(NamedTuple):
    """The siblings of one height, whose numbers begin at `first`.

    table: [8, pairs] int32: left and right node; the nearest pair whose left node the parent is in, or NONE; the right
    node's first leaf and how many it has, its first piece and how many it has; which final slot the left node is, as a
    row of [N · J], or NONE.
    """

    first: int
    height: int
    table: Tensor


@dataclass(frozen=True)
class Tree:
    """Of N segments in M leaves with P pairs of siblings; tensors are on the device, int32 unless said.

    leaf: tokens of a leaf; slots: J; tiles: the tokens of every leaf.
    leaves: [7, M] where a leaf begins in the flat tokens (maybe before its segment); how many of its places lie before
        the first token, and behind which there are none; where it stands in its document; its segment; how many pairs
        its queries see; the nearest pair whose left node it is in, or NONE.
    seen_pairs, seen_heights: [M, heights] those pairs, nearest first.
    pieces: [3, Q] runs of leaves whose queries one program sums up: first leaf, leaves, and where in the document that
        begins which they see. They are the right nodes of all pairs, then each segment once for every initial slot.
    lefts, first_pieces: [P] of every pair the left node, and the first piece of the right one; pair_pieces: how many
        pieces pairs have.
    incoming: [5, I] of every initial slot segment, slot, first piece, how many it has, and the final slot that it is
        part of; they are in the order of segments, and incoming_first [N + 1] says where those of each begin.
    initial: [3, I] int64 of each of them segment, slot, and the final slot.
    final: [4, F] int64 of every final slot that is a node segment, slot, node and pair.
    nearer: [F, F] fp32 where the second is of the same segment and a lower slot, so that it is behind the first: 1.
    before, last, roots: [N] what each segment's document has had before it; its last leaf; the node of all its leaves.
    """

    leaf: int
    slots: int
    tiles: Tiles
    leaves: Tensor
    seen_pairs: Tensor
    seen_heights: Tensor
    heights: tuple[Pairs, ...]
    pieces: Tensor
    lefts: Tensor
    first_pieces: Tensor
    pair_pieces: int
    incoming: Tensor
    incoming_first: Tensor
    initial: Tensor
    final: Tensor
    nearer: Tensor
    before: Tensor
    last: Tensor
    roots: Tensor

    @property
    def pairs(self) -> int:
        return sum(pairs.table.shape[1] for pairs in self.heights)


def tree_of(x: LogLinearInputs, leaf: int, piece: int) -> Tree:
    """leaf: tokens of a leaf, a power of two. piece: leaves of a piece, at most."""
    offsets, seen = tuple(x.segments.offsets.tolist()), x.seen
    return _tree(offsets, seen, x.state_shape[1], leaf, piece, x.v.device)


@kept(64)
def _tree(
    offsets: tuple[int, ...], seen: tuple[int, ...], slots: int, leaf: int, piece: int, device: torch.device
) -> Tree:
    offset, before = torch.tensor(offsets, device="cpu"), torch.tensor(seen, device="cpu")
    after = before + offset.diff()
    leaves = cut(offset, before, leaf)
    start, skipped, stop, index, owner, first = leaves
    count, last, counts = len(owner), leaves.last, first.diff()
    levels, roots = heights(leaves)
    left, right, right_leaf, right_leaves, origin = (
        torch.cat([height[i] for height in levels]) if levels else owner[:0] for i in range(5)
    )
    numbers = torch.arange(len(left), device="cpu")
    home = torch.full((count + len(left),), NONE, device="cpu")
    for pair in _by_height(numbers, levels)[::-1]:
        home[left[pair]], home[right[pair]] = pair, home[count + pair]

    sees = torch.stack([height.seen for height in levels], 1) if levels else index[:, None][:, :0]
    seen_heights = (sees == NONE).int().argsort(dim=1, stable=True)
    segment, height = (sees[last] != NONE).nonzero(as_tuple=True)
    final_pair, final_slot = sees[last][segment, height], height + leaf.bit_length() - 1
    slot = torch.full_like(numbers, NONE).index_put((final_pair,), segment * slots + final_slot)
    nearer = (segment[:, None] == segment[None, :]) & (final_slot[:, None] > final_slot[None, :])

    held = occupied(before, slots)
    incoming, incoming_origin = held.nonzero().T, starts(before, slots)[held]
    incoming_first = torch.cat([first[:1], held.sum(1).cumsum(0)])
    to = level(after[incoming[0]], incoming_origin) - 1
    of_pieces, pieces = _pieces(
        torch.cat([right_leaf, first[incoming[0]]]),
        torch.cat([right_leaves, counts[incoming[0]]]),
        torch.cat([origin * leaf, incoming_origin]),
        piece,
    )
    table = torch.stack([left, right, home[count:], right_leaf, right_leaves, *of_pieces[:, : len(left)], slot])

    def moved(*rows: Tensor) -> Tensor:
        return to_device(torch.stack(rows).int(), device)

    tiles = ((start + skipped).where(stop > skipped, 0), (stop - skipped).int(), owner.int(), first.int())
    return Tree(
        leaf=leaf,
        slots=slots,
        tiles=Tiles(leaf, count, *(to_device(part, device) for part in tiles)),
        leaves=moved(start, skipped, stop, index, owner, (sees != NONE).sum(1), home[:count]),
        seen_pairs=moved(*sees.gather(1, seen_heights)),
        seen_heights=moved(*seen_heights),
        heights=tuple(
            Pairs(int(pair[0]), h, moved(*table[:, pair]))
            for h, pair in enumerate(_by_height(numbers, levels))
            if len(pair)
        ),
        pieces=moved(*pieces),
        lefts=to_device(left.int(), device),
        first_pieces=to_device(of_pieces[0, : len(left)], device),
        pair_pieces=int(of_pieces[1, : len(left)].sum()),
        incoming=moved(*incoming, *of_pieces[:, len(left) :], to),
        incoming_first=to_device(incoming_first.int(), device),
        initial=to_device(torch.stack([*incoming, to]), device),
        final=to_device(torch.stack([segment, final_slot, left[final_pair], final_pair]), device),
        nearer=to_device(nearer.float(), device),
        before=to_device(before.int(), device),
        last=to_device(last, device),
        roots=to_device(roots, device),
    )


def _by_height(numbers: Tensor, heights: Iterable[Height]) -> list[Tensor]:
    """The numbers of the pairs of each height."""
    return list(numbers.split([len(height.left) for height in heights]))


def _pieces(first: Tensor, leaves: Tensor, origin: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Runs of leaves cut into pieces of at most `most`: [2, runs] the first piece of each and how many it has, and
    [3, pieces] first leaf, leaves and origin of each."""
    counts = (leaves + most - 1) // most
    begins = counts.cumsum(0) - counts
    run = torch.repeat_interleave(counts)
    passed = (torch.arange(len(run), device="cpu") - begins[run]) * most
    pieces = torch.stack([first[run] + passed, (leaves[run] - passed).clamp(max=most), origin[run]])
    return torch.stack([begins, counts]), pieces
