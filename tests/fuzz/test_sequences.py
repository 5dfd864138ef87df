"""Who holds which tokens, for any lengths, documents and ranks; and operations of a sequence on one rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lasp.kernels import delta_rule, linear_attention, softmax_attention
from lasp.parallel import SequenceParallel
from lasp.parallel.layout import LAYOUTS, PADDING, Layout, Partition
from tests.parallel.inputs import error

offsets = st.lists(st.integers(0, 40), min_size=1, max_size=6).map(lambda lengths: [0, *accumulated(lengths)])
layouts = st.sampled_from(LAYOUTS)


def accumulated(lengths: list[int]) -> list[int]:
    """Ends of documents, of which one at least is not empty."""
    ends = torch.tensor([*lengths[:-1], lengths[-1] + 1]).cumsum(0)
    return ends.tolist()


@given(offsets, layouts, st.integers(1, 9), st.booleans(), st.integers(0, 3))
def test_every_token_has_one_place(offsets, layout, ranks, aligned, past):
    layout = Layout(layout, ranks)
    made = [Partition(layout, rank, offsets, aligned, past=past) for rank in range(ranks)]
    owners = sorted(unit for rank in range(ranks) for unit in layout.owned(rank))
    assert owners == list(range(layout.units))
    assert all(layout.owner(unit) == rank for rank in range(ranks) for unit in layout.owned(rank))
    length = made[0].unit_length
    assert length * layout.units >= offsets[-1]
    assert not aligned or layout.units == 1 or length & (length - 1) == 0
    seen = {}
    for partition in made:
        assert sum(map(len, partition.local)) == partition.local_tokens == length * layout.units_per_rank
        for (begin, end), last, first in zip(partition.ranges, partition.last, partition.first, strict=True):
            here = partition.local[first : last + 1]
            assert sum(map(len, here)) == end - begin
        for fragment in partition.local:
            for token in range(fragment.start, fragment.stop):
                seen[token] = fragment
                assert (fragment.document == PADDING) == (token >= offsets[-1])
                if fragment.document != PADDING:
                    begin, end = offsets[fragment.document : fragment.document + 2]
                    came_before = past if fragment.document == 0 else 0
                    assert begin <= token < end
                    assert fragment.position == fragment.start - begin + came_before
                    assert fragment.begins == (fragment.start == begin)
                    assert fragment.ends == (fragment.stop == end)
    assert sorted(seen) == list(range(length * layout.units))


@given(st.data(), offsets, layouts, st.booleans())
def test_one_rank_in_units(data, offsets, layout, packed):
    """What is sharded and put together again is what it was, and operations are those of the whole sequence."""
    tokens = offsets[-1]
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    cu_seqlens = torch.tensor(offsets) if packed else None
    batch = 1 if packed else data.draw(st.integers(1, 2))
    seq = SequenceParallel(None, layout=layout).sequence(tokens, cu_seqlens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, tokens, *shape, generator=gen, dtype=torch.float64)

    q, k, v, decay, beta = normal(2, 3), normal(2, 3), normal(2, 4), -normal(2).abs(), normal(2).sigmoid()
    k = torch.nn.functional.normalize(k, dim=-1)
    local = [seq.shard(x) for x in (q, k, v, decay, beta)]
    for x, y in zip((q, k, v, decay, beta), local, strict=True):
        assert torch.equal(seq.unshard(y), x)
    here = slice(None) if seq.valid.all() else seq.valid
    begins = (
        torch.zeros(tokens, dtype=torch.int64)
        if cu_seqlens is None
        else torch.tensor([max(x for x in offsets if x <= t) for t in range(tokens)])
    )
    assert torch.equal(seq.positions[here], seq.shard((torch.arange(tokens) - begins)[None])[0][here])
    o, _ = seq.linear_attention(*local[:3], local[3])
    assert error(seq.unshard(o), linear_attention(q, k, v, decay, cu_seqlens=cu_seqlens)[0]) < 1e-10
    o, _ = seq.delta_rule(*local[:3], local[4], local[3])
    assert error(seq.unshard(o), delta_rule(q, k, v, beta, decay, cu_seqlens=cu_seqlens)[0]) < 1e-10
    o = seq.softmax_attention(*local[:3])
    assert error(seq.unshard(o), softmax_attention(q, k, v, cu_seqlens=cu_seqlens)[0]) < 1e-10


WRONG = st.none() | st.booleans() | st.floats(allow_nan=True) | st.text(max_size=3) | st.integers(max_value=0)
BAD_OFFSETS = [
    lambda x: x.tolist(), lambda x: x.float(), lambda x: x + 1, lambda x: x[None], lambda x: x[:1], lambda x: x[:-1] - 1
]  # fmt: skip


@given(WRONG, offsets, layouts, st.sampled_from(BAD_OFFSETS))
def test_what_is_no_sequence_is_refused(wrong, offsets, layout, change):
    parallel = SequenceParallel(None, layout=layout)
    with pytest.raises(ValueError, match="tokens"):
        parallel.sequence(wrong)
    with pytest.raises(ValueError, match="cu_seqlens"):
        parallel.sequence(offsets[-1], change(torch.tensor(offsets)))
