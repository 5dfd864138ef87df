"""Which strategy is likely the fastest: bytes on the wire, less what the FLOPs of attention hide.

A model of one layer, forward and backward, of bf16 tensors and fp32 gradients on the way. Its constants stand for an
H200 in an NVLink node; only their ratio matters, and it need not be accurate, for the strategies are often far apart.
"""

from math import ceil, gcd

FLOPS = 450e12  # per second, of fused attention
BANDWIDTH = 150e9  # bytes per second in each direction
LATENCY = 40e-6  # seconds per transfer
HALF, FULL = 2, 4  # bytes of a number in bf16 and in fp32
GATHERS = 4  # shares of the heads in which an all-gather comes


def inner_size(kv_heads: int, ranks: int) -> int:
    """The ranks that exchange heads in "ulysses_ring": as many as divide both the key/value heads and the ranks."""
    return gcd(kv_heads, ranks)


def choose(q_heads: int, kv_heads: int, head_dim: int, tokens_per_rank: int, ranks: int, window: int | None) -> str:
    """The strategy with the least time that attention does not hide; the earlier one of "ring", … if equal."""
    if ranks == 1:
        return "ring"
    tokens = tokens_per_rank * ranks
    seen = tokens / 2 if window is None else min(tokens / 2, window)  # keys per query
    compute = 3.5 * 4 * tokens_per_rank * seen * q_heads * head_dim / FLOPS  # backward costs 2.5 times forward
    kv = 2 * tokens_per_rank * kv_heads * head_dim  # numbers in one rank's k and v
    q = tokens_per_rank * q_heads * head_dim

    def ring(outer: int) -> float:
        """A ring of `outer` steps; with a window the keys skip the ranks that see nothing of them."""
        length = tokens / outer
        hops = outer - 1 if window is None else min(outer - 1, 2 * ceil(window / length))
        transfer = LATENCY + kv * (2 * HALF + FULL) / BANDWIDTH  # k, v in forward and backward, and their gradients
        return hops * max(0.0, transfer - compute / (hops + 1)) + (LATENCY + kv * FULL / BANDWIDTH if hops else 0.0)

    def all_to_all(inner: int) -> float:
        """q, k, v, o and their gradients, none of it hidden."""
        return 4 * LATENCY + 2 * HALF * (2 * q + kv) * (inner - 1) / inner / BANDWIDTH

    gathered = (ranks - 1) * kv * (2 * HALF + FULL) / BANDWIDTH + 4 * GATHERS * LATENCY
    shares = min(GATHERS, kv_heads)
    costs = {
        "ring": ring(ranks),
        "all_gather": gathered / shares + max(0.0, gathered - compute) * (shares - 1) / shares,
    }
    inner = inner_size(kv_heads, ranks)
    if inner == ranks:
        costs["ulysses"] = all_to_all(ranks)
    elif inner > 1:
        costs["ulysses_ring"] = all_to_all(inner) + ring(ranks // inner)
    return min(costs, key=costs.__getitem__)
