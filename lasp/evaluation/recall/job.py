"""One run of a sweep."""

from dataclasses import dataclass

from lasp.config import TrainConfig
from lasp.evaluation.recall.config import RecallSweep


@dataclass(frozen=True)
class Job:
    sweep: RecallSweep
    model: str
    width: int
    lr: float
    seed: int

    @property
    def config(self) -> TrainConfig:
        return self.sweep.run(self.model, self.width, self.lr, self.seed)

    def __str__(self) -> str:
        return f"{self.model}, width {self.width}, learning rate {self.lr:g}, seed {self.seed}"
