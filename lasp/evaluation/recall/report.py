"""What a sweep found: for each model and width the learning rate that is best on the mean of its seeds."""

import math
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from lasp.evaluation.results import aligned
from lasp.pictures import empty_figure

RESULT = "recall.json"  # a cell, in its run's directory

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: accuracy by number of pairs, in [0, 1]; state: numbers kept of a sequence to go on from its end.

    loss: held out; None if the run ended since its loss was not finite: it has found nothing then.
    """

    model: str
    width: int
    lr: float
    seed: int
    parameters: int
    state: int
    loss: float | None
    accuracy: dict[str, float]

    @property
    def mean(self) -> float:
        return mean(self.accuracy.values())

    def __str__(self) -> str:
        if self.loss is None:
            return f"{100 * self.mean:.1f} % right (its loss was not finite)"
        each = " ".join(f"{100 * value:.1f}" for value in self.accuracy.values())
        return f"{100 * self.mean:.1f} % right ({each}), held-out loss {self.loss:.3f}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of one model and width at their best learning rate."""

    cells: list[Cell]

    def accuracy(self, pairs: str | None = None) -> tuple[float, float]:
        """Mean and standard error over the seeds (0 for one seed); over all numbers of pairs if None."""
        values = [cell.mean if pairs is None else cell.accuracy[pairs] for cell in self.cells]
        return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class SweepResult:
    cells: list[Cell]

    def rows(self) -> list[Row]:
        """In the order of the sweep."""
        by_rate: dict[tuple[str, int], dict[float, list[Cell]]] = {}
        for cell in self.cells:
            by_rate.setdefault((cell.model, cell.width), {}).setdefault(cell.lr, []).append(cell)
        return [
            max((Row(cells=cells) for cells in rates.values()), key=lambda row: row.accuracy()[0])
            for rates in by_rate.values()
        ]

    def record(self) -> dict[str, Any]:
        rows = []
        for row in self.rows():
            first, (overall, error) = row.cells[0], row.accuracy()
            by_pairs = {pairs: row.accuracy(pairs)[0] for pairs in first.accuracy}
            summary = {"mean": overall, "standard_error": error, "seeds": len(row.cells), "accuracy": by_pairs}
            names = ("model", "width", "lr", "parameters", "state")
            rows.append({name: getattr(first, name) for name in names} | summary)
        return {"table": rows, "runs": [asdict(cell) for cell in self.cells]}

    def table(self) -> str:
        """Percentages."""
        pairs = list(self.cells[0].accuracy)
        lines = [["model", "width", "state", "best lr", "mean ± se", *(f"{n} pairs" for n in pairs)]]
        for row in self.rows():
            first, (overall, error) = row.cells[0], row.accuracy()
            each = [f"{100 * row.accuracy(n)[0]:.1f}" for n in pairs]
            about = [first.model, str(first.width), f"{first.state:,}", f"{first.lr:g}"]
            lines.append([*about, f"{100 * overall:.1f} ± {100 * error:.1f}", *each])
        return aligned(lines)

    def figure(self) -> "Figure":
        figure = empty_figure(11, 4.5)
        by_pairs = figure.add_subplot(1, 2, 1, xlabel="pairs", ylabel="accuracy (%)", xscale="log")
        by_state = figure.add_subplot(
            1, 2, 2, xlabel="state (numbers per sequence)", ylabel="mean accuracy (%)", xscale="log"
        )
        rows = self.rows()
        models = list(dict.fromkeys(row.cells[0].model for row in rows))
        for number, model in enumerate(models):
            own = sorted((row for row in rows if row.cells[0].model == model), key=lambda row: row.cells[0].state)
            look: dict[str, Any] = {"marker": "osD^vP*X"[number % 8], "color": f"C{number % 10}", "label": model}
            largest = own[-1]
            pairs = list(largest.cells[0].accuracy)
            by_pairs.plot([int(n) for n in pairs], [100 * largest.accuracy(n)[0] for n in pairs], **look)
            means = [row.accuracy() for row in own]
            by_state.errorbar(
                [row.cells[0].state for row in own],
                [100 * value for value, _ in means],
                [100 * error for _, error in means],
                **look,
            )
        by_pairs.set_xticks([int(n) for n in self.cells[0].accuracy], list(self.cells[0].accuracy))
        by_pairs.minorticks_off()
        for axes in (by_pairs, by_state):
            axes.set_ylim(-3, 103)
            axes.grid(alpha=0.3)
        figure.legend(*by_pairs.get_legend_handles_labels(), loc="outside right center", fontsize="small")
        return figure
