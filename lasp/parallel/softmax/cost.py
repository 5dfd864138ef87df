"""Which strategy is likely the fastest: the time of attention, and of the transfers that it does not hide.

A model of one layer, forward and backward, of bf16 tensors and fp32 gradients on the way, with the links of
`lasp.parallel.cost`. It need not be accurate, for the strategies are often far apart.
"""

from dataclasses import dataclass
from math import gcd

from lasp.parallel.cost import Links
from lasp.parallel.softmax.plan import Plan

FLOPS = 500e12  # a second; fused attention on an H200, roughly
HALF, FULL = 2, 4  # bytes of a number in bf16 and in fp32
GATHERS = 4  # at most so many gathers, of a share of the heads each
BACKWARD = 2.5  # times the FLOPs of forward


def inner_size(kv_heads: int, ranks: int) -> int:
    """The ranks that exchange heads in "ulysses_ring": as many as divide both the key/value heads and the ranks."""
    return gcd(kv_heads, ranks)


@dataclass(frozen=True)
class Layer:
    """What is computed. tokens: of each of the ranks. plans: by how many ranks exchange heads, 1 and `inner_size`."""

    q_heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    ranks: int
    plans: dict[int, Plan]

    @property
    def kv(self) -> int:
        """Numbers in one rank's k and v."""
        return 2 * self.tokens * self.kv_heads * self.head_dim

    @property
    def q(self) -> int:
        return self.tokens * self.q_heads * self.head_dim

    def compute(self, inner: int) -> float:
        """Seconds on the rank with the most work."""
        return (1 + BACKWARD) * 4 * self.plans[inner].busiest * self.q_heads / inner * self.head_dim / FLOPS

    def ring(self, links: Links, inner: int) -> float:
        """All but the last step of the gradients' way home is hidden, if attention takes long enough."""
        hops, compute = len(self.plans[inner].steps) - 1, self.compute(inner)
        if not hops:
            return compute
        there = 2 * links.message.seconds(self.kv * HALF)  # in forward and in backward
        back = links.message.seconds(self.kv * FULL)
        return compute + hops * max(0.0, there + back - compute / (hops + 1)) + back

    def all_gather(self, links: Links) -> float:
        """All but the first share of the heads, and in backward the last, is hidden."""
        shares, compute = min(GATHERS, self.kv_heads), self.compute(1)
        numbers = (self.ranks - 1) * self.kv / shares
        share = 2 * links.all_gather.seconds(numbers * HALF) + links.all_gather.seconds(numbers * FULL)
        return compute + share + (shares - 1) * max(0.0, share - compute / shares)

    def all_to_all(self, links: Links, inner: int) -> float:
        """q, k, v, o and their gradients; none of it is hidden."""
        away = HALF * (inner - 1) / inner
        return 2 * (links.message.seconds((self.q + self.kv) * away) + links.message.seconds(self.q * away))


def choose(layer: Layer, links: Links) -> str:
    """The strategy that takes the least time; the first one of equals."""
    inner = max(layer.plans)
    seconds = {"ring": layer.ring(links, 1), "all_gather": layer.all_gather(links)}
    if inner > 1:
        name = "ulysses" if inner == layer.ranks else "ulysses_ring"
        seconds[name] = layer.all_to_all(links, inner) + layer.ring(links, inner)
    return min(seconds, key=seconds.__getitem__)
