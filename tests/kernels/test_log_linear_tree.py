"""The tree over leaves: what its tables say of random segments, node by node."""

import pytest
import torch

tree = pytest.importorskip("lasp.kernels.triton.log_linear.tree")
LEAF, LOG_LEAF = 16, 4


def drawn(gen):
    """Offsets of segments, and what their documents have had before."""

    def number(most: int) -> int:
        return int(torch.randint(0, most + 1, (), generator=gen))

    lengths = [(0, 1, 16, 17, number(50), number(400))[number(5)] for _ in range(number(3) + 1)]
    seen = [(0, 0, 3, 16, number(500))[number(4)] for _ in lengths]
    return [0, *torch.tensor(lengths).cumsum(0).tolist()], seen


def test_tables_of_random_segments(gen):
    for _ in range(40):
        offsets, seen = drawn(gen)
        check(offsets, seen)


def check(offsets: list[int], seen: list[int]) -> None:
    after = [had + stop - start for had, start, stop in zip(seen, offsets, offsets[1:], strict=False)]
    slots = max(after).bit_length()
    made = tree._tree(tuple(offsets), tuple(seen), slots, LEAF, 2, torch.device("cpu"))
    start, skipped, stop, index, owner, counts, under = made.leaves.tolist()
    count, first_piece, first_of_run = made.tiles.count, made.pieces[0].tolist(), made.pieces[1].tolist()
    leaves = {leaf: [leaf] for leaf in range(count)}  # of every node
    pairs = {}
    for row in made.heights:
        for i, (left, right, *rest) in enumerate(row.table.T.tolist()):
            pairs[row.first + i] = (row.height, left, right, *rest)
            leaves[count + row.first + i] = leaves[left] + leaves[right]

    def nearest(node: int) -> int:
        around = [(len(leaves[pair[1]]), n) for n, pair in pairs.items() if set(leaves[node]) <= set(leaves[pair[1]])]
        return min(around)[1] if around else tree.NONE

    tokens = [start[m] + place for m in range(count) for place in range(skipped[m], stop[m])]
    assert tokens == list(range(offsets[-1]))
    for leaf in range(count):
        earlier = []
        for pair, height in zip(made.seen_pairs[leaf], made.seen_heights[leaf, : counts[leaf]].tolist(), strict=False):
            assert pairs[int(pair)][0] == height
            left = leaves[pairs[int(pair)][1]]
            assert all((index[leaf] ^ index[other]).bit_length() == height + 1 for other in left)
            earlier += left
        assert sorted(earlier) == list(range(owner.index(owner[leaf]), leaf))
        assert under[leaf] == nearest(leaf)
    for number, (height, _, right, above, leaf, length, piece, pieces, slot) in pairs.items():
        run = leaves[right]
        assert run == list(range(leaf, leaf + length)) and above == nearest(count + number)
        rest = [first_piece[p] + i for p in range(piece, piece + pieces) for i in range(first_of_run[p])]
        assert rest == run
        for p in range(piece, piece + pieces):
            origin = int(made.pieces[2, p])
            assert {(index[m] * LEAF ^ origin).bit_length() for m in run} == {LOG_LEAF + height + 1}
        segment = owner[run[0]]
        at_end = int(made.last[segment]) in run
        assert slot == (segment * slots + LOG_LEAF + height if at_end else tree.NONE)
    for segment, slot, *_, to in made.incoming.T.tolist():
        first = seen[segment] >> slot + 1 << slot + 1
        assert seen[segment] >> slot & 1 and to == (after[segment] ^ first).bit_length() - 1
    for segment, root in enumerate(made.roots.tolist()):
        assert leaves[root] == [m for m in range(count) if owner[m] == segment]
