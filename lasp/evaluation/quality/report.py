"""What a table shows: for each model the loss over parts of the context, and recall by how far back it reaches."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count, takewhile
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from lasp.evaluation.results import aligned
from lasp.pictures import empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = ((0, 16), (16, 4), (4, 1))  # of the context: from 1/a (0: its beginning) to 1/b
FAR = (64, 16, 4)  # recall of what was last seen at least 1/a of the context back
DRAWN_FROM = 64  # positions; fewer labels have earlier ones


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. positions, distances: the records of `LossByPosition` and `RecallInText`."""

    model: str
    size: str
    context: int
    seed: int
    parameters: int
    loss: float
    positions: list[dict[str, Any]]
    distances: list[dict[str, Any]]

    def loss_in(self, start: int, stop: int) -> float:
        """Of the positions from start on and before stop; NaN if there are none."""
        return _mean(self.positions, "loss", lambda first: start <= first < stop)

    def loss_by_doubling(self) -> dict[int, float]:
        """Of the positions from each key on, up to twice as far."""
        starts = takewhile(lambda start: start < self.context, (DRAWN_FROM << number for number in count()))
        return {start: self.loss_in(start, 2 * start) for start in starts}

    def recall(self, tokens: int) -> float:
        """The part that was right of pairs last seen at least so many tokens back; NaN if there are none."""
        return _mean(self.distances, "accuracy", lambda first: first >= max(1, tokens))


def _mean(records: list[dict[str, Any]], name: str, wanted: Callable[[int], bool]) -> float:
    chosen = [record for record in records if wanted(record["first"])]
    labels = sum(record["labels"] for record in chosen)
    return sum(record["labels"] * record[name] for record in chosen) / labels if labels else math.nan


@dataclass(frozen=True)
class QualityResult:
    cells: list[Cell]

    def rows(self) -> list[list[Cell]]:
        """The seeds of each model, size and context, in the order of the table."""
        rows: dict[tuple[str, int, str], list[Cell]] = {}
        for cell in self.cells:
            rows.setdefault((cell.size, cell.context, cell.model), []).append(cell)
        return list(rows.values())

    def record(self) -> dict[str, Any]:
        rows = []
        for seeds in self.rows():
            first = seeds[0]
            about = {name: getattr(first, name) for name in ("model", "size", "context", "parameters")}
            about |= {"loss": mean(cell.loss for cell in seeds), "seeds": len(seeds)}
            about["loss_by_part"] = {f"{start}-{stop}": _number(loss) for (start, stop), loss in _losses(seeds).items()}
            about["recall"] = {str(tokens): _number(part) for tokens, part in _recall(seeds).items()}
            rows.append(about)
        return {"table": rows, "runs": [asdict(cell) for cell in self.cells]}

    def table(self) -> str:
        """A table for each size and context. Losses in nats per token, recall in percent."""
        parts: dict[tuple[str, int], list[list[str]]] = {}
        for seeds in self.rows():
            first, losses, recall = seeds[0], _losses(seeds), _recall(seeds)
            head = [f"{first.size}, {first.context:,} tokens", "parameters", "loss", *(f"{a:,} on" for a, _ in losses)]
            rows = parts.setdefault((first.size, first.context), [[*head, *(f"recall {far:,} on" for far in recall)]])
            error = stdev(cell.loss for cell in seeds) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
            overall = f"{mean(cell.loss for cell in seeds):.4f}" + (f" ± {error:.4f}" if error else "")
            numbers = [*(f"{loss:.4f}" for loss in losses.values()), *(f"{100 * part:.1f}" for part in recall.values())]
            rows.append([first.model, f"{first.parameters:,}", overall, *numbers])
        return "\n\n".join(aligned(rows) for rows in parts.values())

    def figure(self) -> "Figure":
        """Loss by position and recall by distance, a row of both for each size and context."""
        groups: dict[tuple[str, int], list[Cell]] = {}
        for seeds in self.rows():
            groups.setdefault((seeds[0].size, seeds[0].context), []).append(seeds[0])
        figure = empty_figure(12, 4.5 * len(groups))
        for number, ((size, context), cells) in enumerate(groups.items()):
            places = 2 * number + 1, 2 * number + 2
            title = f"{size}, {context:,} tokens"
            loss, recall = (figure.add_subplot(len(groups), 2, place, xscale="log", title=title) for place in places)
            _draw(loss, {cell.model: cell.loss_by_doubling() for cell in cells})
            loss.set(xlabel="position in the document, and up to twice as far", ylabel="loss (nats per token)")
            seen = {cell.model: {one["first"]: 100 * one["accuracy"] for one in cell.distances} for cell in cells}
            _draw(recall, {model: {first: y for first, y in points.items() if first} for model, points in seen.items()})
            recall.set(xlabel="tokens since the pair was last seen", ylabel="accuracy (%)")
        return figure


def _draw(axes: "Axes", curves: dict[str, dict[int, float]]) -> None:
    for number, (model, points) in enumerate(curves.items()):
        look: dict[str, Any] = {"marker": "osD^vP*X"[number % 8], "markersize": 3, "color": f"C{number % 10}"}
        axes.plot(list(points), list(points.values()), label=model, **look)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _losses(seeds: list[Cell]) -> dict[tuple[int, int], float]:
    context = seeds[0].context
    parts = [(context // start if start else 0, context // stop) for start, stop in PARTS]
    return {part: mean(cell.loss_in(*part) for cell in seeds) for part in parts}


def _recall(seeds: list[Cell]) -> dict[int, float]:
    return {seeds[0].context // far: mean(cell.recall(seeds[0].context // far) for cell in seeds) for far in FAR}


def _number(x: float) -> float | None:
    """As JSON knows it."""
    return None if math.isnan(x) else x
