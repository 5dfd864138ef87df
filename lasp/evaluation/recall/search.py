"""Which runs a sweep takes, and in which order."""

import math
from collections import deque
from dataclasses import dataclass, replace
from itertools import chain, product

from lasp.config import TrainConfig
from lasp.evaluation.recall.config import RecallSweep
from lasp.evaluation.recall.report import Cell, SweepResult


@dataclass(frozen=True)
class Job:
    sweep: RecallSweep
    model: str
    width: int
    lr: float
    seed: int
    epochs: int

    @property
    def config(self) -> TrainConfig:
        return self.sweep.run(self.model, self.width, self.lr, self.seed, self.epochs)

    def __str__(self) -> str:
        whole = "" if self.epochs == self.sweep.epochs else f", {self.epochs} epochs"
        return f"{self.model}, width {self.width}, learning rate {self.lr:g}, seed {self.seed}{whole}"


class Search:
    """Every model and width with all rates and seeds; or, with `rate_epochs`, with all rates on the first seed, and
    then with all seeds at the rate of the lowest held-out loss, which come before what other models have waiting."""

    def __init__(self, sweep: RecallSweep):
        self.sweep = sweep
        self.found: dict[Job, Cell] = {}
        seeds, epochs = sweep.seeds, sweep.epochs
        if sweep.rate_epochs is not None:
            seeds, epochs = sweep.seeds[:1], sweep.rate_epochs
        each = [
            [Job(sweep, *of, lr, seed, epochs) for lr, seed in product(sweep.learning_rates, seeds)]
            for of in product(sweep.models, sweep.widths)
        ]
        self._trials = [] if sweep.rate_epochs is None else each
        self._counting = each if sweep.rate_epochs is None else [[] for _ in each]
        self._waiting = deque(sorted(chain(*each), key=lambda job: sweep.seeds.index(job.seed)))

    def next(self) -> Job | None:
        """The next one that there is now; others may follow when more is found."""
        return self._waiting.popleft() if self._waiting else None

    def add(self, job: Job, cell: Cell) -> None:
        self.found[job] = cell
        for number, trials in enumerate(self._trials):
            if job in trials and not self._counting[number] and all(trial in self.found for trial in trials):
                best = min(trials, key=self._loss)
                jobs = [replace(best, seed=seed, epochs=self.sweep.epochs) for seed in self.sweep.seeds]
                self._counting[number] = jobs
                self._waiting.extendleft(job for job in jobs[::-1] if job not in self.found)

    def result(self) -> SweepResult:
        return SweepResult(self._cells(self._counting), self._cells(self._trials))

    def _cells(self, jobs: list[list[Job]]) -> list[Cell]:
        return [self.found[job] for of_model in jobs for job in of_model]

    def _loss(self, job: Job) -> float:
        loss = self.found[job].loss
        return math.inf if loss is None else loss
