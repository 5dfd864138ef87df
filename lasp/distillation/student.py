"""Second stage: the whole model learns to predict what the teacher predicts."""

from typing import Any

import torch
from torch import Tensor

from lasp.distillation.config import StageConfig
from lasp.models import Decoder
from lasp.models.loss import IGNORE, linear_distillation


class Student(Decoder):
    """A decoder whose loss in training mode is told by a teacher, too (see `linear_distillation`)."""

    teacher: Decoder
    stage: StageConfig

    def follow(self, teacher: Decoder, stage: StageConfig) -> None:
        """teacher: on this device, in the dtype of the compute. It is no part of the state."""
        object.__setattr__(self, "teacher", teacher)
        self.stage = stage

    def forward(self, tokens: Tensor, seq: Any, *, labels: Any = None, scored: Any = None, memory: Any = None) -> Any:
        if labels is None or not self.training:
            return super().forward(tokens, seq, labels=labels, scored=scored, memory=memory)
        x, _ = self._run(tokens, seq, labels, memory)
        with torch.no_grad():
            its, _ = self.teacher.hidden_states(self.teacher.embedding(tokens), seq)
        labels = labels.masked_fill(~seq.valid.to(labels.device), IGNORE)
        if scored is not None:
            x, its, labels = (y.flatten(0, 1)[scored] for y in (x, its, labels))
        loss = linear_distillation(
            x,
            self.head_weight,
            labels,
            (its, self.teacher.head_weight),
            divergence=self.stage.divergence,
            cross_entropy=self.stage.cross_entropy,
            temperature=self.stage.temperature,
        )
        return loss, (labels != IGNORE).sum()
