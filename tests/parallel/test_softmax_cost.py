"""The choice of a strategy for softmax layers: only from what the heads allow, and sensible at the extremes."""

from lasp.parallel.cost import Costs
from lasp.parallel.softmax.cost import Layer, choose

LINKS = Costs().inside


def test_only_what_heads_allow():
    for kv_heads in (1, 2, 3, 8):
        for ranks in (2, 3, 4, 6, 8, 64):
            for tokens in (16, 4096, 1 << 20):
                for window in (None, 128):
                    name = choose(Layer(4 * kv_heads, kv_heads, 128, tokens, ranks, window=window), LINKS)
                    assert name != "ulysses" or kv_heads % ranks == 0
                    assert name != "ulysses_ring" or (min(kv_heads, ranks) > 1 and kv_heads % ranks)


def test_long_sequences_hide_a_ring():
    assert choose(Layer(32, 8, 128, 1 << 20, 8), LINKS) == "ring"


def test_a_ring_of_uneven_ranks_is_slower_than_heads():
    assert choose(Layer(32, 8, 128, 1 << 20, 8, balanced=False), LINKS) == "ulysses"


def test_short_sequences_take_few_large_transfers():
    assert choose(Layer(32, 8, 128, 64, 8), LINKS) == "ulysses"
    assert choose(Layer(32, 1, 128, 64, 64), LINKS) == "all_gather"
