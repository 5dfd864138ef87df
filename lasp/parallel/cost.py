"""What an exchange costs, from latency and bandwidth: how `auto` chooses, and how a scan is cut (math §3).

    all_gather         α + (W - 1) X / β
    symmetric_memory   α + (W - 1) X / β        of peer writes; the ranks of one machine only
    scan               (W + P - 2) (α + X / (P β))        P blocks of the state; zigzag: once up and once down
    hierarchical       an all-gather in each node of n ranks, a scan of X / n across nodes, an all-gather of X / n

X is what one rank sends: its units' states, and for the first two the transitions, too. Seconds, bytes, bytes a second.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lasp.names import ExchangeName

CALIBRATION = Path.home() / ".cache" / "lasp" / "links.json"


@dataclass(frozen=True)
class Link:
    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        for field, got in asdict(self).items():
            if not (math.isfinite(got) and got > 0):
                raise ValueError(f"{field}: got {got!r}, expected a finite number above 0")

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bandwidth

    @classmethod
    def fit(cls, sizes: list[int], seconds: list[float]) -> "Link":
        """From times at several sizes: the latency is that of the smallest, the bandwidth that of the largest."""
        small, large = min(range(len(sizes)), key=sizes.__getitem__), max(range(len(sizes)), key=sizes.__getitem__)
        extra = max(seconds[large] - seconds[small], 1e-9)
        return cls(seconds[small], (sizes[large] - sizes[small]) / extra)


@dataclass(frozen=True)
class Links:
    """One kind of link: how its all-gather, its messages from rank to rank, and (inside a node) its peer writes go."""

    all_gather: Link
    message: Link
    peer_write: Link | None = None


@dataclass(frozen=True)
class Costs:
    """The links inside a node and across nodes. Inside, the defaults were measured on two H200 (NVLink, NCCL), most of
    them in CUDA graphs; across, they stand for one 400 Gb/s port a GPU and were not measured."""

    inside: Links = Links(Link(21e-6, 245e9), Link(21e-6, 320e9), Link(6e-6, 262e9))
    across: Links = Links(Link(60e-6, 40e9), Link(50e-6, 45e9))

    @property
    def measured_across(self) -> bool:
        """Whether calibration has replaced the guess."""
        return self.across != Costs().across

    def links(self, ranks: int, node: int) -> Links:
        """Those that bind so many ranks, of which `node` share a machine."""
        return self.inside if ranks == node else self.across

    def save(self, path: Path = CALIBRATION) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path = CALIBRATION) -> "Costs":
        """What calibration wrote, or the defaults if there is no such file. ValueError for a file that is not one."""
        if not path.exists():
            return cls()
        try:
            sides: dict[str, dict[str, Any]] = json.loads(path.read_text())
            for links in sides.values():
                links.update({name: Link(**link) for name, link in links.items() if link is not None})
            return cls(**{side: Links(**links) for side, links in sides.items()})
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: got {error}, expected what calibration writes") from error


@dataclass(frozen=True)
class Message:
    """What one rank sends for an exchange. state, transition: bytes of all its units. ways: 2 for zigzag."""

    state: int
    transition: int = 0
    ways: int = 1


def seconds(name: str, links: Links, message: Message, ranks: int) -> float:
    """The time of one exchange; infinite if these links have no such thing."""
    if ranks == 1:
        return 0.0
    if name == "scan":
        return scan_seconds(links.message, message, ranks, blocks(links.message, message, ranks))
    link = links.all_gather if name == "all_gather" else links.peer_write
    if link is None:
        return math.inf
    return link.seconds((ranks - 1) * (message.state + message.transition))


def scan_seconds(link: Link, message: Message, ranks: int, blocks: int) -> float:
    """(W + P - 2) steps of one block; each way carries one unit's state."""
    return message.ways * (ranks + blocks - 2) * link.seconds(message.state / message.ways / blocks)


def blocks(link: Link, message: Message, ranks: int, most: int = 64) -> int:
    """The number of blocks that makes a scan fastest: P² = (W - 2) X / (α β)."""
    best = math.sqrt(max(0, ranks - 2) * message.state / message.ways / (link.latency * link.bandwidth))
    around = {min(max(1, p), most) for p in (math.floor(best), math.ceil(best))}
    return min(around, key=lambda p: scan_seconds(link, message, ranks, p))


def hierarchical_seconds(costs: Costs, message: Message, ranks: int, node: int) -> float:
    """All-gather in the node, scan of a share of the state across nodes, all-gather of the shares."""
    share, nodes = Message(message.state // node, ways=message.ways), ranks // node
    inside = sum(seconds("all_gather", costs.inside, part, node) for part in (message, share))
    return inside + seconds("scan", costs.across, share, nodes)


def candidates(costs: Costs, ranks: int, node: int) -> tuple[ExchangeName, ...]:
    """What `auto` chooses from: across nodes, the all-gather alone until somebody has measured their links."""
    if node == ranks:
        return "symmetric_memory", "all_gather", "scan"
    if not costs.measured_across:
        return ("all_gather",)
    return ("all_gather", "scan", "hierarchical") if node > 1 else ("all_gather", "scan")


def choose(costs: Costs, message: Message, ranks: int, node: int, names: tuple[str, ...]) -> str:
    """The fastest of the exchanges, given how many ranks share a machine; the first of equals."""

    def cost(name: str) -> float:
        if name == "hierarchical":
            return hierarchical_seconds(costs, message, ranks, node)
        return seconds(name, costs.links(ranks, node), message, ranks)

    return min(names, key=cost)
