"""Which strategy is likely the fastest: the time of attention, and of the transfers that it does not hide.

A model of one layer, forward and backward, of bf16 tensors and fp32 gradients on the way, with the links of
`lasp.parallel.cost`. It need not be accurate, for the strategies are often far apart.
"""

from dataclasses import dataclass
from math import ceil, gcd

from lasp.parallel.cost import Links

FLOPS = 500e12  # a second; fused attention on an H200, roughly
HALF, FULL = 2, 4  # bytes of a number in bf16 and in fp32
GATHERS = 4  # at most so many gathers, of a share of the heads each
BACKWARD = 2.5  # times the FLOPs of forward


def inner_size(kv_heads: int, ranks: int) -> int:
    """The ranks that exchange heads in "ulysses_ring": as many as divide both the key/value heads and the ranks."""
    return gcd(kv_heads, ranks)


@dataclass(frozen=True)
class Layer:
    """What is computed. tokens: of each of the ranks. balanced: every rank has as many pairs of queries and keys."""

    q_heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    ranks: int
    causal: bool = True
    window: int | None = None
    balanced: bool = True

    @property
    def kv(self) -> int:
        """Numbers in one rank's k and v."""
        return 2 * self.tokens * self.kv_heads * self.head_dim

    @property
    def q(self) -> int:
        return self.tokens * self.q_heads * self.head_dim

    def compute(self, groups: int) -> float:
        """Seconds on the rank with the most work, if the tokens are divided among `groups` groups of ranks."""
        whole = self.tokens * self.ranks
        seen = whole / 2 if self.causal else whole
        if self.window is not None:
            seen = min(seen, self.window if self.causal else 2 * self.window)
        uneven = self.causal and self.window is None and not self.balanced
        share = 2 - 1 / groups if uneven else 1  # the last group sees everything
        return (1 + BACKWARD) * 4 * self.q * seen * share / FLOPS

    def ring(self, links: Links, groups: int) -> float:
        """With a window, keys skip the groups that see nothing of them."""
        reach = groups if self.window is None else 2 * ceil(self.window * groups / (self.tokens * self.ranks))
        hops, compute = min(groups - 1, reach), self.compute(groups)
        there = 2 * links.message.seconds(self.kv * HALF)  # in forward and in backward
        back = links.message.seconds(self.kv * FULL)
        hidden = hops * max(0.0, there + back - compute / (hops + 1))
        return compute + hidden + (back if hops else 0.0)

    def all_gather(self, links: Links) -> float:
        """All but the first share of the heads, and in backward the last, is hidden."""
        shares, compute = min(GATHERS, self.kv_heads), self.compute(self.ranks)
        numbers = (self.ranks - 1) * self.kv / shares
        share = 2 * links.all_gather.seconds(numbers * HALF) + links.all_gather.seconds(numbers * FULL)
        return compute + share + (shares - 1) * max(0.0, share - compute / shares)

    def all_to_all(self, links: Links, inner: int) -> float:
        """q, k, v, o and their gradients; none of it is hidden."""
        return 2 * sum(
            links.message.seconds(numbers * HALF * (inner - 1) / inner) for numbers in (self.q + self.kv, self.q)
        )


def choose(layer: Layer, links: Links) -> str:
    """The strategy that takes the least time; the first one of equals."""
    inner = inner_size(layer.kv_heads, layer.ranks)
    seconds = {"ring": layer.ring(links, layer.ranks), "all_gather": layer.all_gather(links)}
    if inner == layer.ranks:
        seconds["ulysses"] = layer.all_to_all(links, inner) + layer.compute(1)
    elif inner > 1:
        seconds["ulysses_ring"] = layer.all_to_all(links, inner) + layer.ring(links, layer.ranks // inner)
    return min(seconds, key=seconds.__getitem__)
