"""Plays the schedules of the state exchanges for up to thousands of ranks and draws how long they take.

    python benchmarks/simulate.py                        draws docs/exchange-scaling.png
    python benchmarks/simulate.py --costs links.json     with what `benchmarks/exchange.py --calibrate` wrote

Every message is played: it begins when what it carries is there and its link is free. Nodes have `node` GPUs each, and
a link between neighbours is one inside a node or one across nodes. Times leave out the combining.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from lasp.parallel.cost import Costs, Link, Message, blocks

Schedule = Callable[[Costs, Message, int, int], float]


@dataclass(frozen=True, kw_only=True)
class Settings:
    ranks: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    mebibytes: tuple[float, ...] = (1, 8)  # what one rank sends: 1 is a layer of 16 heads of 128 x 128
    node: int = 8
    costs: Path | None = None  # the defaults of lasp.parallel.cost if None
    output: Path = Path("docs/exchange-scaling.png")


def hops(costs: Costs, ranks: int, node: int, kind: str) -> list[Link]:
    """The link from rank r to r + 1, and last the one that closes the circle."""
    inside, across = getattr(costs.inside, kind), getattr(costs.across, kind)
    return [inside if r // node == (r + 1) % ranks // node else across for r in range(ranks)]


def all_gather(costs: Costs, message: Message, ranks: int, node: int) -> float:
    """A circle: in each of W - 1 rounds every rank hands on what it got in the round before."""
    links = hops(costs, ranks, node, "all_gather")
    size = message.state + message.transition
    transfer = np.array([size / link.bandwidth for link in links])
    has = np.full(ranks, max(link.latency for link in links))  # when each rank has what it hands on next
    free = has.copy()
    for _ in range(ranks - 1):
        free = np.maximum(has, free) + transfer
        has = np.roll(free, 1)
    return float(has.max())


def scan(costs: Costs, message: Message, ranks: int, node: int, count: int | None = None) -> float:
    """Blocks follow each other from rank to rank; zigzag lets them come back when the last has arrived."""
    links = hops(costs, ranks, node, "message")[:-1]
    if count is None:
        slowest = max(links, key=lambda link: link.seconds(message.state))
        count = blocks(slowest, message, ranks)
    there = [0.0] * count
    for way in range(message.ways):
        there = [there[-1]] * count if way else there
        for link in links[:: -1 if way else 1]:
            free, step = 0.0, link.seconds(message.state / message.ways / count)
            for b in range(count):
                free = there[b] = max(there[b], free) + step
    return there[-1]


def ring(costs: Costs, message: Message, ranks: int, node: int) -> float:
    return scan(costs, message, ranks, node, count=1)


def peer_writes(costs: Costs, message: Message, ranks: int, node: int) -> float:
    """Each rank writes its message to one after the other; not a number beyond one node."""
    link = costs.inside.peer_write
    if ranks > node or link is None:
        return float("nan")
    return link.latency + sum((message.state + message.transition) / link.bandwidth for _ in range(ranks - 1))


def hierarchical(costs: Costs, message: Message, ranks: int, node: int) -> float:
    """All-gathers in the nodes, and a scan across them of each rank's share."""
    node = min(node, ranks)
    share = Message(message.state // node, ways=message.ways)
    inside = sum(all_gather(costs, part, node, node) for part in (message, share)) if node > 1 else 0.0
    return inside + (scan(costs, share, ranks // node, 1) if ranks > node else 0.0)


SCHEDULES: dict[str, Schedule] = {
    "all_gather": all_gather,
    "ring": ring,
    "scan": scan,
    "hierarchical": hierarchical,
    "symmetric_memory": peer_writes,
}


def main(settings: Settings) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    costs = Costs() if settings.costs is None else Costs.read(settings.costs)
    figure, axes = plt.subplots(1, len(settings.mebibytes), figsize=(5 * len(settings.mebibytes), 4), sharey=True)
    for ax, size in zip(np.atleast_1d(axes), settings.mebibytes, strict=True):
        message = Message(int(size * 2**20))
        print(f"{size:g} MiB a rank, microseconds")
        for name, schedule in SCHEDULES.items():
            times = [1e6 * schedule(costs, message, ranks, settings.node) for ranks in settings.ranks]
            print(f"  {name:17}", *(f"{ranks}: {time:.0f}" for ranks, time in zip(settings.ranks, times, strict=True)))
            ax.plot(settings.ranks, times, marker="o", markersize=3, label=name)
        ax.set(xscale="log", yscale="log", xlabel="ranks", title=f"{size:g} MiB a rank, nodes of {settings.node}")
        ax.set_xscale("log", base=2)
        ax.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("µs an exchange (simulated)")
    np.atleast_1d(axes)[0].legend()
    figure.tight_layout()
    figure.savefig(settings.output, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
