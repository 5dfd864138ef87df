"""The synthetic tasks of RULER, arXiv:2404.06654: all but its questions about data sets."""

from dataclasses import asdict, dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lasp.config import require
from lasp.evaluation.config import Evaluation
from lasp.evaluation.prompts.counting import CommonWords, FrequentWords
from lasp.evaluation.prompts.needles import Needles
from lasp.evaluation.prompts.prompt import Composer, Haystack, Prompt, read_haystack
from lasp.evaluation.prompts.tracking import Tracking
from lasp.evaluation.results import aligned
from lasp.evaluation.subject import Subject
from lasp.evaluation.writing import answers
from lasp.fields import Count, FilePath, Seed
from lasp.pictures import empty_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RulerTask(Protocol):
    def prompt(self, composer: Composer, haystack: Haystack, length: int, rng: np.random.Generator) -> Prompt: ...


RULER_TASKS: dict[str, RulerTask] = {
    "niah_single_1": Needles(around="noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value="uuid"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles(around="needles"),
    "niah_multikey_3": Needles(around="needles", key="uuid", value="uuid"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, queries=4),
    "vt": Tracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
}


@dataclass(frozen=True, kw_only=True)
class Ruler(Evaluation):
    """The synthetic tasks of RULER (arXiv:2404.06654) by length of the context."""

    tasks: tuple[str, ...] = tuple(RULER_TASKS)  # which of them
    lengths: tuple[Count, ...] = (4096, 8192)  # tokens of a context, the answer's included
    samples: Count = 20  # for each task and length
    haystack: FilePath | None = None  # a file of text; Python's documentation of its language if None
    seed: Seed = 0  # of texts and answers

    def run(self, subject: Subject) -> "RulerResult":
        """Raises ValueError for a task that is none, a length in which one does not fit, or a tokenizer that loses
        characters."""
        for name in self.tasks:
            require(name in RULER_TASKS, "tasks", name, f"one of {', '.join(RULER_TASKS)}")
        for field in ("tasks", "lengths"):
            require(len(getattr(self, field)) > 0, field, getattr(self, field), "at least one")
        haystack, composer = read_haystack(self.haystack), Composer(subject.tokenizer)
        return RulerResult(
            [
                self._score(subject, composer, haystack, name, length)
                for name in self.tasks
                for length in sorted(self.lengths)
            ]
        )

    def _score(self, subject: Subject, composer: Composer, haystack: Haystack, name: str, length: int) -> "TaskScore":
        prompts = []
        for sample in range(self.samples):
            rng = np.random.default_rng([self.seed, list(RULER_TASKS).index(name), length, sample])
            prompts.append(RULER_TASKS[name].prompt(composer, haystack, length, rng))
        written = answers(subject, prompts)
        scores = [prompt.score(text) for prompt, text in zip(prompts, written, strict=True)]
        return TaskScore(task=name, length=length, samples=self.samples, score=mean(scores))


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """score: the mean part of the answers that the model said."""

    task: str
    length: int
    samples: int
    score: float


@dataclass(frozen=True)
class RulerResult:
    scores: list[TaskScore]

    def by_task(self) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        for one in self.scores:
            found.setdefault(one.task, {})[one.length] = one.score
        return found

    def means(self) -> dict[int, float]:
        """Over the tasks, by length."""
        tasks = self.by_task().values()
        return {length: mean(task[length] for task in tasks) for length in next(iter(tasks))}

    def record(self) -> dict[str, Any]:
        return {
            "mean": {str(n): score for n, score in self.means().items()},
            "scores": [asdict(s) for s in self.scores],
        }

    def table(self) -> str:
        """Percentages."""
        lines = {**self.by_task(), "mean": self.means()}
        head = ["task", *(f"{length:,}" for length in self.means())]
        return aligned([head, *([name, *(f"{100 * x:.1f}" for x in row.values())] for name, row in lines.items())])

    def figure(self) -> "Figure":
        figure = empty_figure(8, 4.5)
        axes = figure.add_subplot(xlabel="tokens", ylabel="score (%)", xscale="log", ylim=(-3, 103))
        for number, (name, row) in enumerate(self.by_task().items()):
            axes.plot(list(row), [100 * x for x in row.values()], marker="osD^vP*X"[number % 8], label=name)
        means = self.means()
        axes.plot(list(means), [100 * x for x in means.values()], color="black", linewidth=2, label="mean")
        axes.set_xticks(list(means), [f"{length:,}" for length in means])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
        return figure
