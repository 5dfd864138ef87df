"""The choice of a strategy for softmax layers: only from what the heads allow, and sensible at the extremes."""

from lasp.kernels.blocks import Mask
from lasp.parallel.cost import Costs
from lasp.parallel.layout import Layout, Partition
from lasp.parallel.softmax.cost import Layer, choose, inner_size
from lasp.parallel.softmax.plan import coarsen, make_plan


def chosen(
    kv_heads: int,
    tokens: int,
    ranks: int,
    layout: str = "zigzag",
    window: int | None = None,
    documents: tuple[float, ...] = (),
) -> str:
    """For four times as many heads of q, of 128; `tokens` of each rank; documents begin at these shares of them all."""
    offsets = [0, *(int(share * tokens * ranks) for share in documents), tokens * ranks]
    partition, mask = Partition(Layout(layout, ranks), 0, offsets), Mask(1.0, window=window)
    plans = {inner: make_plan(coarsen(partition, inner), mask) for inner in (1, inner_size(kv_heads, ranks))}
    return choose(Layer(4 * kv_heads, kv_heads, 128, tokens, ranks, plans), Costs().inside)


def test_only_what_heads_allow():
    for kv_heads in (1, 2, 3, 8):
        for ranks in (2, 3, 4, 6, 8):
            for tokens in (16, 4096, 1 << 20):
                for window in (None, 128):
                    name = chosen(kv_heads, tokens, ranks, window=window)
                    assert name != "ulysses" or kv_heads % ranks == 0
                    assert name != "ulysses_ring" or (min(kv_heads, ranks) > 1 and kv_heads % ranks)


def test_long_sequences_hide_a_ring():
    assert chosen(8, 1 << 20, 8) == "ring"


def test_uneven_ranks_share_heads():
    assert chosen(8, 1 << 17, 8, layout="contiguous") == "ulysses"
    assert chosen(8, 1 << 17, 8, documents=(0.1, 0.2, 0.3, 0.5)) == "ulysses"


def test_short_sequences_take_few_large_transfers():
    assert chosen(8, 64, 8) == "ulysses"
    assert chosen(1, 64, 64) == "all_gather"
