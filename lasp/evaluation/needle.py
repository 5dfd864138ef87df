"""Needle tests: is a fact found at every depth of contexts of every length?"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lasp.config import require
from lasp.evaluation.config import Evaluation
from lasp.evaluation.prompts.needles import Needles
from lasp.evaluation.prompts.prompt import Composer, read_haystack
from lasp.evaluation.results import aligned
from lasp.evaluation.subject import Subject
from lasp.evaluation.writing import answers
from lasp.fields import Count, FilePath, Part, Seed
from lasp.pictures import empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS: dict[str, Callable[[int], Needles]] = {
    "single": lambda several: Needles(),
    "keys": lambda several: Needles(keys=several),
    "values": lambda several: Needles(values=several),
}


@dataclass(frozen=True, kw_only=True)
class Needle(Evaluation):
    """Facts that are hidden in a text, by its length and their depth (Needle in a Haystack; RULER, arXiv:2404.06654).

    single: one key's number. keys: one key's among several with numbers. values: all of several numbers of one key, the
    first at the depth, the others anywhere.
    """

    kind: Literal["single", "keys", "values"] = "single"  # what is hidden, and asked for
    several: Count = 4  # keys or values, of these kinds
    lengths: tuple[Count, ...] = (1024, 2048, 4096, 8192)  # tokens of a context, the answer's included
    depths: tuple[Part, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the first needle: 0 before all of the text, 1 after it
    samples: Count = 5  # texts for each length and depth
    haystack: FilePath | None = None  # a file of text; Python's documentation of its language if None
    seed: Seed = 0  # of texts and needles

    def run(self, subject: Subject) -> "NeedleResult":
        """Raises ValueError for a length that the question does not fit in, or a tokenizer that loses characters."""
        for name in ("lengths", "depths"):
            require(len(getattr(self, name)) > 0, name, getattr(self, name), "at least one")
        haystack, composer = read_haystack(self.haystack), Composer(subject.tokenizer)
        needles = KINDS[self.kind](self.several)
        depths, found = sorted(self.depths), []
        for length in sorted(self.lengths):
            prompts = []
            for depth, sample in product(depths, range(self.samples)):
                rng = np.random.default_rng([self.seed, length, round(1000 * depth), sample])
                prompts.append(needles.prompt(composer, haystack, length, rng, depth))
            written = answers(subject, prompts)
            scores = [prompt.score(text) for prompt, text in zip(prompts, written, strict=True)]
            for place, depth in enumerate(depths):
                accuracy = mean(scores[place * self.samples :][: self.samples])
                found.append(Found(length=length, depth=depth, samples=self.samples, accuracy=accuracy))
        return NeedleResult(self.kind, found)


@dataclass(frozen=True, kw_only=True)
class Found:
    """accuracy: the mean part of the values asked for that the model said."""

    length: int
    depth: float
    samples: int
    accuracy: float


@dataclass(frozen=True)
class NeedleResult:
    kind: str
    found: list[Found]

    def grid(self) -> tuple[list[int], list[float], np.ndarray]:
        """Lengths, depths, and the accuracies [depths, lengths]."""
        lengths = sorted({one.length for one in self.found})
        depths = sorted({one.depth for one in self.found})
        by_place = {(one.depth, one.length): one.accuracy for one in self.found}
        return lengths, depths, np.array([[by_place[depth, length] for length in lengths] for depth in depths])

    def record(self) -> dict[str, Any]:
        overall = mean(one.accuracy for one in self.found)
        return {"kind": self.kind, "accuracy": overall, "found": [asdict(one) for one in self.found]}

    def table(self) -> str:
        """Percentages."""
        lengths, depths, grid = self.grid()
        rows = [[f"{depth:.0%}", *(f"{100 * x:.0f}" for x in line)] for depth, line in zip(depths, grid, strict=True)]
        means = ["mean", *(f"{100 * x:.0f}" for x in grid.mean(0))]
        return aligned([[f"{self.kind}: depth", *(f"{length:,}" for length in lengths)], *rows, means])

    def figure(self) -> "Figure":
        lengths, depths, _ = self.grid()
        figure = empty_figure(1.5 + 0.9 * len(lengths), 1.5 + 0.5 * len(depths))
        self.draw(figure.add_subplot(xlabel="tokens", ylabel="depth", title=f"needles found (%): {self.kind}"))
        return figure

    def draw(self, axes: "Axes") -> None:
        """The heat map."""
        lengths, depths, grid = self.grid()
        axes.imshow(100 * grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        for (y, x), value in np.ndenumerate(grid):
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center")
