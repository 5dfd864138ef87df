"""Loss and perplexity by a token's position in its document: does the model use what is far away?"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lasp.evaluation.reading import Reading, by_group
from lasp.evaluation.results import aligned
from lasp.evaluation.score import Scores
from lasp.evaluation.subject import Subject
from lasp.pictures import empty_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PER_OCTAVE = 4  # intervals of positions


@dataclass(frozen=True, kw_only=True)
class LossByPosition(Reading):
    """Loss and perplexity by position in the document, on token files or texts."""

    def run(self, subject: Subject) -> "PositionResult":
        """Raises ValueError if there is nothing with a label, or if data or a length is missing."""
        edges = interval_edges(self.length(subject))
        borders = torch.tensor(edges[1:-1], device=subject.world.device)

        def scored() -> Iterator[tuple[Tensor, Scores]]:
            for batch, scores in subject.scores(self.read(subject)):
                positions = batch.seq.positions.to(borders.device)[scores.places[:, 1]]
                yield torch.bucketize(positions, borders, right=True), scores

        found = zip(pairwise(edges), by_group(subject, len(edges) - 1, scored()), strict=True)
        return PositionResult([Interval(first=first, last=stop - 1, **of) for (first, stop), of in found if of])


def interval_edges(length: int) -> list[int]:
    """0, 1, 2 … length, four to each doubling."""
    steps = range(math.ceil(PER_OCTAVE * math.log2(length)) + 1)
    return sorted({0, *(min(length, round(2 ** (step / PER_OCTAVE))) for step in steps), length})


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Of tokens at positions first to last, from which the next one is predicted. Loss in nats per token."""

    first: int
    last: int
    labels: int
    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@dataclass(frozen=True)
class PositionResult:
    intervals: list[Interval]

    @property
    def loss(self) -> float:
        """Of all labels."""
        labels = sum(interval.labels for interval in self.intervals)
        return sum(interval.labels * interval.loss for interval in self.intervals) / labels

    def record(self) -> dict[str, Any]:
        each = [asdict(interval) | {"perplexity": interval.perplexity} for interval in self.intervals]
        return {"loss": self.loss, "perplexity": math.exp(self.loss), "positions": each}

    def table(self) -> str:
        rows = [["positions", "labels", "loss", "perplexity", "accuracy (%)"]]
        for i in self.intervals:
            where = f"{i.first:,}" if i.first == i.last else f"{i.first:,} to {i.last:,}"
            rows.append([where, f"{i.labels:,}", f"{i.loss:.4f}", f"{i.perplexity:.3f}", f"{100 * i.accuracy:.1f}"])
        total = sum(i.labels for i in self.intervals)
        right = sum(i.labels * i.accuracy for i in self.intervals) / total
        rows.append(["all", f"{total:,}", f"{self.loss:.4f}", f"{math.exp(self.loss):.3f}", f"{100 * right:.1f}"])
        return aligned(rows)

    def figure(self) -> "Figure":
        figure = empty_figure(7, 4.5)
        axes = figure.add_subplot(xlabel="position in the document", ylabel="loss (nats per token)", xscale="log")
        middles = [(i.first + i.last) / 2 + 1 for i in self.intervals]
        axes.plot(middles, [i.loss for i in self.intervals], marker=".")
        axes.axhline(self.loss, linestyle="--", color="grey", label="all positions")
        axes.legend()
        axes.grid(alpha=0.3)
        return figure
